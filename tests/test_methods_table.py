"""The table of recipes beside each other, and its figures, from made-up records."""

import json
import shutil

import numpy as np
import pytest
from made_records import ERROR, MACHINE, Recorder, cells, evaluation, pruning

from olica.report import methods, plots
from olica.report.runs import Results


@pytest.fixture
def record(tmp_path) -> Recorder:
    return Recorder(tmp_path, "7b")


def tables(record) -> dict[str, list[list[str]]]:
    """The cells of all tables of methods, by their titles up to the comma."""
    parts = (methods.tables(record.results) or "").split("### ")[1:]
    return {part.partition(",")[0]: cells(part) for part in parts}


def recipe_runs(record, mix: str = "paper") -> None:
    """Runs of two founding recipes and another one, at one size; of the other with two seeds."""
    record("methods/dense", evaluation(10.0, 60.0))
    for name, recipe, value, seed in (
        ("a", "olica", 40.0, 0),
        ("b", "olica-grouped", 20.0, 0),
        ("c", "olica-plus", 15.0, 0),
        ("d", "olica-plus", 12.0, 1),
    ):
        made = pruning(sparsity=0.2, recipe=recipe, seed=seed, sparsity_of="model")
        made["measured_sparsity_of_layers"] = 0.25
        record(f"methods/{mix}/{name}", evaluation(value, 50.0), made)
    made = pruning(sparsity=0.2, recipe="olica-plus", seed=0, sparsity_of="model")
    record(f"methods/{mix}/tasks/c", evaluation(15.0, 55.0), made)
    dense = evaluation(10.0, 60.0)
    for scores in dense["results"]["model"]["zero_shot"]["tasks"].values():
        scores["hits"] = {metric: "1111" for metric in scores["hits"]}
    record("methods/tasks/dense", dense)


def test_recipes_stand_beside_each_other_with_their_share_of_the_founding_gap(record):
    recipe_runs(record)
    made = tables(record)
    header, *rows = made["Methods beside each other"]
    assert header[:4] == ["removed", "recipe", "parameters", "WikiText-2"]
    by_recipe = {row[1]: row for row in rows}
    assert list(by_recipe) == ["dense", "olica-plus", "olica-grouped", "olica"], "the best first"
    assert by_recipe["dense"][3].startswith("10.00 ±") and by_recipe["olica"][3] == "4.00 ± 0.00"
    mean = (1.5 * 1.2) ** 0.5  # of the seeds, geometric
    assert by_recipe["olica-plus"][3] == f"**{mean:.2f} ± 0.00, 1.20 to 1.50**"
    assert by_recipe["olica-plus"][-2:] == ["55.00 ± 0.50", f"-25.00 ± {25 / 7**0.5:.2f}"]
    assert by_recipe["olica"][-2:] == ["", ""]
    share = np.log(mean) / np.log(2)
    assert made["Share of Olica's gap"] == [["removed", "recipe", "WikiText-2"], ["20%", "olica-plus", f"{share:.2f}"]]
    costs = {row[1]: row[2:] for row in made["Cost"][1:]}
    assert costs["olica-plus"] == ["75.0%", "a GPU", "6.0", "3.00"], "memory of the device, not of the host"


def test_a_trial_may_leave_the_papers_text_out(record):
    recipe_runs(record)
    for path in (record.folder / record.label / "methods").rglob("evaluation.json"):
        measured = json.loads(path.read_text())
        texts = measured["results"]["model"]["perplexity"]
        texts["pydoc"] = texts.pop("wikitext2")
        path.write_text(json.dumps(measured))
    header, *rows = tables(record)["Methods beside each other"]
    assert header[3] == "pydoc" and rows[1][3].startswith("**1.34 ±")


def test_texts_of_different_length_are_told_apart(record):
    recipe_runs(record)
    for path in (record.folder / record.label / "methods").rglob("evaluation.json"):
        measured = json.loads(path.read_text())
        texts = measured["results"]["model"]["perplexity"]
        texts["data/c4_report.jsonl"] = texts["wikitext2"] | {"windows": 1886}
        path.write_text(json.dumps(measured))
    said = (
        "Perplexity: windows of 128 tokens (30 of WikiText-2, 1,886 of C4), start token: none; run in float16 on a GPU."
    )
    assert f"\n- {said}\n" in methods.tables(record.results)


def test_a_mix_may_have_a_dense_model_of_its_own(record):
    recipe_runs(record)
    record("methods/paper/dense", evaluation(20.0, 60.0))
    _, *rows = tables(record)["Methods beside each other"]
    assert [row[1:4:2] for row in rows][::3] == [["dense", f"20.00 ± {20 * ERROR:.2f}"], ["olica", "2.00 ± 0.00"]]


def test_memory_of_a_cpu_is_the_hosts(record):
    recipe_runs(record)
    path = record.folder / record.label / "methods/paper/a/pruning.json"
    made = json.loads(path.read_text())
    made["environment"] |= {"device": "cpu", "cpu_threads": 2}
    for stage in made["stages"].values():
        stage["device_bytes"] = None
    path.write_text(json.dumps(made))
    costs = {row[1]: row[2:] for row in tables(record)["Cost"][1:]}
    assert costs["olica"] == ["75.0%", "2 threads of a CPU", "6.0", "1.00"]


def test_how_long_decoding_takes_stands_where_it_was_timed(record):
    recipe_runs(record)
    folder = record.folder / record.label / "methods/paper"
    for name, recipe in (("a", "olica"), ("b", "olica-grouped")):
        path = folder / name / "evaluation.json"
        made = json.loads(path.read_text())
        made["settings"]["checkpoint"] = f"./there/{recipe}-0.2/{recipe}/"
        path.write_text(json.dumps(made))
    timed = {"smollm2": {"decode": {"ratio": 1}}, "there/olica-0.2/olica": {"decode": {"ratio": 0.876}}}
    settings = {"prompt_tokens": "128", "new_tokens": "32", "repeats": "9", "dtype": "float32"}
    content = {"models": timed, "settings": settings, "environment": MACHINE}
    (folder / "generation_speed_0.2.json").write_text(json.dumps(content))
    header, *rows = tables(record)["Cost"]
    assert header[-1] == "decoding"
    assert {row[1]: row[-1] for row in rows} == {"olica": "0.88", "olica-grouped": "", "olica-plus": ""}
    text = methods.tables(record.results)
    assert "128 tokens continued by 32, medians of 9 rounds, float32, a GPU, 8 threads, commit cafe." in text


def test_a_share_is_of_the_nearest_founding_size_and_of_none_that_is_another(record):
    recipe_runs(record)
    for name, value, parameters in (("e", 30.0, 0.996), ("f", 25.0, 0.99)):
        made = pruning(sparsity=0.2 + (1 - parameters), recipe="olica-plus", seed=0, sparsity_of="model")
        made["measured_sparsity_of_layers"] = 0.25
        made["parameters"]["after"] = int(parameters * made["parameters"]["after"])
        record(f"methods/paper/{name}", evaluation(value, 50.0), made)
    made = pruning(sparsity=0.199, recipe="olica-grouped", seed=0, sparsity_of="model")
    made["measured_sparsity_of_layers"] = 0.25
    made["parameters"]["after"] = int(1.003 * made["parameters"]["after"])
    record("methods/paper/g", evaluation(40.0, 50.0), made)
    _, *rows = tables(record)["Methods beside each other"]
    order = ["dense", "olica-plus", "olica-grouped", "olica-plus", "olica", "olica-grouped", "olica-plus"]
    assert [row[1] for row in rows] == order
    _, *rows = tables(record)["Share of Olica's gap"]
    found = {row[0]: row[2] for row in rows}
    # Beside the 2.0 of the same number of parameters, not the 4.0 of a few more.
    assert found["20.4%"] == f"{np.log(3) / np.log(2):.2f}"
    assert "21%" not in found


def test_without_a_founding_recipe_there_is_no_share(record):
    recipe_runs(record)
    for name in "ab":
        shutil.rmtree(record.folder / record.label / "methods/paper" / name)
    made = tables(record)
    _, _, row = made["Methods beside each other"]
    assert row[3] == f"{(1.5 * 1.2) ** 0.5:.2f} ± 0.00, 1.20 to 1.50", "in no bold, alone"
    assert "Share of Olica's gap" not in made
    assert methods.tables(Results(record.folder, "elsewhere")) is None


def test_quality_over_size_has_a_line_for_each_recipe_and_mix(record):
    recipe_runs(record)
    recipe_runs_of = Recorder(record.folder, record.label)
    for name in ("dense", "tasks/dense"):
        shutil.rmtree(record.folder / record.label / "methods" / name)
    recipe_runs(recipe_runs_of, "own")
    figure = plots.quality_over_size([record.results])
    (axes,) = figure.axes
    lines = {line.get_gid(): line for line in axes.get_lines() if line.get_gid()}
    assert len(lines) == 6 and "above" not in axes.get_title()
    assert {text.get_text() for text in axes.texts} == {"olica", "olica-grouped", "olica-plus"}
    plus = lines["olica-plus, own"]
    assert list(plus.get_xdata()) == [100, 75] and plus.get_ydata()[1] == pytest.approx((1.5 * 1.2) ** 0.5)
    assert plots.quality_over_size([Results(record.folder, "elsewhere")]) is None


def test_what_lies_far_above_the_founding_recipes_is_named_above_the_panel(record):
    recipe_runs(record)
    made = pruning(sparsity=0.2, recipe="magnitude", seed=0, sparsity_of="model")
    made["measured_sparsity_of_layers"] = 0.25
    record("methods/paper/e", evaluation(100.0, 50.0), made)
    (axes,) = plots.quality_over_size([record.results]).axes
    assert axes.get_title() == "7b, WikiText-2 (above it: magnitude)" and axes.get_ylim()[1] == pytest.approx(2 * 4)
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights["olica"] > heights["olica-grouped"] > heights["olica-plus"] and len(heights) == 3


def test_choice_and_repair_stand_apart_where_the_dial_was_turned(record):
    recipe_runs(record)
    assert "Choice and repair" not in tables(record)
    for name, refit, value in (("e", "none", 30.0), ("f", "least-squares", 12.5)):
        made = pruning(sparsity=0.2, recipe="olica-grouped", seed=0, sparsity_of="model", refit=refit)
        made["measured_sparsity_of_layers"] = 0.25
        record(f"methods/paper/{name}", evaluation(value, 50.0), made)
    made = tables(record)
    assert "olica-grouped, refit: none" in {row[1] for row in made["Methods beside each other"]}
    header, row = made["Choice and repair"]
    assert header[2:] == ["WikiText-2, own repair", "WikiText-2, none", "WikiText-2, least squares"]
    assert row[:2] == ["20%", "olica-grouped"] and row[2].startswith("2.00 ±") and row[3].startswith("3.00 ±")
    assert row[4].startswith("1.25 ±")
