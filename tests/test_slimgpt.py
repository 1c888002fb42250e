"""SlimGPT by brute force: ratios of the layers, and what goes on the samples themselves; test_obs.py has the rest."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from by_obs import prune_by_hand
from conftest import as_method, make_llama, prune

from olica.errors import UsageError
from olica.methods.recipes import RECIPES
from olica.methods.sizes import Budget, Sizes
from olica.methods.slimgpt import LogarithmicRatios

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
GROUPS = pytest.mark.parametrize("groups", [4, 2])
BOTH = pytest.mark.parametrize("recipe", ["slimgpt", "osscar"])
small = partial(make_llama, intermediate_size=44, num_hidden_layers=2)


@pytest.mark.parametrize("first", [0.0, 0.25, 1.0])
def test_ratios_grow_with_the_logarithm_of_the_depth(first):
    found = LogarithmicRatios(first)([], 6)
    expected = [first + (1 - first) * math.log(i + 1) / math.log(6) for i in range(6)]
    np.testing.assert_allclose(found, np.stack([expected] * 2, axis=1), rtol=1e-12)
    assert found[0, 0] == first and found[-1, 1] == 1
    assert LogarithmicRatios(first)([], 1).tolist() == [[1.0, 1.0]]


def test_channels_go_in_these_ratios():
    sizes = [Sizes(64, 4, 4, 16, 1000)] * 6
    allocate = as_method("slimgpt", first_ratio=0.25).allocate
    plan = allocate.before_survey(sizes, Budget(6 * sizes[0].layer, 0.3))
    lost = np.array([1000 - shape.intermediate_size for shape in plan])
    expected = LogarithmicRatios(0.25)([], 6)[:, 1].numpy()
    np.testing.assert_allclose(lost / lost[-1], expected, atol=0.005)
    assert not any(shape.o_bias or shape.down_bias or shape.q_rank for shape in plan)
    heads = [shape.kv_heads or 4 for shape in plan]
    assert heads[0] == 4 and heads[-1] < 4 and heads != [heads[0]] * 6
    plan = as_method("slimgpt", first_ratio=0.0).allocate.before_survey(sizes, Budget(6 * sizes[0].layer, 0.3))
    assert (plan[0].kv_heads, plan[0].intermediate_size) == (0, 1000)


@BOTH
@GROUPS
def test_it_is_the_dense_model_without_what_costs_least_and_refitted(recipe, groups):
    """Attention first, the MLP on what is left of it, and every layer on what the pruned ones give."""
    model = small(num_key_value_heads=groups, mlp_bias=True, attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.normal_()
            layer.self_attn.o_proj.bias.normal_()
            layer.self_attn.k_proj.bias.normal_()
    dense = small(num_key_value_heads=groups, mlp_bias=True, attention_bias=True)
    dense.load_state_dict(model.state_dict())
    rounds = 50 if recipe == "osscar" else 0
    _, plan = prune(model, IDS, recipe, 0.3, damping=0.02)
    expected, kept = prune_by_hand(dense, IDS, plan, 0.02, rounds)
    if rounds and groups == 2:  # they change what stays
        greedy = prune_by_hand(dense, IDS, plan, 0.02, 0)[1]
        assert any((a[1] != b[1]).any() for a, b in zip(kept, greedy, strict=True))
    assert any(shape.kv_heads for shape in plan) and all(shape.intermediate_size < 44 for shape in plan)
    for layer, old, (features, channels) in zip(model.model.layers, expected.model.layers, kept, strict=True):
        for found, was, stay in (
            (layer.self_attn.o_proj, old.self_attn.o_proj, features),
            (layer.mlp.down_proj, old.mlp.down_proj, channels),
        ):
            torch.testing.assert_close(found.weight, was.weight[:, stay], rtol=1e-3, atol=1e-4)
            assert torch.equal(found.bias, was.bias)
        assert torch.equal(layer.mlp.gate_proj.weight, old.mlp.gate_proj.weight[channels])
        assert torch.equal(layer.self_attn.q_proj.weight, old.self_attn.q_proj.weight[features])
    before, after = dense(IDS).logits, expected(IDS).logits
    torch.testing.assert_close(model(IDS).logits, after, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, after, rtol=1e-1, atol=1e-1)


@BOTH
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_measured(recipe):
    sizes = [Sizes(64, 4, 4, 16, 100)] * 3
    with pytest.raises(ValueError, match="too few parameters"):
        as_method(recipe).allocate.before_survey(sizes, Budget(3 * sizes[0].layer, 0.99))


@pytest.mark.parametrize(
    ("recipe", "values", "message"),
    [
        ("slimgpt", {"damping": 0.0}, "--damping 0 must be a number above 0"),
        ("slimgpt", {"damping": math.nan}, "--damping nan must be"),
        ("slimgpt", {"first_ratio": 1.5}, "--first_ratio 1.5 is outside"),
        ("slimgpt", {"first_ratio": -0.1}, "--first_ratio -0.1 is outside"),
        ("osscar", {"damping": math.inf}, "--damping inf must be"),
        ("osscar", {"swaps": -1}, "--swaps -1: give 0 or more"),
        ("osscar", {"first_ratio": 0.5}, "--first_ratio is no parameter"),
    ],
)
def test_values_that_no_model_can_have_are_refused(recipe, values, message):
    with pytest.raises(UsageError, match=message):
        RECIPES[recipe].with_parameters(values)


def test_defaults():
    assert RECIPES["slimgpt"].with_parameters({}).damping == 0.01
    assert RECIPES["osscar"].with_parameters({}).damping == 0.01
