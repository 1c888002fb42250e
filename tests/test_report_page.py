"""RESULTS.md as scripts/report.py puts it together."""

from pathlib import Path

import pytest
from called import load
from made_records import Recorder, evaluation, pruning

from olica.report.runs import Results, text_name


@pytest.fixture
def report():
    return load("scripts/report.py")


def test_contents_lead_to_headings_that_stand_twice(report):
    parts = ["## Quality, over size\n\n### Cost at 20 %", "## Another `one`: Q4_1\n\n### Cost at 20 %\n#### Not these"]
    assert report.contents(parts).splitlines() == [
        "- [Quality, over size](#quality-over-size)",
        "  - [Cost at 20 %](#cost-at-20-)",
        "- [Another `one`: Q4_1](#another-one-q4_1)",
        "  - [Cost at 20 %](#cost-at-20--1)",
    ]


def test_models_of_the_paper_come_first_and_unknown_ones_last(report):
    assert report.in_order(["zzz", "smollm2", "aaa", "13b", "7b"]) == ["7b", "13b", "smollm2", "aaa", "zzz"]


def test_the_page_begins_with_what_says_which_recipe_to_take(report, tmp_path):
    record = Recorder(tmp_path, "smollm2")
    record("methods/dense", evaluation(10.0, 60.0))
    for recipe, value in (("olica", 20.0), ("olica-plus", 15.0)):
        made = pruning(sparsity=0.2, recipe=recipe, sparsity_of="model") | {"measured_sparsity_of_layers": 0.25}
        record(f"methods/paper/{recipe}", evaluation(value, 50.0), made)
    record("tables/dense", evaluation(12.0, 66.0))
    record("tables/sparsity-0.2", evaluation(15.0, 64.0), pruning())
    page = report.page(tmp_path, [Results(tmp_path, "smollm2")], tmp_path / "RESULTS.md")
    headings = [line.split(",")[0] for line in page.splitlines() if line.startswith("#")]
    assert headings == [
        "# Results",
        "## Quality over size",
        "## SmolLM2-135M-Instruct",
        "### Methods beside each other",
        "### Share of Olica's gap",
        "### Cost",
        *(f"### Table {number}: perplexity on WikiText-2 and accuracy in percent" for number in (2, 3)),
    ]
    assert (tmp_path / "methods.png").is_file() and "](methods.png)" in page


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("wikitext2", "WikiText-2"),
        ("data/c4_report.jsonl", "C4"),
        ("there/alpaca_6k.jsonl.gz", "Alpaca"),
        ("my.text.jsonl", "my"),
        ("pydoc", "pydoc"),
    ],
)
def test_texts_have_the_names_of_tables(text, name):
    assert text_name(text) == name == text_name(str(Path("elsewhere") / text))
