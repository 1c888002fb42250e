import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import allocate, make_llama, pruning_options
from safetensors.torch import save_file
from transformers import LlamaConfig

from olica.machine import BatchSize
from olica.methods.recipes import OLICA, RECIPES
from olica.pruning import memory
from olica.pruning.memory import MOST_TOKENS, Task, expected_peaks, fit_batch_size

ROOT = Path(__file__).parents[1]


@pytest.fixture
def task() -> Task:
    config = make_llama(hidden_size=1024, intermediate_size=2048, num_attention_heads=16, num_hidden_layers=1).config
    total = 10**9
    plan, _ = allocate("olica", config, 13 * 10**6, 0.2, 3.0)
    return Task(config, total, plan[0], (256, 128), 4, OLICA, is_streamed=True)


def test_expected_peaks_grow_with_what_they_should(task):
    options = pruning_options()
    base = expected_peaks(task, options)
    assert base["device_bytes"] is None
    whole = expected_peaks(replace(task, is_streamed=False), options)
    assert whole["host_bytes"] > base["host_bytes"] + 3.9e9
    more = expected_peaks(replace(task, ids_shape=(512, 128)), options)
    assert more["host_bytes"] - base["host_bytes"] == pytest.approx(256 * 128 * 1024 * 4, rel=0.1)
    assert expected_peaks(replace(task, itemsize=2), options)["host_bytes"] < base["host_bytes"]
    larger = expected_peaks(task, pruning_options(batch_size=BatchSize(64)))
    assert larger["host_bytes"] > base["host_bytes"]


def test_a_gpu_takes_the_work_and_maybe_the_hidden_states(task, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)  # there need not be one
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    states = 256 * 128 * 1024 * 4
    on_device = expected_peaks(task, pruning_options(device=gpu, cache_device=gpu))
    on_host = expected_peaks(task, pruning_options(device=gpu, cache_device=cpu))
    assert on_device["device_bytes"] - on_host["device_bytes"] == states
    assert on_host["host_bytes"] < expected_peaks(task, pruning_options())["host_bytes"]


@pytest.mark.parametrize("free", [10**12, 2 * 10**9, 10**8, 10**6])
def test_auto_takes_what_fits(task, monkeypatch, free):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    options = pruning_options(batch_size=BatchSize(1))
    resident = memory.psutil.Process().memory_info().rss
    fit_batch_size(task, options)
    size = options.batch_size.size
    assert size & (size - 1) == 0 and size * 128 <= MOST_TOKENS["cpu"]

    def taken(batch_size: int) -> int:
        return expected_peaks(task, pruning_options(batch_size=BatchSize(batch_size)))["host_bytes"] - resident

    assert size == 1 or taken(size) < free
    assert 2 * size * 128 > MOST_TOKENS["cpu"] or taken(2 * size) > 0.7 * free


def test_the_recipe_decides_what_is_summed(task):
    """The paper's survey sums products of all channels with all, the code's does not."""
    released, paper = (
        memory.estimate(replace(task, recipe=RECIPES[name]), pruning_options()) for name in ("olica", "olica-paper")
    )
    channels = task.config.intermediate_size
    assert paper.survey - released.survey > 4 * channels**2
    without = memory.estimate(task, pruning_options(mlp_num=0))
    assert released.prune > without.prune and released.survey - without.survey > 4 * task.config.hidden_size**2


def test_thirty_billion_parameters_fit_a_small_gpu(monkeypatch):
    """The sizes of LLaMA-30B and 7B in half precision, with hidden states on the host."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)  # there need not be one
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for sizes, total, most in (((6656, 17920, 52, 60), 32.5e9, 6e9), ((4096, 11008, 32, 32), 6.74e9, 3e9)):
        hidden, channels, heads, layers = sizes
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=channels, num_attention_heads=heads, num_hidden_layers=layers
        )
        plan, _ = allocate("olica", config, int(total), 0.2, 3.0)
        task = Task(config, int(total), plan[0], (256, 128), 2, OLICA, is_streamed=True)
        options = pruning_options(mlp_num=6, batch_size=BatchSize(16), device=gpu, cache_device=cpu)
        assert expected_peaks(task, options)["device_bytes"] < most


def peaks(folder: Path, layers: int) -> tuple[int, int]:
    """Expected and measured peak of host memory of the command line on a model of so many layers of 50 MB."""
    sizes = dict(hidden_size=1024, intermediate_size=2752, num_attention_heads=8, num_key_value_heads=8)
    make_llama(num_hidden_layers=layers, **sizes).save_pretrained(folder / "dense", max_shard_size="120MB")
    save_file({"calibration_ids": torch.randint(3, 259, (16, 64))}, folder / "ids.safetensors")
    flags = ["--base_model=dense", "--datasets=ids.safetensors", "--mlp_num=1", "--save_dir=out"]
    command = [sys.executable, ROOT / "model_pruning.py", *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((folder / "out/dense_sparsity-0.2/olica_run.json").read_text())
    measured = max(stage["host_bytes"] for stage in record["stages"].values())
    return record["expected_peak_memory"]["host_bytes"], measured


def test_memory_is_as_expected_and_does_not_grow_with_the_layers(tmp_path):
    measured = {}
    for layers in (3, 12):
        (tmp_path / str(layers)).mkdir()
        expected, measured[layers] = peaks(tmp_path / str(layers), layers)
        assert expected == pytest.approx(measured[layers], rel=0.2)
    # Repeats of one of them differ by up to 45 MB.
    assert measured[12] - measured[3] < 100e6, "nine more layers hold 450 MB"
