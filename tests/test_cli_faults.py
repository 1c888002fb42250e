"""Bad weights, full disks and too little memory: pruning ends in a sentence and leaves nothing that is half done."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import load_weights, raising, refused
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_commands import files_in, fill_with_rows, prune

from olica import run
from olica.settings import Settings

fill_here = fill_with_rows


def test_bad_weights_leave_nothing_behind(here, capsys):
    weights = load_file("tiny/model.safetensors")
    bad = {name: tensor.clone() for name, tensor in weights.items()}
    bad["model.layers.0.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(bad, "tiny/model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, prune, "--save_dir=out")
    assert "--base_model tiny" in message and "model.layers.0.mlp.down_proj.weight" in message
    bad.pop("model.layers.0.mlp.down_proj.weight")
    save_file(bad, "tiny/model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights" in refused(capsys, prune, "--save_dir=out")
    assert not Path("out").exists()


@pytest.mark.parametrize("window", [12.5, "many", [7]])
def test_a_checkpoint_that_would_not_load_is_seen_before_layers_are_pruned(here, capsys, monkeypatch, window):
    """LLaMA has no sliding window, so nothing looks at the setting until a cache is made."""
    settings = json.loads(Path("tiny/config.json").read_text())
    Path("tiny/config.json").write_text(json.dumps(settings | {"sliding_window": window}))
    monkeypatch.setattr(run, "survey_layers", lambda *arguments: pytest.fail("the survey has begun"))
    message = refused(capsys, prune, "--save_dir=out")
    assert "--base_model" in message and "can be pruned and run" in message
    assert not Path("out").exists()


def test_a_full_disk_is_seen_before_the_work(here, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    message = refused(capsys, prune, "--save_dir=out")
    assert "--save_dir" in message and "free" in message
    assert not Path("out").exists()


def test_a_ridge_that_is_too_weak(here, capsys):
    message = refused(capsys, prune, "--percdamp=1e-14", "--num_samples=1", "--seqlen=8", "--save_dir=out")
    assert all(word in message for word in ("--percdamp 1e-14", "layer 0", "singular"))
    assert not Path("out").exists()


@cache
def undisturbed() -> tuple[dict[str, torch.Tensor], set[str]]:
    """The weights and the files of a run of `here` that nobody disturbs: the same in every test."""
    prune("--save_dir=undisturbed")
    weights = load_weights("undisturbed/tiny_sparsity-0.2")
    files = files_in(Path("undisturbed"))
    shutil.rmtree("undisturbed")
    return weights, files


@pytest.mark.parametrize("error", [SafetensorError, OSError])
@pytest.mark.parametrize(
    "writer", ["olica.outputs.journal.save_tensors", "olica.outputs.checkpoint.custom_object_save"]
)
def test_a_full_disk_stops_the_run_and_the_same_command_goes_on(here, capsys, monkeypatch, error, writer):
    expected, files = undisturbed()
    with monkeypatch.context() as patched:
        patched.setattr(writer, raising(error("disk full")))
        message = refused(capsys, prune, "--save_dir=out")
    assert all(word in message for word in ("--save_dir", "disk full", "same command"))
    assert not Path("out/tiny_sparsity-0.2").exists()
    assert prune("--save_dir=out") == 0
    found = load_weights("out/tiny_sparsity-0.2")
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
    assert files_in(here / "out") == files


@pytest.mark.parametrize("largest", ["5GB", "200KB", "1"])
def test_the_disk_has_to_hold_hidden_states_or_a_file_of_weights_too(here, capsys, monkeypatch, largest):
    """Two states, one of which takes the place of the other; or the file that is made of what was finished."""
    states = 6 * 32 * 64 * 4
    prune("--save_dir=out")
    planned = 4 * json.loads(Path("out/tiny_sparsity-0.2/olica_run.json").read_text())["parameters"]["planned"]
    more = {"5GB": planned, "200KB": 200_000, "1": 2 * states}[largest]

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - size, size))

    flags = ["--save_dir=other", f"--max_shard_size={largest}"]
    free(planned + more - 1)
    assert "make room or give another --save_dir" in refused(capsys, prune, *flags)
    free(planned + more)
    assert prune(*flags) == 0


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("olica.pruning.layers.cut", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        ("olica.pruning.layers.propagate", MemoryError()),
    ],
)
def test_memory_that_runs_out_names_the_flags(here, capsys, monkeypatch, place, error):
    with monkeypatch.context() as patched:
        patched.setattr(place, raising(error))
        message = refused(capsys, prune, "--save_dir=out")
        assert message.startswith("out of memory (") and "a --dtype of half the width or" in message
        assert "--cache_dev" not in message, "hidden states are on the CPU already"
    assert prune("--save_dir=out") == 0


def test_advice_on_memory_goes_by_where_it_ran_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = Settings(cache_dev="auto")
    assert "--cache_dev cpu" in run.memory_advice(gpu, of_host=False)
    assert "--device cpu" in run.memory_advice(gpu, of_host=False)
    assert "--cache_dev" not in run.memory_advice(gpu, of_host=True)
    assert "--device" not in run.memory_advice(gpu, of_host=True), "the host would have to hold more"
    gpu = Settings(cache_dev="cpu")
    assert "--cache_dev cuda" in run.memory_advice(gpu, of_host=True)
