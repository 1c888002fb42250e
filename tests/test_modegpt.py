"""MoDeGPT against explicit matrices: leverage scores, Nystrom, the SVD of value and output, ratios of layers."""

import copy

import numpy as np
import pytest
import torch
from conftest import CPU, make_llama, prune, seen

from olica.errors import UsageError
from olica.methods.linalg import SingularError
from olica.methods.modegpt import (
    ModegptParameters,
    Nystrom,
    SoftmaxRatios,
    input_directions,
    ridge_leverage,
)
from olica.methods.moments import Moments, full
from olica.methods.recipes import RECIPES
from olica.methods.similarity import cosines_of, softmax_ratios
from olica.methods.sizes import Budget, Sizes
from olica.methods.value_output import NarrowedHeads, in_order
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of
from olica.pruning.activations import first_of, record_layer_calls, recording

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
F, H, D, WIDTH = 176, 4, 64, 16


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(1)
    return {
        "intermediate": torch.randn(3, 100, F, generator=generator) @ torch.randn(F, F, generator=generator),
        "attention_input": torch.randn(3, 100, D, generator=generator) @ torch.randn(D, D, generator=generator) + 0.5,
    }


def explicit(activations, tap: str) -> np.ndarray:
    return activations[tap].flatten(0, 1).double().numpy()


def viewed(layer, activations, num_kv_heads: int = 4):
    moments = Moments([full(tap) for tap in activations], H)
    moments.update(activations)
    return seen(layer, moments, num_kv_heads)


def leverage(hidden: np.ndarray, ridge: float) -> np.ndarray:
    gram = hidden.T @ hidden
    return np.diag(gram @ np.linalg.inv(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))))


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_leverage_scores(layer, activations, ridge):
    found = ridge_leverage(ridge)(viewed(layer, activations))
    np.testing.assert_allclose(found, leverage(explicit(activations, "intermediate"), ridge), rtol=1e-4)


def test_leverage_of_two_channels_by_hand(layer):
    """C = diag(9, 1, 0, ...), its mean 10/F: s = c / (c + mean); equal channels share what one would have alone."""
    hidden = torch.zeros(2, F)
    hidden[0, 0], hidden[1, 1] = 3, 1
    found = ridge_leverage(1.0)(viewed(layer, {"intermediate": hidden}))
    expected = np.zeros(F)
    expected[:2] = 9 / (9 + 10 / F), 1 / (1 + 10 / F)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    twins = torch.zeros(2, F)
    twins[0, :2], twins[1, 2] = 1, 1
    found = ridge_leverage(1e-6)(viewed(layer, {"intermediate": twins}))
    np.testing.assert_allclose(found[:3], [0.5, 0.5, 1], atol=1e-6)
    assert not ridge_leverage(0.01)(viewed(layer, {"intermediate": torch.zeros(2, F)})).any()


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.1])
def test_nystrom_is_the_closed_form(activations, ridge):
    """W_d' = (S^T C S)^-1 S^T C W_d with S as a matrix, W_d (F, D) in the paper's orientation."""
    hidden = explicit(activations, "intermediate")
    weight = np.random.default_rng(0).normal(size=(D, F))
    kept = np.arange(0, F, 3)
    gram, chosen = hidden.T @ hidden, np.eye(F)[:, kept]
    inner = chosen.T @ gram @ chosen
    inner += ridge * np.trace(inner) / len(inner) * np.eye(len(inner))
    expected = np.linalg.inv(inner) @ chosen.T @ gram @ weight.T
    found = Nystrom(ridge)(*map(torch.from_numpy, (weight, kept, gram)))
    np.testing.assert_allclose(found.T, expected, atol=1e-8)
    if not ridge:
        fitted = np.linalg.lstsq(hidden[:, kept], hidden @ weight.T, rcond=None)[0]
        np.testing.assert_allclose(found.T, fitted, atol=1e-7)


def test_what_is_singular_is_said():
    moment = torch.zeros(8, 8, dtype=torch.float64)
    moment[0, 0] = 1
    with pytest.raises(SingularError, match="--nystrom_ridge 0 is too small"):
        Nystrom(0.0)(torch.ones(3, 8), torch.arange(4), moment)
    assert torch.isfinite(Nystrom(1e-4)(torch.ones(3, 8), torch.arange(4), moment)).all()
    with pytest.raises(UsageError, match="--nystrom_ridge 0 .*in layer 0 .*the channels that stay is singular"):
        prune(make_llama(), IDS[:1], "modegpt", 0.2, nystrom_ridge=0.0, epsilon=1e6)


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("kept", [1, 5, 11])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_value_and_output_are_the_svd_of_the_explicit_matrix(activations, groups, kept):
    """C^1/2 W_v W_o of every head, or of the output projections of a group beside each other (D, G D)."""
    layer = projections_of(make_llama(num_key_value_heads=groups).model.layers[0])
    stage = NarrowedHeads(input_directions, in_order, rotates_whole=False)
    view = viewed(layer, activations, groups)
    cut = stage(view, LayerShape(0, 0, kept, F))
    inputs = explicit(activations, "attention_input")
    half = root(inputs.T @ inputs)
    value, output = (w.weight.detach().double().numpy() for w in (layer.v_proj, layer.o_proj))
    values, outputs = value.reshape(groups, WIDTH, D), output.reshape(D, groups, -1, WIDTH)
    new_values = cut["v_proj.weight"].detach().numpy().reshape(groups, kept, D)
    new_outputs = cut["o_proj.weight"].detach().numpy().reshape(D, groups, -1, kept)
    for head in range(groups):
        product = np.hstack([values[head].T @ outputs[:, head, q].T for q in range(4 // groups)])
        left, singular, right = np.linalg.svd(half @ product, full_matrices=False)
        expected = np.linalg.inv(half) @ (left[:, :kept] * singular[:kept]) @ right[:kept]
        found = np.hstack([new_values[head].T @ new_outputs[:, head, q].T for q in range(4 // groups)])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        lost = np.linalg.norm(half @ (product - found))
        assert lost == pytest.approx(np.linalg.norm(singular[kept:]), rel=1e-4)
    assert stage(view, LayerShape(0, 0, WIDTH, F)) == {}


def test_a_value_bias_goes_with_the_directions(activations):
    layer = projections_of(make_llama(attention_bias=True).model.layers[0])
    torch.nn.init.normal_(layer.v_proj.bias)
    view = viewed(layer, activations)
    features = input_directions(view).features.detach()
    cut = NarrowedHeads(input_directions, in_order)(view, LayerShape(0, 0, 5, F))
    expected = (features.mT @ layer.v_proj.bias.detach().double().view(4, WIDTH, 1))[:, :5]
    torch.testing.assert_close(cut["v_proj.bias"].detach(), expected.flatten())


def similarities(model) -> np.ndarray:
    """Mean cosine of the input and the output of every layer, token by token."""
    found = []

    def keep(_, args, output) -> None:
        x, y = (states.flatten(0, 1).numpy() for states in (args[0], first_of(output)))
        found.append(np.mean([np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, y, strict=True)]))

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return np.array(found)


def test_ratios_are_a_softmax_over_the_block_influence():
    model = make_llama(num_hidden_layers=4)
    expected = similarities(model)
    findings, _ = prune(model, IDS, "modegpt", 0.0)
    cosines = cosines_of(findings)
    np.testing.assert_allclose(cosines, expected, atol=1e-5)
    for epsilon in (0.1, 1.0):
        weights = np.exp(-(1 - expected) / epsilon)
        np.testing.assert_allclose(softmax_ratios(cosines, 4, 1 / epsilon), 4 * weights / weights.sum(), rtol=1e-4)


def found(*similarity: float) -> list[dict]:
    return [{"cosine": torch.tensor(value, dtype=torch.float64)} for value in similarity]


PLAIN, GROUPED = Sizes(64, 8, 8, 32, 400), Sizes(64, 9, 3, 32, 400)


def left_of(layer: Sizes, shape: LayerShape) -> int:
    heads = layer.hidden_size * (layer.num_heads + layer.num_kv_heads) * shape.v_head_dim
    return layer.query + layer.key + heads + 3 * layer.hidden_size * shape.intermediate_size


@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("layer", [PLAIN, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.6])
def test_the_budget_is_met_whatever_the_ratios(layer, sparsity, round_to):
    whole = 4 * layer.layer
    for similarity in ((0.5, 0.5, 0.5, 0.5), (0.2, 0.4, 0.9, 0.3), (0.99, 0.1, 0.1, 0.98)):
        plan = SoftmaxRatios(0.1)([layer] * 4, Budget(whole, sparsity, round_to), found(*similarity))
        lost = 1 - sum(left_of(layer, shape) for shape in plan) / whole
        assert lost == pytest.approx(sparsity, abs=0.005)
        assert all(shape.v_head_dim >= 1 and shape.intermediate_size >= 1 for shape in plan)
        if round_to > 1 and sparsity:
            assert all(shape.intermediate_size % 8 == 0 and shape.v_head_dim % 8 == 0 for shape in plan)


def test_a_layers_parts_lose_its_ratio():
    """Of three layers one with weight 2 and two with 1: their ratios, 32 directions and 400 channels."""
    similarity = found(0.1 * np.log(2), 0.0, 0.0)
    prunable = PLAIN.value_output + PLAIN.feed_forward
    plan = SoftmaxRatios(0.1)([PLAIN] * 3, Budget(3 * prunable, 0.25), similarity)
    for shape, ratio in zip(plan, (0.375, 0.1875, 0.1875), strict=True):
        assert shape.v_head_dim == round((1 - ratio) * 32)
        assert shape.intermediate_size == pytest.approx((1 - ratio) * 400, abs=1)
        assert not shape.q_rank and not shape.k_rank and not shape.kv_heads


def test_what_queries_and_keys_hold_cannot_be_removed():
    allocate = SoftmaxRatios(0.1)
    most = 1 - (PLAIN.query + PLAIN.key) / PLAIN.layer
    assert allocate.before_survey([PLAIN] * 3, Budget(3 * PLAIN.layer, most - 0.03)) is None
    plan = allocate([PLAIN] * 3, Budget(3 * PLAIN.layer, most - 0.03), found(0.9, 0.0, 0.5))
    assert min(shape.v_head_dim for shape in plan) == 1
    with pytest.raises(ValueError, match="queries and keys stay"):
        allocate.before_survey([PLAIN] * 3, Budget(3 * PLAIN.layer, most))


@torch.no_grad()
@pytest.mark.parametrize("groups", [4, 2])
def test_the_mlp_is_measured_behind_the_pruned_attention(groups):
    """The last layer: the pruned attention before the dense MLP gives the channels that the Nystrom matrix is of."""
    dense, model = make_llama(num_key_value_heads=groups), make_llama(num_key_value_heads=groups)
    _, plan = prune(model, IDS, "modegpt", 0.3)
    shape, kept = plan[-1], plan[-1].intermediate_size
    assert shape.v_head_dim < WIDTH and kept < F
    hybrid = copy.deepcopy(model)
    hybrid.model.layers[-1].mlp = old = copy.deepcopy(dense.model.layers[-1].mlp)
    hidden, calls = record_layer_calls(hybrid.model, IDS, CPU)
    for layer, call in zip(hybrid.model.layers[:-1], calls, strict=False):
        hidden = layer(hidden, **call)
    with recording(hybrid.model.layers[-1], {"intermediate"}, stop=False) as taken:
        hybrid.model.layers[-1](hidden, **calls[-1])
    channels = taken["intermediate"].flatten(0, 1).double().numpy()
    scores = leverage(channels, 0.01)
    staying = np.sort(np.argsort(scores)[F - kept :])
    new = model.model.layers[-1].mlp
    np.testing.assert_array_equal(new.gate_proj.weight, old.gate_proj.weight[staying])
    np.testing.assert_array_equal(new.up_proj.weight, old.up_proj.weight[staying])
    gram = channels.T @ channels
    inner = gram[np.ix_(staying, staying)]
    inner = inner + 1e-4 * np.trace(inner) / kept * np.eye(kept)
    expected = np.linalg.solve(inner, gram[staying] @ old.down_proj.weight.double().numpy().T).T
    np.testing.assert_allclose(new.down_proj.weight, expected, atol=1e-3)
    assert not np.allclose(new.down_proj.weight, old.down_proj.weight[:, staying], atol=1e-2)


@pytest.mark.parametrize(
    "values",
    [{"epsilon": 0.0}, {"epsilon": float("nan")}, {"leverage_ridge": 0.0}, {"nystrom_ridge": -1e-9}],
)
def test_values_that_no_model_can_have_are_refused(values):
    (name,) = values
    with pytest.raises(UsageError, match=f"--{name} "):
        RECIPES["modegpt"].with_parameters(values)
    assert RECIPES["modegpt"].with_parameters({}) == ModegptParameters(0.1, 0.01, 1e-4)
