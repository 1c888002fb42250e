"""Other people's pruners, whose packages are not needed here: what is refused, what is recorded, and the table."""

import json
from pathlib import Path

import pytest
import torch
from called import call
from conftest import make_llama, refused, save_tiny
from made_records import Recorder, cells, evaluation, pruning
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.peers import check_size, failure
from benchmarks.peers import prune as by_peer
from olica.report import peers
from olica.report.runs import Results


@pytest.fixture
def dense(tmp_path) -> Path:
    save_tiny(tmp_path / "dense", num_key_value_heads=2, tie_word_embeddings=True)
    return tmp_path / "dense"


def thin(dense: Path, width: int, folder: Path) -> int:
    """Write the dense model with the first `width` channels of every MLP; its number of parameters."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    for layer in model.model.layers:
        by_peer.keep_channels(layer.mlp, torch.arange(width))
    model.config.intermediate_size = width
    model.save_pretrained(folder)
    return model.num_parameters()


def check(folder: Path, dense: Path, sparsity: float, *more: str) -> None:
    flags = ["--checkpoint", str(folder), "--base_model", str(dense), "--sparsity", str(sparsity), *more]
    call(check_size, *flags)


def test_a_checkpoint_of_another_size_is_refused(dense, tmp_path, capsys):
    whole = AutoModelForCausalLM.from_pretrained(dense).num_parameters()
    width = AutoModelForCausalLM.from_pretrained(dense).config.intermediate_size
    left = thin(dense, width // 2, tmp_path / "half")
    check(tmp_path / "half", dense, 1 - left / whole)
    assert f"{left:,} parameters, +0.00%" in capsys.readouterr().out
    for sparsity in (1 - 1.01 * left / whole, 1 - 0.99 * left / whole):
        words = f"has {left:,} parameters, not the {round((1 - sparsity) * whole):,}"
        assert words in refused(capsys, check, tmp_path / "half", dense, sparsity)
    check(tmp_path / "half", dense, 1 - 1.01 * left / whole, "--tolerance", "0.02")


def test_the_layers_alone_can_be_counted(dense, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(dense)
    whole = sum(weight.numel() for weight in model.model.layers.parameters())
    thin(dense, model.config.intermediate_size // 2, tmp_path / "half")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    left = sum(weight.numel() for weight in pruned.model.layers.parameters())
    check(tmp_path / "half", dense, 1 - left / whole, "--sparsity_of", "layers")
    with pytest.raises(SystemExit):
        check(tmp_path / "half", dense, 1 - left / whole)
    assert f"{left:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(("sparsity", "width"), [(0.2, 1017), (0.3, 758), (0.33, 680)])
def test_the_widths_of_smollm2(sparsity, width):
    with torch.device("meta"):
        model = make_llama(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    assert model.num_parameters() == 134_515_008
    assert by_peer.width_for(model, sparsity, "model") == width
    assert abs((3 * 30 * 576 * (1536 - width)) / 134_515_008 - sparsity) < 3 * 30 * 576 / 134_515_008 / 2
    with pytest.raises(ValueError, match="MLPs alone cannot lose 80%"):
        by_peer.width_for(model, 0.8, "model")


def test_what_stays_of_an_mlp_is_the_channels_that_were_kept():
    mlp, x = make_llama().model.layers[0].mlp, torch.randn(2, 5, make_llama().config.hidden_size)
    kept = torch.tensor([1, 4, 7])
    hidden = (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[..., kept]
    expected = hidden @ mlp.down_proj.weight[:, kept].T
    by_peer.keep_channels(mlp, kept)
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features) == (3, 3)


def first_channels(model, task):
    assert [len(batch) for batch in task.batches()] == [4, 2]
    for layer in model.model.layers:
        by_peer.keep_channels(layer.mlp, torch.arange(task.width))
    model.config.intermediate_size = task.width
    return model


def test_a_peer_leaves_a_plain_model_and_a_record(dense, tmp_path, monkeypatch):
    """With a peer made up of a package that is there: the first channels of every MLP stay."""

    monkeypatch.setitem(by_peer.PEERS, "optipfair-data", by_peer.Peer("safetensors", first_channels, sees_text=True))
    save_file({by_peer.IDS: torch.arange(60).view(6, 10)}, tmp_path / "ids.safetensors")
    flags = ["optipfair-data", "--dense", str(dense), "--tokens", str(tmp_path / "ids.safetensors")]
    flags += ["--sparsity", "0.2", "--batch_size", "4", "--output_path", str(tmp_path / "pruned")]
    by_peer.main(by_peer.build_parser().parse_args(flags))
    check(tmp_path / "pruned", dense, 0.2, "--tolerance", "0.02")
    record = json.loads((tmp_path / "pruned/peer_run.json").read_text())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert record["parameters"]["after"] == pruned.num_parameters() < record["parameters"]["before"]
    assert record["calibration"]["ids"] == [6, 10] and record["calibration"]["sources"][0]["name"] == "ids.safetensors"
    assert record["package"].startswith("safetensors ") and list(record["stages"]) == ["read", "prune", "write"]
    assert all(stage["host_bytes"] > 10**8 for stage in record["stages"].values())


def test_other_widths_than_were_asked_for_are_an_error():
    model = make_llama()
    width = model.config.intermediate_size
    by_peer.check_widths(model, width)
    by_peer.keep_channels(model.model.layers[0].mlp, torch.arange(3))
    with pytest.raises(ValueError, match=f"asked for MLPs of {width} channels, got 3, {width}"):
        by_peer.check_widths(model, width)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("Traceback\n  File x\nImportError: no name (there/lib/y.py)\n", "ImportError: no name (lib/y.py)"),
        ("Collecting\nERROR: No matching distribution\n[notice] a newer pip\n", "ERROR: No matching distribution"),
        ("", "it ended without a word"),
    ],
)
def test_a_failure_is_recorded_with_its_last_words(tmp_path, log, words):
    (tmp_path / "log").write_text(log.replace("there", str(tmp_path / "environment")))
    flags = ["--peer", "a-b", "--sparsity", "0.2", "--packages", "torch==1 a==2", "--step", "install"]
    flags += ["--log", str(tmp_path / "log"), "--hide", str(tmp_path), str(tmp_path / "environment")]
    call(failure, *flags, "--output_path", str(tmp_path / "failure.json"))
    record = json.loads((tmp_path / "failure.json").read_text())
    assert record["error"] == words and record["packages"] == ["torch==1", "a==2"] and record["step"] == "install"


def by(peer: str, sparsity: float = 0.2, text: bool = True) -> dict:
    """A record of benchmarks/peers/prune.py."""
    stage = {"minutes": 0.5, "host_bytes": 2 * 10**9, "device_bytes": None}
    return {
        "settings": {"recipe": peer, "sparsity": sparsity, "sparsity_of": "model"},
        "package": "pack 1.0",
        "calibration": {"ids": [256, 128], "sources": [{"name": "ids.safetensors"}]} if text else None,
        "stages": {"prune": stage, "write": stage},
        "environment": {"device": "cpu", "packages": {"torch": "2.0", "transformers": "5.0", "pack": "1.0"}},
    }


def sized(perplexity: float, mean: float, parameters: int) -> dict:
    measured = evaluation(perplexity, mean)
    measured["results"]["model"]["parameters"]["total"] = parameters
    return measured


@pytest.fixture
def record(tmp_path) -> Recorder:
    record = Recorder(tmp_path, "smollm2")
    record("peers_as_shipped/dense", sized(20.0, 50.0, 1000))
    record("peers_as_shipped/a-data_sparsity-0.2", sized(60.0, 45.0, 800), by("a-data"))
    record("peers_as_shipped/a-static_sparsity-0.2", sized(80.0, 44.0, 801), by("a-static", text=False))
    record("peers_as_shipped/long/dense", sized(10.0, 50.0, 1000))
    record("peers_as_shipped/long/a-data_sparsity-0.2", sized(25.0, 45.0, 800), by("a-data"))
    return record


def fail(record: Recorder, name: str, sparsity: float) -> None:
    folder = record.folder / record.label / f"peers_as_shipped/{name}_sparsity-{sparsity}"
    folder.mkdir(exist_ok=True)
    failed = {"peer": name, "sparsity": sparsity, "packages": ["c==3"], "step": "install", "error": "no space"}
    (folder / "failure.json").write_text(json.dumps(failed))


def test_the_table_has_peers_failures_and_ours(record):
    fail(record, "c-d", 0.2)
    ours = pruning(texts=["ids.safetensors"], recipe="olica-plus", after=800, sparsity_of="model")
    ours["environment"]["olica"] = "9.9"
    record("peers_as_shipped/olica-plus_sparsity-0.2_seed-0", sized(30.0, 49.0, 800), ours)
    ours["settings"]["seed"] = 1
    record("peers_as_shipped/olica-plus_sparsity-0.2_seed-1", sized(36.3, 48.0, 799), ours)
    record("peers_as_shipped/long/olica-plus_sparsity-0.2_seed-0", sized(15.0, 0, 800), ours)
    text = peers.table(record.results)
    header, dense, *rows = cells(text)
    assert header[:6] == ["removed", "pruner", "version", "tokens", "parameters", "WikiText-2"]
    assert header[-2:] == ["seconds", "peak memory, GB"]
    assert dense[1] == "dense" and dense[4] == "1,000" and dense[5].startswith("20.00 ±")
    assert [row[1] for row in rows] == ["a-data", "a-static", "c-d", "olica-plus"]
    long = header.index("WikiText-2, long windows")
    data, static, failed, plus = rows
    assert data[2:5] == ["pack 1.0", "32,768", "800"] and data[5] == "3.00 ± 0.00" and data[long] == "2.50 ± 0.00"
    assert data[header.index("PIQA, %")] == "+0.00 ± 0.00" and data[-2:] == ["60", "2.00"]
    assert static[3] == "none" and static[5] == "4.00 ± 0.00" and static[long] == ""
    assert failed[:5] == ["20%", "c-d", "c==3", "", "not run"] and not any(failed[5:])
    assert plus[2:6] == ["olica 9.9", "32,768", "800", "1.65 ± 0.00, 1.50 to 1.81"] and plus[long] == "1.50 ± 0.00"
    assert plus[-2:] == ["360", "3.00"]
    assert "Not run: c-d, 20%; step install: `no space`" in text
    assert "pack 1.0 ran with torch 2.0, transformers 5.0." in text
    assert "Calibration: 256 samples of 128 tokens, of ids.safetensors." in text


def test_without_the_dense_model_or_any_peer_there_is_no_table(tmp_path):
    record = Recorder(tmp_path, "smollm2")
    assert peers.table(Results(tmp_path, "smollm2")) is None
    record("peers_as_shipped/dense", evaluation(20.0, 50.0))
    assert peers.table(record.results) is None
    fail(record, "c-d", 0.33)
    assert "not run" in peers.table(record.results)


def test_a_peer_that_failed_before_it_ran_is_shown_once(record):
    fail(record, "a-data", 0.2)
    names = [row[1] for row in cells(peers.table(record.results))]
    assert names.count("a-data") == 1
