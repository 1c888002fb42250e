"""The table of vocabularies, from made-up records."""

import json
import math

from made_records import Recorder, cells, evaluation, pruning

from olica.report import vocabulary
from olica.report.runs import Results


def measured(total: int, layers: int, bits: float) -> dict:
    record = evaluation(20.0, 50.0)
    record["results"]["model"]["parameters"] = {"total": total, "decoder_layers": layers}
    record["results"]["model"]["perplexity"]["wikitext2"] |= {
        "bits_per_byte": bits,
        "predictions": 1000,
        "bytes": 4000,
        "standard_error": 0.5,
    }
    return record


def test_models_of_a_size_are_beside_each_other(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    record("vocabulary/all/dense", measured(1000, 700, 1.0))
    record("vocabulary/all/sparsity-0.2", measured(800, 500, 1.5), pruning(sparsity=0.2))
    record("vocabulary/90/dense", measured(950, 700, 1.05))
    record("vocabulary/90/sparsity-0.2", measured(801, 551, 1.4), pruning(sparsity=0.157))
    record("vocabulary/100/dense", measured(970, 700, 1.01))
    for size in (90, 100):
        told = {"texts": [{"name": "data/alpaca_6k.jsonl.gz"}, {"name": "c4"}], "share_of_text_gone": size / 10_000}
        (tmp_path / f"smollm2/vocabulary/{size}/olica_vocabulary.json").write_text(json.dumps(told))
    stopped = tmp_path / "smollm2/vocabulary/80/dense"
    stopped.mkdir(parents=True)
    (stopped.parent / "olica_vocabulary.json").write_text("{}")
    other = measured(700, 400, 2.0)
    other["results"]["model"]["perplexity"]["c4"] = other["results"]["model"]["perplexity"].pop("wikitext2")
    record("vocabulary/100/sparsity-0.3", other, pruning(sparsity=0.3))
    text = vocabulary.table(record.results)
    assert "The 90 tokens are those that Alpaca + C4 have most; 0.90% of theirs are gone." in text
    header, *rows = cells(text)
    assert header == ["removed", "tokens", "layers", "parameters", "WikiText-2, bits per byte"]
    error = f" ± {0.5 / 20 * 1000 / 4000 / math.log(2):.3f}"
    assert rows == [
        ["0.0%", "all", "100.0%", "1,000", f"1.000{error}"],
        ["3.0%", "100", "100.0%", "970", f"1.010{error}"],
        ["5.0%", "90", "100.0%", "950", f"1.050{error}"],
        ["20.0%", "all", "71.4%", "800", f"1.500{error}"],
        ["19.9%", "90", "78.7%", "801", f"1.400{error}"],
    ]


def test_a_single_window_has_no_error():
    one = measured(1, 1, 1.25)["results"]["model"]["perplexity"]["wikitext2"] | {"standard_error": None}
    assert vocabulary.bits_per_byte(one) == "1.250"


def test_without_runs_there_is_no_table(tmp_path):
    assert vocabulary.table(Results(tmp_path, "smollm2")) is None
