"""Tables and figures from made-up records, and the paper's own figures."""

import json
import sys

import numpy as np
import pytest
import torch
from made_records import ERROR, MACHINE, Recorder, cells, evaluation, pruning

from olica.errors import UsageError
from olica.evaluation.paired import PAPER_METRIC, pack_floats
from olica.report.plots import FIGURES, draw
from olica.report.runs import PAPER, Results, limited
from olica.report.tables import TABLES, TASKS, Measured, Table


@pytest.fixture
def label() -> str:
    return "7b"


@pytest.fixture
def record(tmp_path, label) -> Recorder:
    return Recorder(tmp_path, label)


# Of a model that the paper has, and of one that it has not: what is set beside the paper's figures depends on it.
of_either = pytest.mark.parametrize("label", ["7b", "smollm2"])


@of_either
def test_table_2_sets_ours_beside_the_papers(record):
    record("tables/dense", evaluation(12.63, 66.09))
    record("tables/sparsity-0.2", evaluation(15.85, 63.54), pruning())
    markdown = TABLES["table2"](record.results)
    header, *rows = cells(markdown)
    if record.label == "7b":
        assert header == ["sparsity", "measure", "paper", "ours", "difference"]
        assert ["20%", "perplexity", "15.35", f"15.85 ± {15.85 * ERROR:.2f}", "+0.50"] in rows
        assert ["20%", "BoolQ", "71.59", "63.54 ± 1.00", "-8.05"] in rows
        assert ["20%", "mean", "64.54", "63.54 ± 0.50", "-1.00"] in rows
        assert ["0%", "mean", "66.09", "66.09 ± 0.50", "+0.00"] in rows
        assert ["20%", "perplexity, ratio to dense", "1.215", "1.255 ± 0.000", "+0.040"] in rows
        assert ["20%", "mean, to dense", "-1.55", "+0.00 ± 0.00", "+1.55"] in rows
        assert len(rows) == 20
    else:
        assert header == ["sparsity", "perplexity", "ratio to dense", *TASKS.values(), "mean", "mean, to dense"]
        assert [row[0] for row in rows] == ["0%", "20%"] and rows[1][1] == f"15.85 ± {15.85 * ERROR:.2f}"
        assert rows[1][2] == "1.255 ± 0.000" and rows[1][-1] == "+0.00 ± 0.00"
    assert "lm-eval 1, the first 200 rows" in markdown and "256 samples of 128 tokens" in markdown


@of_either
def test_table_1_has_time_and_memory(record):
    record("tables/sparsity-0.25", evaluation(16.7, 63.0), pruning(sparsity=0.25))
    header, *rows = cells(TABLES["table1"](record.results))
    minutes, memory = rows[1:3]
    if record.label == "7b":
        assert minutes == ["25%", "minutes", "7.0", "6.0", "-1.0"]
        assert memory == ["25%", "peak GPU memory, GB", "3.00", "3.00", "+0.00"]
        assert rows[3] == ["25%", "perplexity", "16.69", f"16.70 ± {16.7 * ERROR:.2f}", "+0.01"]
    else:
        assert minutes == ["25%", "minutes", "6.0"] and header[-1] == "ours"


def test_memory_and_times_of_the_cpu_are_set_beside_nothing(tmp_path):
    record = Recorder(tmp_path, "7b")
    here, measured = pruning(sparsity=0.25), evaluation(16.7, 63.0)
    for run in (here, measured):
        run["environment"] = MACHINE | {"device": "cpu"}
    for stage in here["stages"].values():
        stage["device_bytes"] = None
    measured["results"]["model"]["cost"]["peak_memory"]["device_bytes"] = None
    measured["settings"]["limit"] = None  # all rows: nothing but the machine differs
    record("tables/sparsity-0.25", measured, here)
    record("table4/sparsity-0.25", measured, here)
    rows = cells(TABLES["table1"](record.results)) + cells(TABLES["table4"](record.results))
    assert ["25%", "peak host memory, GB", "", "1.00", ""] in rows
    assert ["25%", "peak host memory, MiB", "", "2,048.0", ""] in rows
    assert ["25%", "seconds for 30 windows", "", "30.0", ""] in rows


@of_either
def test_table_4_has_costs(record):
    record("table4/sparsity-0.2", evaluation(15.0, 60.0), pruning())
    rows = {row[1]: row[2:] for row in cells(TABLES["table4"](record.results))[1:]}
    ours = 1 if record.label == "7b" else 0
    assert rows["peak GPU memory, MiB"][ours] == "16,384.0" and rows["ms for a new token"][ours] == "20.0"
    assert rows["seconds for 30 windows"][ours] == "30.0" and rows["cache of a token, kB"][ours] == "524.3"
    if ours:
        assert rows["seconds for 30 windows"][0] == "", "the paper's time is that of all windows"
        assert rows["MACs of 64 tokens, 10⁹"] == ["373.23", "345.00", "-28.23"]
        assert rows["weights, MiB"] == ["", "8,192.0", ""]


@of_either
def test_table_5_has_methods_in_the_papers_order(record):
    for recipe in ("olica-wanda", "olica", "olica-awsvd", "olica-svd"):
        for number in (12, 0):
            settings = pruning(sparsity=0.33, recipe=recipe, mlp_num=number, corrected=number)
            record(f"tables/{recipe}_{number}", evaluation(20.0, 60.0), settings)
    record("tables/sparsity-0.2", evaluation(15.0, 64.0), pruning())
    record("tables/dense", evaluation(12.0, 66.0))
    header, *rows = cells(TABLES["table5"](record.results))
    assert header[:3] == ["correction", "method", "measure"]
    methods = [(row[0], row[1]) for row in rows if row[2] == "perplexity"]
    order = ["SVD", "AWSVD", "Wanda", "Fast-OND"]
    assert methods == [(correction, method) for correction in ("without", "with") for method in order]
    if record.label == "7b":
        assert rows[0][3:] == ["71.01", f"20.00 ± {20 * ERROR:.2f}", "-51.01"]
        assert rows[-1][3:] == ["61.21", "60.00 ± 0.50", "-1.21"]


@of_either
def test_table_6_wants_both_methods(record):
    record("tables/sparsity-0.2", evaluation(15.0, 64.0), pruning())
    assert TABLES["table6"](record.results) is None
    record("tables/sparsity-0.2_olica-ond", evaluation(15.5, 63.0), pruning(recipe="olica-ond"))
    rows = cells(TABLES["table6"](record.results))[1:]
    assert [row[0] for row in rows] == ["OND"] * 4 + ["Fast-OND"] * 3
    if record.label == "7b":
        assert rows[2] == ["OND", "perplexity, ratio to Fast-OND", "0.988", "1.033 ± 0.000", "+0.045"]
        assert rows[0] == ["OND", "seconds", "2,910", "360", "-2,550"]


@pytest.mark.parametrize("file", ["flags", "evaluation.json", "pruning.json"])
def test_what_is_not_recorded_as_a_whole_is_not_shown(record, file):
    for name in ("tables/sparsity-0.2", "figure3/mlp_num-0", "figure3/mlp_num-4"):
        record(name, evaluation(15.0, 64.0), pruning())
    assert TABLES["table2"](record.results) and draw("figure3", record.results)
    for path in record.folder.rglob(file):
        path.unlink()
    assert all(make(record.results) is None for make in TABLES.values())
    assert all(draw(name, record.results) is None for name in FIGURES)


def test_a_model_that_the_paper_has_in_another_table(tmp_path):
    """Table 3 is of LLaMA-2 and Vicuna, so that LLaMA-7B has ours alone there, and nothing in RESULTS.md."""
    record = Recorder(tmp_path, "7b")
    record("tables/dense", evaluation(12.0, 66.0))
    record("tables/sparsity-0.2", evaluation(15.0, 64.0), pruning())
    header, *rows = cells(TABLES["table3"](record.results))
    assert header[1] == "perplexity" and [row[0] for row in rows] == ["0%", "20%"]
    assert record.results.belongs_elsewhere(3) and not record.results.belongs_elsewhere(2)
    assert not Results(tmp_path, "smollm2").belongs_elsewhere(3)


def test_what_differs_between_runs_names_the_runs(record):
    record("tables/dense", evaluation(12.0, 66.0))
    fewer = evaluation(15.0, 64.0)
    fewer["results"]["model"]["zero_shot"] |= {"limit": 20, "apply_chat_template": True}
    record("tables/sparsity-0.2", fewer, pruning())
    smaller = pruning((16, 128), sparsity=0.33, corrected=12)
    smaller["settings"]["dtype"] = "bfloat16"
    record("tables/sparsity-0.33", evaluation(19.0, 61.0), smaller)
    lines = [line.removeprefix("- ") for line in TABLES["table2"](record.results).splitlines()]
    assert "Perplexity: 30 windows of 128 tokens, start token: none; run in float16 on a GPU." in lines
    assert "Tasks: lm-eval 1, the first 200 rows of each, no examples, start token: no (0%, 33%)." in lines
    assert "Tasks: lm-eval 1, the first 20 rows of each, no examples, start token: no, chat template (20%)." in lines
    assert "Calibration: 16 samples of 128 tokens (33%)." in lines
    assert "Pruned and saved in bfloat16 (33%)." in lines
    assert "Seed of the calibration set: 0." in lines
    assert "Calibration texts: bookcorpus + alpaca." in lines
    assert "MLPs with a linear correction: 6, of rank 0.03 of the hidden size (20%)." in lines


def test_a_limit_that_is_a_share_is_said_as_one():
    said = [limited(limit) for limit in (None, 1, 200, 0.1, 0.125)]
    assert said[:3] == ["all rows", "the first 1 rows of each", "the first 200 rows of each"]
    assert said[3:] == ["the first 10 % of the rows of each", "the first 12.5 % of the rows of each"]


@of_either
def test_table_5_is_of_one_number_of_corrected_mlps(record):
    for date, number in (("2026-01-01", 6), ("2026-01-02", 12), ("2026-01-03", 0)):
        for recipe in ("olica", "olica-svd"):
            settings = pruning(sparsity=0.33, recipe=recipe, mlp_num=number, corrected=number)
            record(f"tables/{recipe}_{number}", evaluation(20.0 + number, 60.0) | {"date": date}, settings)
    rows = cells(TABLES["table5"](record.results))[1:]
    perplexities = [row[:2] + [row[-1 if record.label == "smollm2" else 4]] for row in rows if row[2] == "perplexity"]
    assert [row[:2] for row in perplexities] == [[c, m] for c in ("without", "with") for m in ("SVD", "Fast-OND")]
    assert [row[2].split()[0] for row in perplexities] == ["20.00", "20.00", "32.00", "32.00"]


def test_a_misprinted_row_is_set_beside_nothing(tmp_path):
    record = Recorder(tmp_path, "7b")
    record("tables/dense", evaluation(12.6, 66.0))
    record("tables/sparsity-0.5", evaluation(50.0, 50.0), pruning(sparsity=0.5))
    markdown = TABLES["table7"](record.results)
    rows = cells(markdown)
    assert ["0%", "perplexity", "", f"12.60 ± {12.6 * ERROR:.2f}", ""] in rows
    assert ["50%", "perplexity", "49.39", f"50.00 ± {50 * ERROR:.2f}", "+0.61"] in rows
    assert "The paper: The row" in markdown


def test_figures_of_one_row_and_one_window_have_no_errors(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    for name, value in (("dense", 12.0), ("sparsity-0.2", 15.0)):
        measured = evaluation(value, 60.0)
        result = measured["results"]["model"]
        text = {"windows": 1, "standard_error": None, "nll_by_window": pack_floats(torch.ones(1))}
        result["perplexity"]["wikitext2"] |= text
        for task, metric in PAPER_METRIC.items():
            result["zero_shot"]["tasks"][task]["hits"] = {metric: "1"}
            del result["zero_shot"]["tasks"][task][f"{metric}_stderr"]
        result["zero_shot"]["averages"]["standard_error"] = None
        record(f"tables/{name}", measured, None if name == "dense" else pruning())
    dense, pruned = cells(TABLES["table2"](record.results))[1:]
    assert dense[1] == "12.00" and pruned[1:3] == ["15.00", "1.250"] and pruned[-1] == "+0.00"


def test_an_interrupted_run_is_named(record):
    record("tables/sparsity-0.25", evaluation(16.0, 63.0), pruning(sparsity=0.25) | {"went_on_after": [4]})
    record("tables/sparsity-0.33", evaluation(19.0, 61.0), pruning(sparsity=0.33))
    assert "Interrupted, so that its time is that of its last part (25%)." in TABLES["table1"](record.results)
    assert "Interrupted" not in TABLES["table2"](record.results), "which has no times"


def of_survey(**survey) -> dict:
    """A pruning by 25 % that has this to say of its survey, and took 2 minutes for it and 4 for the rest."""
    return pruning(sparsity=0.25) | {"survey": {"digest": "d", **survey}}


@pytest.mark.parametrize(
    ("pruned", "minutes", "note"),
    [
        (of_survey(layers_taken_up=0, seconds=120.0), "6.0", None),
        (pruning(sparsity=0.25) | {"survey": None}, "6.0", None),
        (
            of_survey(layers_taken_up=30, seconds=90.0),
            "5.5",
            "whose time is counted, its memory not (25%).",
        ),
        (
            of_survey(layers_taken_up=30, seconds=None),
            "6.0",
            "is not known, and in neither time nor peak memory (25%).",
        ),
        (of_survey(layers_taken_up=30), "6.0", "is not known, and in neither time nor peak memory (25%)."),
    ],
)
@of_either
def test_a_survey_that_was_taken_up_counts_as_if_it_had_been_made(record, pruned, minutes, note):
    record("tables/sparsity-0.25", evaluation(16.0, 63.0), pruned)
    record("tables/sparsity-0.33", evaluation(19.0, 61.0), pruning(sparsity=0.33))
    shown = TABLES["table1"](record.results)
    rows = {row[1]: row[-1 if record.label == "smollm2" else 3] for row in cells(shown)[1:] if row[0] == "25%"}
    assert rows["minutes"] == minutes
    assert (note in shown) if note else ("existing survey" not in shown)


def test_figures_want_matplotlib(record, monkeypatch):
    grid_of_records(record)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r'pip install "olica\[plots\]"'):
        FIGURES["figure4"](record.results)


def test_of_two_series_the_newer_is_drawn_and_shown(record):
    for year, sparsity in (("2026", 0.2), ("2027", 0.33)):
        dated = evaluation(100 * sparsity, 60.0) | {"date": f"{year}-01-01"}
        for number in (0, 4) if sparsity == 0.2 else (0, 8):
            record(f"figure3/{sparsity}-{number}", dated, pruning(sparsity=sparsity, mlp_num=number))
        record(f"tables/svd-{sparsity}", dated, pruning(sparsity=sparsity, recipe="olica-svd"))
    other = evaluation(5.0, 60.0, dtype="bfloat16") | {"date": "2026-01-01"}
    record("figure3/other-4", other, pruning((8, 128), sparsity=0.33, mlp_num=4, seed=7))
    left, _ = FIGURES["figure3"](record.results).figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[0, 33], [8, 33]])
    assert "at 33%" in left.get_title() and "at 33%" in TABLES["table5"](record.results)


def test_a_table_without_the_papers_figures_has_no_column_for_them():
    table = Table("Title", ["a"], notes=["note"])
    table.add(["x"], Measured(1234.5, digits=1))
    assert cells(table.markdown()) == [["a", "ours"], ["x", "1,234.5"]] and table.markdown().endswith("note")
    table.add(["y"], Measured(2.0, 0.5), 1.5)
    assert cells(table.markdown())[1:] == [["x", "", "1,234.5", ""], ["y", "1.50", "2.00 ± 0.50", "+0.50"]]


@pytest.mark.parametrize("table", [2, 3, 7])
def test_the_papers_means_are_those_of_its_columns(table):
    """To the rounding of the print, save those that the notes name."""
    stored = json.loads((PAPER / f"table{table}.json").read_text())
    whole = [row for row in stored["rows"] if all(row[task] is not None for task in TASKS)]
    off = [row for row in whole if abs(np.mean([row[task] for task in TASKS]) - row["mean"]) > 0.0151]
    named = {2: {("LLaMA-7B", "LoRAP", 0.2)}, 3: {("LLaMA-2-7B", "Olica", 0.3), ("LLaMA-2-7B", "LLM-Surgeon", 0.3)}}
    assert {(row["model"], row["method"], row["sparsity"]) for row in off} == named.get(table, set())
    assert len(whole) > 5 and stored["notes"] and stored["source"]


def grid_of_records(record) -> None:
    """What every figure needs."""
    for number in (0, 4, 8):
        settings = pruning(mlp_num=number, after=5_390_000_000 + number * 10**6)
        record(f"figure3/mlp_num-{number}", evaluation(20.0 - number, 60.0), settings)
        for ratio in (0.03, 0.15) if number else (0.03,):
            settings = pruning(mlp_num=number, ratio=ratio, after=5_390_000_000 + number * 10**6)
            record(f"figure4/mlp_num-{number}_ratio-{ratio}", evaluation(20.0 - number * ratio, 60.0), settings)
    for size in (32, 64):
        record(f"figure5/num_samples/{size}", evaluation(20.0, 60.0), pruning((size, 128)))
        record(f"figure5/seqlen/{size}", evaluation(20.0, 60.0), pruning((128, size)))
    for sparsity in (0.1, 0.4):
        for position, texts in enumerate([("bookcorpus", "alpaca"), ("c4", "alpaca")]):
            settings = pruning(sparsity=sparsity, texts=texts)
            record(f"figure6/mix-{position}_sparsity-{sparsity}", evaluation(20.0 + 99 * sparsity, 60.0), settings)
    values = {name: [3.0, 2.0, 1.0] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    folder = record.folder / record.label / "figure2"
    folder.mkdir()
    singular_values = {"environment": MACHINE, "layers": {"0": values, "31": values}}
    (folder / "singular_values.json").write_text(json.dumps(singular_values))


@pytest.mark.parametrize("name", FIGURES)
def test_figures_name_their_axes(record, name):
    grid_of_records(record)
    figure = FIGURES[name](record.results).figure
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert panels and all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in panels)
    assert draw(name, record.results)[0].stat().st_size > 5000


def test_figures_say_what_their_runs_have_in_common(record):
    grid_of_records(record)
    measured = "Perplexity: 30 windows of 128 tokens, start token: none; run in float16 on a GPU."
    tasks = "Tasks: lm-eval 1, the first 200 rows of each, no examples, start token: no."
    size, seed = "Calibration: 256 samples of 128 tokens.", "Seed of the calibration set: 0."
    texts = "Calibration texts: bookcorpus + alpaca."
    corrected = "MLPs with a linear correction: 6, of rank 0.03 of the hidden size."
    reserved = "The paper measured all windows and all rows."
    assert FIGURES["figure5"](record.results).notes[:-1] == [measured, tasks, seed, texts, corrected, reserved]
    assert FIGURES["figure6"](record.results).notes[:-1] == [measured, tasks, size, seed, corrected, reserved]
    for number in (1, 2):
        settings = pruning(sparsity=number / 10, texts=("c4",), corrected=6 * number)
        record(f"figure6/mix-3_sparsity-{number}", evaluation(20.0, 60.0) | {"date": "2027-01-01"}, settings)
    assert f"{corrected[:-1]} (10%, 40%)." in FIGURES["figure6"](record.results).notes


def test_figure_4_has_the_figures_of_the_records(record):
    grid_of_records(record)
    figure = FIGURES["figure4"](record.results).figure
    left, right = (axes for axes in figure.axes if axes.get_label() != "<colorbar>")
    np.testing.assert_allclose(left.images[0].get_array(), [[19.88, 19.76], [19.4, 18.8]])
    np.testing.assert_allclose(right.images[0].get_array(), 100 * np.array([[4e6, 8e6]] * 2) / 6.738e9)
    assert [text.get_text() for text in left.texts] == ["19.88", "19.76", "19.40", "18.80"]


def test_figure_3_has_the_figures_of_the_records(record):
    grid_of_records(record)
    left, right = FIGURES["figure3"](record.results).figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[0, 20], [4, 16], [8, 12]])
    assert [bar.get_height() for bar in right.patches] == [0.5, 0.25]


def test_what_is_shown_names_its_records_commits_and_machines(record):
    grid_of_records(record)
    record("tables/dense", evaluation(12.63, 66.09))
    record("tables/sparsity-0.2", evaluation(15.0, 63.0), pruning())
    made = "each beside the flags of its command. Commits: beef, cafe. Machines: a GPU, 8 threads, Linux."
    folder = (record.folder / record.label).as_posix()
    assert f"\n- Records: `{folder}/tables`, {made}" in TABLES["table2"](record.results)
    both = f"Records: `{folder}/figure5/num_samples`, `{folder}/figure5/seqlen`, {made}"
    assert FIGURES["figure5"](record.results).notes[-1] == both
    assert FIGURES["figure2"](record.results).notes == [f"Records: `{folder}/figure2`, {made.replace('beef, ', '')}"]


def test_prunings_by_another_commit_than_most_are_named(record):
    record("tables/dense", evaluation(12.63, 66.09))
    record("tables/sparsity-0.2", evaluation(15.0, 63.0), pruning())
    assert "Pruned at" not in TABLES["table2"](record.results)
    newer = pruning()
    newer["environment"] = newer["environment"] | {"git_commit": "f00d"}
    record("tables/sparsity-0.25", evaluation(16.0, 62.0), pruning())
    record("tables/sparsity-0.33", evaluation(20.0, 60.0), newer)
    assert "\n- Pruned at commit beef, but at f00d: 33%." in TABLES["table2"](record.results)


def test_a_run_with_the_former_shares_of_grouped_heads_says_so_and_joins_no_other(record):
    former = {"query": 0.5, "key": 0.0, "value_output": 0.05, "feed_forward": 0.1}
    record("tables/dense", evaluation(12.63, 66.09))
    record("tables/sparsity-0.2", evaluation(15.0, 63.0), pruning() | {"shares_removed": former})
    record("tables/sparsity-0.25", evaluation(16.0, 62.0), pruning(sparsity=0.25))
    words = "Recorded when `olica` had other shares for grouped heads, chosen on WikiText-2's test text: q 50%, "
    assert words + "k 0%, v and o 5%, MLPs 10% (20%)." in TABLES["table2"](record.results)
    former_run, run = (record.results.run(f"tables/sparsity-{sparsity}") for sparsity in ("0.2", "0.25"))
    assert former_run.recipe == "olica, former shares" and run.recipe == "olica"
    assert former_run.setup("sparsity") != run.setup("sparsity")
    grouped = pruning(recipe="olica-grouped") | {"shares_removed": former}  # whose keys do lose less than its queries
    record("tables/grouped", evaluation(15.0, 63.0), grouped)
    assert record.results.run("tables/grouped").recipe == "olica-grouped"


def test_a_model_has_its_full_name_in_headings(tmp_path):
    assert Results(tmp_path, "7b").title == "LLaMA-7B"
    assert Results(tmp_path, "smollm2").title == "SmolLM2-135M-Instruct, dequantised from Q4_1"
    assert Results(tmp_path, "mine").title == "mine"
    page = (PAPER.parents[1] / "RESULTS.md").read_text().splitlines()
    headings = {line.removeprefix("## ") for line in page if line.startswith("## ")}
    models = {Results(tmp_path, path.name).title for path in PAPER.parent.iterdir()}
    assert headings - models == {"Quality over size", "Choices and checks"} and headings & models
