"""GGUF files run by llama.cpp itself; skipped where there is none: OLICA_LLAMA_CPP=FOLDER bash scripts/llama_cpp.sh."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from called import load
from tiny_families import LLAMA3_SCALING, make_family
from tiny_gguf import merging_tokenizer
from torch import nn
from transformers import PreTrainedModel

from olica.outputs.gguf_file import Weights, write_gguf, write_model

llama_cpp = load("scripts/llama_cpp.py")
pytestmark = pytest.mark.skipif(
    not os.environ.get(llama_cpp.VARIABLE) or not shutil.which("node"),
    reason=f"wants llama.cpp: {llama_cpp.VARIABLE}=FOLDER bash scripts/llama_cpp.sh installs it",
)

SIZES = dict(vocab_size=320, hidden_size=64, head_dim=32, intermediate_size=160, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, initializer_range=0.1)
IDS = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
    "sliding_attention": PLAIN,
}
GEMMA = dict(num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=32, rope_parameters=GEMMA_ROPE)
MODELS = {
    "llama": ("llama", {}),
    "tied": ("llama", dict(tied=True)),
    "biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3_SCALING)),
    "yarn": ("llama", dict(rope_parameters=YARN)),
    "linear": ("llama", dict(rope_parameters=LINEAR)),
    "mistral": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", dict(head_dim=16)),
    "qwen2, yarn": ("qwen2", dict(head_dim=16, rope_parameters=YARN)),
    "qwen2, fewer heads": ("qwen2", dict(head_dim=16, num_attention_heads=2, num_key_value_heads=1)),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, as many layers as 27B": ("gemma3_text", GEMMA | dict(num_hidden_layers=62, query_pre_attn_scalar=16)),
}


def written(model: PreTrainedModel, folder: Path, form: str) -> Path:
    model.save_pretrained(folder / "dense")
    merging_tokenizer().save_pretrained(folder / "dense")
    write_gguf(folder / "dense", folder / "tiny.gguf", form)
    return folder / "tiny.gguf"


def asked(path: Path, **more) -> dict:
    request = dict(models=[str(path)], threads=1, sequences=[IDS], prompts=[], new_tokens=0, texts=[])
    (found,) = llama_cpp.ask(request | dict(timed=[], repeats=0) | more)["models"]
    return found


def difference(answer: dict, model: PreTrainedModel) -> float:
    (found,) = answer["log_probabilities"]
    return (torch.tensor(found) - llama_cpp.log_probabilities(model, IDS)).abs().mean().item()


def assert_runs_alike(path: Path, model: PreTrainedModel) -> None:
    answer = asked(path, prompts=[IDS[:9]], new_tokens=8, texts=["seven owls"])
    assert difference(answer, model) < 1e-2
    assert answer["continuations"] == [llama_cpp.continuation(model, IDS[:9], 8)]
    assert answer["tokens"] == [merging_tokenizer()("seven owls").input_ids]
    assert answer["ends"] == [False, False]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_each_kind_runs_as_in_transformers(name, tmp_path):
    family, settings = MODELS[name]
    model = make_family(family, peculiar=False, **SIZES | settings)
    assert_runs_alike(written(model, tmp_path, "f16"), model)


@pytest.mark.parametrize(("form", "close"), [("bf16", 5e-2), ("q8_0", 5e-2)])
def test_the_other_forms_run_nearly_alike(form, close, tmp_path):
    model = make_family("llama", peculiar=False, **SIZES)
    assert 1e-4 < difference(asked(written(model, tmp_path, form)), model) < close


def narrowed(linear: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=linear.bias is not None)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def uneven(family: str, channels: list[int], kv_heads: list[int], **settings) -> PreTrainedModel:
    """A model whose layers have these channels, and key/value heads with two query heads each."""
    model = make_family(family, peculiar=False, **SIZES | settings)
    torch.manual_seed(1)

    for layer, width, heads in zip(model.model.layers, channels, kv_heads, strict=True):
        for name, shape in {"gate_proj": (64, width), "up_proj": (64, width), "down_proj": (width, 64)}.items():
            setattr(layer.mlp, name, narrowed(getattr(layer.mlp, name), *shape))
        queries, keys = (64, 64 * heads), (64, 32 * heads)
        for name, shape in {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries[::-1]}.items():
            setattr(layer.self_attn, name, narrowed(getattr(layer.self_attn, name), *shape))
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", dict(rope_parameters=LLAMA3_SCALING, mlp_bias=True)), ("qwen2", {})]
)
def test_layers_of_different_sizes_run_as_deci(family, settings, tmp_path):
    model = uneven(family, [96, 160, 32], [2, 1, 3], **settings)
    state = model.state_dict()
    weights = Weights({name: tuple(weight.shape) for name, weight in state.items()}, state.__getitem__)
    write_model(model.config, weights, merging_tokenizer(), tmp_path / "tiny.gguf", "f16", name="uneven")
    assert_runs_alike(tmp_path / "tiny.gguf", model)
