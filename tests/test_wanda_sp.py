"""Wanda-sp by brute force: the columns with the smallest |W_ij| ||x_j|| go, the same share everywhere."""

import copy

import numpy as np
import pytest
import torch
from by_threshold import features, inputs_of, lowest, silenced, weights_of
from conftest import make_llama, prune, seen

from olica.methods.moments import Moments, diagonal
from olica.methods.wanda_sp import channel_scores, group_scores
from olica.model.modeling_olica import projections_of

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))


def column_sums(weight: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """sum_i |W_ij| ||x_j||, weight by weight."""
    norms = np.linalg.norm(inputs, axis=0)
    return np.array([sum(abs(w) * norms[j] for w in weight[:, j]) for j in range(weight.shape[1])])


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_scores_are_sums_over_columns(groups):
    layer = projections_of(make_llama(num_key_value_heads=groups).model.layers[0])
    generator = torch.Generator().manual_seed(1)
    taken = {"heads": torch.randn(2, 30, 64, generator=generator), "intermediate": torch.randn(2, 30, 176)}
    moments = Moments([diagonal("heads"), diagonal("intermediate")], 4)
    moments.update(taken)
    view = seen(layer, moments, groups)
    explicit = {name: x.flatten(0, 1).double().numpy() for name, x in taken.items()}
    down, out = (w.weight.detach().double().numpy() for w in (layer.down_proj, layer.o_proj))
    np.testing.assert_allclose(channel_scores(view).detach(), column_sums(down, explicit["intermediate"]), rtol=1e-5)
    by_head = column_sums(out, explicit["heads"]).reshape(groups, -1).sum(1)
    np.testing.assert_allclose(group_scores(view).detach(), by_head, rtol=1e-5)


@pytest.mark.parametrize("groups", [4, 2])
def test_the_lowest_go_measured_behind_the_pruned_layers_and_nothing_else_changes(groups):
    model = make_llama(num_key_value_heads=groups)
    dense = copy.deepcopy(model)
    _, plan = prune(model, IDS, "wanda-sp", 0.4)
    assert any(shape.kv_heads for shape in plan) and all(shape.intermediate_size < 176 for shape in plan)
    gone = [{name: np.array([], dtype=int) for name in ("o_proj", "down_proj")} for _ in plan]
    zeros = [{"o_proj": np.zeros(64), "down_proj": np.zeros(176)}] * 3
    for index, (shape, weights) in enumerate(zip(plan, weights_of(dense), strict=True)):
        with silenced(dense, gone, zeros):
            inputs = inputs_of(dense, IDS)[index]
        heads = column_sums(weights["o_proj"], inputs["o_proj"]).reshape(groups, -1).sum(1)
        channels = column_sums(weights["down_proj"], inputs["down_proj"])
        lost = features(lowest(heads, shape.kv_heads or groups), dense.config)
        gone[index] = {"o_proj": lost, "down_proj": lowest(channels, shape.intermediate_size)}
        new = model.model.layers[index]
        for name, found in (("o_proj", new.self_attn.o_proj), ("down_proj", new.mlp.down_proj)):
            stay = np.setdiff1d(np.arange(weights[name].shape[1]), gone[index][name])
            np.testing.assert_array_equal(found.weight.detach(), weights[name][:, stay].astype(np.float32))
            assert found.bias is None
    with silenced(dense, gone, zeros), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


def test_every_layer_loses_the_same_share_of_heads_and_of_channels():
    """Of the 8 heads a quarter, of the 384 channels as much; embeddings are part of what is counted."""
    model = make_llama(hidden_size=128, num_attention_heads=8, num_key_value_heads=8, intermediate_size=384)
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if "proj" in name)
    _, plan = prune(model, IDS, "wanda-sp", 0.25 * layers / model.num_parameters())
    assert [(shape.kv_heads, shape.intermediate_size) for shape in plan] == [(6, 288)] * 3


def test_a_budget_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="too few parameters"):
        prune(make_llama(), IDS, "wanda-sp", 0.95)
