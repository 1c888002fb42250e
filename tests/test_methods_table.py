"""The table of recipes beside each other, and its figures, from made-up records."""

import json
import shutil

import numpy as np
import pytest
from made_records import MACHINE, Recorder, cells, evaluation, pruning

from olica.report import methods, plots
from olica.report.runs import Results


@pytest.fixture
def record(tmp_path) -> Recorder:
    return Recorder(tmp_path, "7b")


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
    header, *rows = cells(methods.tables(record.results))
    assert header[:5] == ["gone", "recipe", "parameters", "left of the layers", "wikitext2"]
    by_recipe = {row[1]: row for row in rows}
    assert list(by_recipe) == ["dense", "olica", "olica-grouped", "olica-plus"]
    assert by_recipe["dense"][4].startswith("10.00 ±") and by_recipe["olica"][4] == "4.00 ± 0.00"
    # The geometric mean of 1.5 and 1.2, and ln of that over ln 2.
    mean = (1.5 * 1.2) ** 0.5
    share = np.log(mean) / np.log(2)
    assert by_recipe["olica-plus"][4] == f"{mean:.2f} ± 0.00, 1.20 to 1.50 ({share:.2f})"
    assert by_recipe["olica-plus"][3] == "75.0%"
    assert by_recipe["olica-plus"][-2:] == ["55.00 ± 0.50", f"-25.00 ± {25 / 7**0.5:.2f}"]
    assert by_recipe["olica"][-2:] == ["", ""]


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
    text = methods.tables(record.results)
    header, *rows = cells(text)
    place = header.index("decoding")
    assert {row[1]: row[place] for row in rows} == {
        "dense": "1",
        "olica": "0.88",
        "olica-grouped": "",
        "olica-plus": "",
    }
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
    _, *rows = cells(methods.tables(record.results))
    found = {row[0]: row[4] for row in rows if row[1] == "olica-plus"}
    assert [row[1] for row in rows] == ["dense", "olica", *["olica-grouped"] * 2, *["olica-plus"] * 3]
    # Beside the 2.0 of the same number of parameters, not the 4.0 of a few more.
    assert found["20.4%"] == f"3.00 ± 0.00 ({np.log(3) / np.log(2):.2f})"
    assert found["21%"] == "2.50 ± 0.00"


def test_without_a_founding_recipe_there_is_no_share(record):
    recipe_runs(record)
    for name in "ab":
        shutil.rmtree(record.folder / record.label / "methods/paper" / name)
    _, _, row = cells(methods.tables(record.results))
    assert row[4] == f"{(1.5 * 1.2) ** 0.5:.2f} ± 0.00, 1.20 to 1.50"
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
    plus = lines[f"olica-plus, {record.label}, own"]
    assert list(plus.get_xdata()) == [100, 75] and plus.get_ydata()[1] == pytest.approx((1.5 * 1.2) ** 0.5)
    assert plots.quality_over_size([Results(record.folder, "elsewhere")]) is None


def test_what_lies_far_above_the_founding_recipes_is_named_above_the_panel(record):
    recipe_runs(record)
    made = pruning(sparsity=0.2, recipe="magnitude", seed=0, sparsity_of="model")
    made["measured_sparsity_of_layers"] = 0.25
    record("methods/paper/e", evaluation(100.0, 50.0), made)
    (axes,) = plots.quality_over_size([record.results]).axes
    assert axes.get_title() == "wikitext2 (above it: magnitude)" and axes.get_ylim()[1] == pytest.approx(2 * 4)
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert heights["olica"] > heights["olica-grouped"] > heights["olica-plus"] and len(heights) == 3


def test_choice_and_repair_stand_apart_where_the_dial_was_turned(record):
    recipe_runs(record)
    assert "Choice and repair" not in methods.tables(record.results)
    for name, refit, value in (("e", "none", 30.0), ("f", "least-squares", 12.5)):
        made = pruning(sparsity=0.2, recipe="olica-grouped", seed=0, sparsity_of="model", refit=refit)
        made["measured_sparsity_of_layers"] = 0.25
        record(f"methods/paper/{name}", evaluation(value, 50.0), made)
    first, second = methods.tables(record.results).split("### Choice and repair")
    assert "olica-grouped, refit: none" in first
    header, row = cells(second)
    assert header[2:] == ["wikitext2, own repair", "wikitext2, none", "wikitext2, least squares"]
    assert row[:2] == ["20%", "olica-grouped"] and row[2].startswith("2.00 ±") and row[3].startswith("3.00 ±")
    assert row[4].startswith("1.25 ±")
