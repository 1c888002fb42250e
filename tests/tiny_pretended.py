"""Both command lines on a tiny model in the current folder, on the CPU or on a pretended GPU."""

import json
from pathlib import Path
from unittest.mock import patch

import torch
from called import call
from conftest import load_weights, make_llama, make_tokenizer
from safetensors.torch import save_file
from tiny_tasks import ROWS, WORDS, write_rows

import model_evaluate
import model_pruning
from olica.evaluation.subject import LATENCY
from olica.methods.recipes import RECIPES

SAMPLES, TOKENS, LAYERS = 12, 16, 2
MEASURES = ["--checkpoint=tiny", "--ppl=text.txt", "--ppl_seqlen=16", "--ppl_windows=10", "--tasks=piqa", "--cost",
            "--prompt=old books", "--data_dir=rows", "--batch_size=5"]  # fmt: skip


def fill_with_shards() -> None:
    """Put a tiny model in shards, a calibration set, a text and the rows of a task into the current folder."""
    sizes = dict(hidden_size=48, intermediate_size=104, num_attention_heads=3, num_key_value_heads=1)
    make_llama(num_hidden_layers=LAYERS, **sizes).save_pretrained("tiny", max_shard_size="40KB")
    make_tokenizer().save_pretrained("tiny")
    ids = torch.randint(3, 259, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    save_file({"calibration_ids": ids}, "ids.safetensors")
    Path("text.txt").write_text(" ".join(WORDS * 3))
    write_rows(Path("rows"), "piqa_validation", [ROWS["piqa_validation"] | {"idx": index} for index in range(3)])


def prune(save_dir: str, *flags: str) -> dict:
    """Prune on the device that is there; returns the record, whose checkpoint is alone in its folder."""
    # A survey that is taken up takes no memory: none is shared.
    common = [
        "--base_model=tiny",
        "--datasets=ids.safetensors",
        f"--save_dir={save_dir}",
        f"--data_dir={save_dir}-data",
    ]
    recipe = next((flag.partition("=")[2] for flag in flags if flag.startswith("--recipe=")), "olica")
    if "mlp_num" in RECIPES[recipe].parameter_names:
        common += ["--mlp_num=1", "--ratio=0.1"]
    assert call(model_pruning, *common, *flags) == 0
    return json.loads((checkpoint(save_dir) / "olica_run.json").read_text())


def checkpoint(save_dir: str) -> Path:
    (folder,) = Path(save_dir).iterdir()
    return folder


def evaluate(*flags: str) -> dict:
    """What was measured of the model, on the device that is there."""
    flags = [*flags, "--output_path=eval.json"]
    with patch.dict(LATENCY, prompt_tokens=8, new_tokens=2, repeats=1):
        assert call(model_evaluate, *flags) == 0
    return json.loads(Path("eval.json").read_text())["results"]["model"]


def perplexity_in(result: dict) -> float:
    return result["perplexity"]["text.txt"]["value"]


def assert_same_weights(save_dir: str, expected: dict[str, torch.Tensor]) -> None:
    """A checkpoint has these weights but for rounding: on the CPU attention takes another kernel."""
    found = load_weights(checkpoint(save_dir))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name


def device_peak(record: dict) -> int:
    return max(stage["device_bytes"] for stage in record["stages"].values())
