"""What only a GPU shows: the command line there does what it does on the CPU, in the memory that it expected."""

import json
from pathlib import Path

import pytest
import torch
from called import call
from conftest import make_llama
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import model_pruning
import olica  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a CUDA device"),
]


def fill_here() -> None:
    """A model of three layers of 50 MB and a calibration set."""
    sizes = dict(hidden_size=1024, intermediate_size=2752, num_attention_heads=8, num_key_value_heads=4)
    make_llama(initializer_range=0.02, **sizes).save_pretrained("dense", max_shard_size="120MB")
    ids = torch.randint(3, 259, (256, 64), generator=torch.Generator().manual_seed(0))
    save_file({"calibration_ids": ids}, "ids.safetensors")


def pruned(save_dir: str, *flags: str) -> tuple[torch.Tensor, dict]:
    """Logits of the pruned model, and the record."""
    common = ["--base_model=dense", "--datasets=ids.safetensors", "--mlp_num=1", f"--save_dir={save_dir}"]
    assert call(model_pruning, *common, *flags) == 0
    (folder,) = Path(save_dir).iterdir()
    ids = torch.randint(3, 259, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    return logits, json.loads((folder / "olica_run.json").read_text())


@pytest.mark.parametrize("recipe", ["olica", "olica-paper"])
def test_a_gpu_prunes_as_the_cpu_does_wherever_hidden_states_live(here, recipe):
    expected, _ = pruned("cpu", f"--recipe={recipe}", "--device=cpu")
    for cache_dev in ("cuda", "cpu"):
        logits, record = pruned(f"gpu-{cache_dev}", f"--recipe={recipe}", "--device=cuda", f"--cache_dev={cache_dev}")
        torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
        measured = max(stage["device_bytes"] for stage in record["stages"].values())
        assert record["expected_peak_memory"]["device_bytes"] == pytest.approx(measured, rel=0.2)


def test_hidden_states_on_the_host_leave_the_device_their_room(here):
    peaks = {}
    for cache_dev in ("cuda", "cpu"):
        _, record = pruned(cache_dev, "--device=cuda", f"--cache_dev={cache_dev}")
        peaks[cache_dev] = max(stage["device_bytes"] for stage in record["stages"].values())
    states = 256 * 64 * 1024 * 4
    assert peaks["cuda"] - peaks["cpu"] == pytest.approx(states, rel=0.2)
