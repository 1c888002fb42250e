"""Magnitude pruning by brute force from the weights; test_flap.py has what both recipes share."""

import copy

import numpy as np
import pytest
import torch
from by_threshold import (
    KEPT_CHANNELS,
    KEPT_HEADS,
    counts_by_hand,
    family_plan,
    features,
    lowest,
    silenced,
    weights_of,
)
from conftest import make_llama, prune, prune_to, write_pruned
from tiny_families import make_family
from transformers import AutoModelForCausalLM

from olica.methods.sizes import Sizes
from olica.methods.units import channel_parameters, group_parameters
from olica.model.families import FAMILIES
from olica.pruning import survey

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))


def scores(model) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean squares of all weights that go with every group of heads, and with every channel."""
    found, groups = [], model.config.num_key_value_heads
    names = ("v_proj", "o_proj") if model.config.model_type == "olmo2" else ("q_proj", "k_proj", "v_proj", "o_proj")
    for weights in weights_of(model):
        of_group = [
            np.concatenate([
                (weights[name].T if name == "o_proj" else weights[name]).reshape(groups, -1)[group] for name in names
            ])
            for group in range(groups)
        ]  # fmt: skip
        of_channel = np.concatenate([weights["gate_proj"], weights["up_proj"], weights["down_proj"].T], axis=1)
        found.append((np.array([(part**2).mean() for part in of_group]), (of_channel**2).mean(1)))
    return found


def uneven(groups: int, **overrides):
    """A tiny LLaMA whose layers differ in scale, so that one threshold takes different numbers from them."""
    model = make_llama(num_key_value_heads=groups, intermediate_size=80, **overrides)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for parameter in (*layer.self_attn.parameters(), *layer.mlp.parameters()):
                parameter.mul_(1 + 0.05 * index)
            layer.self_attn.q_proj.weight[16:32] *= 0.7
    return model


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("groups", [4, 2])
def test_one_threshold_over_all_layers_decides_what_goes(groups, sparsity):
    model = uneven(groups)
    ranked, total = scores(model), model.num_parameters()
    costs = 2 * 64 * 16 * (1 + 4 // groups), 3 * 64
    gone = counts_by_hand(ranked, costs, sparsity * total)
    findings, plan = prune(model, IDS, "magnitude", sparsity)
    for found, (heads, channels) in zip(findings, ranked, strict=True):
        np.testing.assert_allclose(found["group_scores"], heads, rtol=1e-10)
        np.testing.assert_allclose(found["channel_scores"], channels, rtol=1e-10)
    assert [(groups - s.kv_heads if s.kv_heads else 0, 80 - s.intermediate_size) for s in plan] == list(
        map(tuple, gone)
    )
    assert not any(s.o_bias or s.down_bias for s in plan) and gone[0] != gone[2]
    assert sparsity < 0.45 or sum(g for g, _ in gone) > 0 < sum(c for _, c in gone)


def test_no_layer_is_run(monkeypatch):
    monkeypatch.setattr(survey, "enter_layers", None)
    monkeypatch.setattr("olica.pruning.layers.enter_layers", None)
    model = make_llama()
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("the layer was run"))
    _, plan = prune(model, IDS, "magnitude", 0.3)
    assert calls == [] and any(shape.intermediate_size < 176 for shape in plan)


@pytest.mark.parametrize("groups", [4, 2])
def test_what_stays_stays_as_it_is(groups):
    model = uneven(groups, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.self_attn, name).bias.normal_()
    dense = copy.deepcopy(model)
    _, plan = prune(model, IDS, "magnitude", 0.45)
    rows = 4 // groups * 16
    for layer, old, shape, parts in zip(model.model.layers, dense.model.layers, plan, scores(dense), strict=True):
        heads = np.setdiff1d(np.arange(groups), lowest(parts[0], shape.kv_heads or groups))
        stay = np.setdiff1d(np.arange(80), lowest(parts[1], shape.intermediate_size))
        queries, keys = ((heads[:, None] * width + np.arange(width)).flatten() for width in (rows, 16))
        new, was = layer.self_attn, old.self_attn
        for name, kept in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            assert torch.equal(getattr(new, name).weight, getattr(was, name).weight[kept])
            assert torch.equal(getattr(new, name).bias, getattr(was, name).bias[kept])
        assert torch.equal(new.o_proj.weight, was.o_proj.weight[:, queries])
        assert torch.equal(new.o_proj.bias, was.o_proj.bias)
        assert torch.equal(layer.mlp.down_proj.weight, old.mlp.down_proj.weight[:, stay])
        assert torch.equal(layer.mlp.gate_proj.weight, old.mlp.gate_proj.weight[stay])
        assert torch.equal(layer.mlp.up_proj.weight, old.mlp.up_proj.weight[stay])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_the_dense_model_without_what_is_gone(family, tmp_path):
    model = make_family(family)
    gone = [
        {"o_proj": features(lowest(parts[0], heads), model.config), "down_proj": lowest(parts[1], channels)}
        for parts, heads, channels in zip(scores(model), KEPT_HEADS, KEPT_CHANNELS, strict=True)
    ]
    zeros = [{"o_proj": np.zeros(90), "down_proj": np.zeros(177)}] * 3
    with silenced(model, gone, zeros), torch.no_grad():
        expected = model(IDS).logits
    before, total = model(IDS).logits, model.num_parameters()
    plan, sizes = family_plan(biases=False), Sizes.of(model.config)
    has_bias = {name.rsplit(".", 2)[1] for name, _ in model.model.layers[0].named_parameters() if "proj.bias" in name}
    prune_to(model, IDS, plan, "magnitude")
    write_pruned(model, plan, None, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    heads, channels = sum(3 - kept for kept in KEPT_HEADS), sum(177 - kept for kept in KEPT_CHANNELS)
    lost = heads * group_parameters(sizes) + channels * channel_parameters(sizes)
    lost += heads * 10 * (5 if "q_proj" in has_bias else 0) + channels * (2 if "gate_proj" in has_bias else 0)
    assert total - loaded.num_parameters() == lost
