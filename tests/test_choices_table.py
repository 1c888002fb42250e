"""The tables of what olica-plus is made of, from made-up records."""

import json

import pytest
from made_records import MACHINE, cells, evaluation

from olica.report import choices


def measured(value: float) -> dict:
    text = evaluation(value, 50.0)["results"]["model"]["perplexity"]["wikitext2"] | {"standard_error": 0.5}
    return {"some/validation.jsonl": {name: text[name] for name in text if name not in ("fingerprint", "bos")}}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / choices.FOLDER
    made.mkdir(parents=True)
    record = {
        "settings": {"sparsity": 0.2, "dtype": "float32"},
        "model": {"description": "Tiny"},
        "calibration": {"ids": [96, 128], "sources": [{"name": "data/novels.jsonl"}, {"name": "alpaca"}]},
        "dense": {"parameters": {"total": 1000}, "perplexity": measured(20.0)},
        "points": [
            {"step": "before", "parameters": {"total": 801}, "perplexity": measured(50.0)},
            {"step": "+ a part", "parameters": {"total": 799}, "perplexity": measured(40.0)},
        ],
        "environment": MACHINE,
    }
    (made / "ablation_tiny.json").write_text(json.dumps(record))
    record = {
        "settings": {"share": 0.7, "num_samples": 128},
        "model": {"description": "Tiny"},
        "texts": {"data/novels.jsonl": {}, "pysource": {}, "alpaca": {}},
        "error_left": [
            {
                "fitted_to": ["data/novels.jsonl"],
                "ridge": 0.3,
                "measured_on": {"data/novels.jsonl": 0.5, "pysource": 1.25, "alpaca": 1.0},
            },
            {
                "fitted_to": ["data/novels.jsonl", "pysource"],
                "ridge": 1.0,
                "measured_on": {"data/novels.jsonl": 0.4, "pysource": 0.4, "alpaca": 0.4},
            },
            {
                "fitted_to": ["data/novels.jsonl", "pysource", "alpaca"],
                "ridge": 1.0,
                "measured_on": {"data/novels.jsonl": 0.6, "pysource": 0.75, "alpaca": 0.8},
            },
        ],
        "environment": MACHINE,
    }
    (made / "refit_texts_tiny.json").write_text(json.dumps(record))
    return tmp_path


def test_parts_stand_beside_the_dense_model_and_the_step_before(folder):
    ablation, _ = choices.tables(folder)
    header, dense, first, second = cells(ablation)
    assert header == ["with", "parameters", "validation", "validation, by this part"]
    assert dense[:3] == ["dense", "1,000", "20.00 ± 0.50"]
    assert first == ["before", "801", "2.50 ± 0.00", ""]
    assert second == ["+ a part", "799", "2.00 ± 0.00", "-20.0 ± 0.0 %"]
    assert "20 % of the whole model gone, 96 samples of 128 tokens of novels + Alpaca; 30 windows" in ablation
    assert "`benchmarks/ablation.py` at commit cafe on a GPU, 8 threads." in ablation


def test_refits_to_one_text_and_to_all_stand_by_ridge(folder):
    _, refits = choices.tables(folder)
    assert cells(refits) == [
        ["fitted to", "ridge", "novels", "pysource", "Alpaca"],
        ["novels", "0.3", "0.500", "1.250", "1.000"],
        ["novels + pysource + Alpaca", "1", "0.600", "0.750", "0.800"],
    ]
    assert "70 % of the channels stay" in refits and "128 samples of each text" in refits


def test_a_model_that_is_known_has_its_known_name(folder):
    made = folder / choices.FOLDER
    (made / "ablation_tiny.json").rename(made / "ablation_smollm2.json")
    ablation, refits = choices.tables(folder)
    assert ablation.startswith("### Parts of olica-plus, one by one: SmolLM2-135M-Instruct, dequantised from Q4_1\n")
    assert refits.startswith("### Fitted to one text, measured on another: Tiny\n")


def test_without_records_there_are_no_tables(tmp_path):
    assert choices.tables(tmp_path) == []
