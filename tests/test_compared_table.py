"""The table of what people compare with, from made-up records."""

import json

import pytest
from made_records import ERROR, MACHINE, Recorder, cells, evaluation, pruning

from olica.report import compared
from olica.report.runs import Results

ADAPTERS = {"rank": 8, "learning_rate": 5e-4}
LOOP = {"tokens": 8, "times": 3}


def measured(perplexity: float, length: int, **further) -> dict:
    record = evaluation(perplexity, 50.0)
    result = record["results"]["model"]
    result["perplexity"]["wikitext2"]["seqlen"] = length
    result |= {"model": {"name": "tiny", "source": "tiny", "description": "Tiny"}, "weight_bytes": 430_400_000}
    result |= {"file_bytes": 98_362_432, **further}
    del result["zero_shot"]
    return record


def chat(right: int, faultless: int) -> dict:
    totals = {"prompts": 20, "right": right, "stopped": 18, "go_round": 2, "faultless": faultless}
    return {"totals": totals, "new_tokens": 160, "loop": LOOP, "environment": MACHINE}


def write(record: Recorder, name: str, content: dict) -> None:
    path = record.folder / record.label / "compare" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def record(tmp_path) -> Recorder:
    """A dense model and one pruned at two sparsities, at both lengths: 20.0, 30.0 and 40.0, halves with 2048 tokens."""
    record = Recorder(tmp_path, "smollm2")
    for length, share in ((128, 1.0), (2048, 0.5)):
        record(f"compare/{length}/dense", measured(20 * share, length))
        for sparsity, perplexity in ((0.33, 40.0), (0.2, 30.0)):
            pruned = pruning(recipe="olica-plus", sparsity=sparsity, sparsity_of="layers")
            record(f"compare/{length}/sparsity-{sparsity}", measured(perplexity * share, length), pruned)
    return record


def test_pruned_models_stand_beside_the_dense_one(record):
    header, *rows = cells(compared.table(record.results))
    assert header[:5] == ["removed", "model", "parameters", "MB of weights", "minutes"]
    assert header[5:] == ["WikiText-2, 128 tokens", "WikiText-2, 2048 tokens"]
    assert [row[:2] for row in rows] == [
        ["0%", "dense"],
        ["20% of the layers", "olica-plus"],
        ["33% of the layers", "olica-plus"],
    ]
    assert rows[0][3:] == ["430.4", "", f"20.00 ± {20 * ERROR:.2f}", f"10.00 ± {10 * ERROR:.2f}"]
    assert rows[1][4:] == ["6.0", "30.00 (1.50 ± 0.00)", "15.00 (1.50 ± 0.00)"], "the same noise leaves no error"


def test_every_kind_has_its_row_and_its_note(record):
    training = {"seconds": 90.0, "adapters": ADAPTERS, "settings": {"epochs": 2, "seed": 0}}
    training |= {"samples": {"trained": [240, 128]}, "texts": {"sources": [{"name": "a/novels"}, {"name": "alpaca"}]}}
    pruned = pruning(recipe="olica-plus", sparsity=0.2, sparsity_of="layers")
    record("compare/128/lora/sparsity-0.2", measured(25.0, 128), pruned)
    write(record, "128/lora/sparsity-0.2/lora.json", training)
    quantised = {"library": "bitsandbytes 1", "kind": "nf4", "block": 64, "bytes": 5}
    record("compare/128/four-bits/dense", measured(22.0, 128, quantised=quantised, weight_bytes=173_100_000))
    smaller = {"name": "tinier", "source": "tinier", "description": "Tinier"}
    record("compare/128/smaller/dense", measured(35.0, 128, model=smaller))
    text = compared.table(record.results)
    rows = {(row[0], row[1]): row[2:] for row in cells(text)[1:]}
    assert [name for _, name in rows] == [
        "dense",
        "dense, in 4 bits",
        "tinier, dense",
        "olica-plus",
        "olica-plus, after LoRA",
        "olica-plus",
    ]
    assert rows["20% of the layers", "olica-plus, after LoRA"][2:] == ["7.5", "25.00 (1.25 ± 0.00)", ""]
    assert rows["0%", "dense, in 4 bits"][1:] == ["173.1", "", "22.00 (1.10 ± 0.00)", ""]
    assert rows["0%", "tinier, dense"][3] == f"35.00 ± {35 * ERROR:.2f}", "no ratio: its tokens may be others"
    assert "LoRA: 240 samples of 128 tokens (novels + alpaca), epochs: 2, rank 8, learning rate 0.0005" in text
    assert "4 bits: nf4 in blocks of 64 by bitsandbytes 1" in text
    assert "30 windows of 128 tokens" in text and "30 windows of 2048 tokens" in text
    assert text.count("`" + (record.folder / "smollm2/compare/2048").as_posix() + "`") == 1


def test_who_was_asked_has_cells_of_the_chat(record):
    write(record, "chat/dense/chat.json", chat(15, 11))
    write(record, "chat/sparsity-0.33/chat.json", chat(3, 2))
    text = compared.table(record.results)
    header, *rows = cells(text)
    assert header[-4:] == [f"chat: {words}" for words in compared.CHAT.values()]
    assert rows[0][-4:] == ["15 of 20", "18 of 20", "2 of 20", "11 of 20"]
    assert rows[1][-4:] == [""] * 4 and rows[2][-4] == "3 of 20"
    assert "at most 160 tokens" in text and "the same 8 tokens 3 times or more" in text
    assert f"`{(record.folder / 'smollm2/compare/chat').as_posix()}`" in text


@pytest.mark.parametrize("source", ["tiny.Q4_1.gguf", "tiny"])
def test_a_dense_model_that_was_rounded_before_is_said_to_be(record, source):
    path = record.folder / "smollm2/compare/128/dense/evaluation.json"
    content = json.loads(path.read_text())
    content["results"]["model"]["model"]["source"] = source
    path.write_text(json.dumps(content))
    said = "dequantised from a GGUF file of 98.4 MB (Tiny)" in compared.table(record.results)
    assert said == source.endswith(".gguf")


def test_a_dense_model_alone_is_no_table(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    assert compared.table(record.results) is None
    record("compare/128/dense", measured(20.0, 128))
    assert compared.table(record.results) is None
    assert compared.table(Results(tmp_path, "7b")) is None
