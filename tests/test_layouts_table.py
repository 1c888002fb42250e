"""The table of layouts, from made-up records."""

import json

import pytest
from made_records import MACHINE, Recorder, cells, evaluation, pruning

from olica.report import layouts
from olica.report.runs import Results


def measured(perplexity: float, name: str) -> dict:
    record = evaluation(perplexity, 50.0)
    record["settings"] |= {"checkpoint": name, "base_model": None}
    return record


@pytest.fixture
def record(tmp_path) -> Recorder:
    record = Recorder(tmp_path, "smollm2")
    record("layouts/dense", measured(20.0, "smollm2"))
    for layout, perplexity, widths in (("olica", 30.0, [7, 9]), ("stock", 50.0, [8, 8]), ("deci", 40.0, [6, 10])):
        pruned = pruning(recipe="olica-plus", layout=layout) | {"plan": [{"intermediate_size": w} for w in widths]}
        record(f"layouts/{layout}_sparsity-0.2", measured(perplexity, f"pruned/smollm2_{layout}/"), pruned)
    return record


def write(record: Recorder, name: str, **content) -> None:
    (record.folder / record.label / "layouts" / name).write_text(json.dumps(content | {"environment": MACHINE}))


def speed(ratio: float) -> dict:
    return {stage: {"ratio": ratio, "tokens_per_s": 1500 / ratio} for stage in ("prefill", "decode")}


def test_layouts_stand_in_order_beside_the_dense_model(record):
    models = {"smollm2": speed(1), "pruned/smollm2_olica": speed(0.9), "pruned/smollm2_stock": speed(0.8)}
    settings = {"prompt_tokens": "128", "new_tokens": "32", "repeats": "9"}
    write(record, "generation_speed.json", models=models, settings=settings)
    files = [{"file": "smollm2.gguf"} | speed(1), {"file": "smollm2_stock.gguf"} | speed(0.7)]
    versions = {"llama.cpp": "v7"}
    write(record, "llama_cpp_speed_f16.json", files=files, settings=settings | {"threads": 1}, read_by=versions)
    text = layouts.table(record.results)
    header, *rows = cells(text)
    assert header[-4:] == [
        f"{stage}, {engine}" for engine in ("transformers", "llama.cpp, float16") for stage in layouts.STAGES
    ]
    assert [row[1] for row in rows] == ["dense", "olica", "stock", "deci"]
    assert [row[3] for row in rows] == ["", "7 to 9", "8", "6 to 10"]
    assert [row[4][:4] for row in rows] == ["20.0", "1.50", "2.50", "2.00"]
    assert [row[5] for row in rows] == ["1,500 tokens/s", "0.90", "0.80", ""]
    assert [row[-1] for row in rows] == ["1,500 tokens/s", "", "0.70", ""]
    assert "transformers: 128 tokens, continued by 32, medians of 9 rounds, threads: 8." in text
    assert "llama.cpp, float16 (v7): 128 tokens, continued by 32, medians of 9 rounds, threads: 1." in text


def test_without_speeds_or_runs_there_is_less(record, tmp_path):
    header, *rows = cells(layouts.table(record.results))
    assert header == ["removed", "layout", "parameters", "channels", "WikiText-2"] and len(rows) == 4
    assert layouts.table(Results(tmp_path, "7b")) is None
