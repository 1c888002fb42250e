"""The table of calibration texts, from made-up records."""

from made_records import Recorder, cells, evaluation, pruning

from olica.report import texts
from olica.report.runs import Results


def test_each_recipe_has_its_best_text_in_bold(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    record("texts/dense", evaluation(20.0, 50.0))
    for recipe, factor in (("olica", 2), ("olica-plus", 1)):
        for name, sources, perplexity in (("all", 2, 25.0), ("web", 1, 30.0), ("code", 1, 50.0)):
            pruned = pruning(recipe=recipe)
            pruned["calibration"] |= {"sources": [{"name": f"text{n}.jsonl"} for n in range(sources)]}
            record(f"texts/{name}_{recipe}", evaluation(factor * perplexity, 50.0), pruned)
    header, *rows = cells(texts.table(record.results))
    assert header == ["recipe", "calibrated on", "WikiText-2"]
    assert [row[:2] for row in rows] == [
        ["dense", ""],
        *([recipe, name] for recipe in ("olica", "olica-plus") for name in ("code", "web", "all")),
    ]
    assert [row[2].strip("*")[:4] for row in rows] == ["20.0", "5.00", "3.00", "2.50", "2.50", "1.50", "1.25"]
    assert [row[2].startswith("**") for row in rows] == [False, False, False, True, False, False, True]


def test_a_run_by_other_windows_is_left_out(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    record("texts/dense", evaluation(20.0, 50.0))
    record("texts/web_olica", evaluation(30.0, 50.0), pruning(recipe="olica"))
    other = evaluation(21.0, 50.0)
    other["results"]["model"]["perplexity"]["wikitext2"] |= {"windows": 29, "fingerprint": "g"}
    record("texts/code_olica", other, pruning(recipe="olica"))
    _, _, row = cells(texts.table(record.results))
    assert row[:2] == ["olica", "web"] and row[2].startswith("**1.50")


def test_without_runs_there_is_no_table(tmp_path):
    assert texts.table(Results(tmp_path, "smollm2")) is None
