import numpy as np
import pytest
import torch
from conftest import make_llama, seen

from olica.methods.moments import Moments, diagonal, per_head
from olica.methods.value_output import (
    OUTPUT_MOMENT,
    FactorisedProjections,
    NarrowedHeads,
    given_directions,
    output_directions,
    paper_importance,
    product_directions,
    released_importance,
    rotate,
    value_directions,
)
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of

H, D, WIDTH = 4, 64, 16


@pytest.fixture(params=[4, 2, 1], ids=lambda k: f"{k} key/value heads")
def num_kv_heads(request):
    return request.param


@pytest.fixture
def layer(num_kv_heads):
    return projections_of(make_llama(num_key_value_heads=num_kv_heads).model.layers[0])


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(D, D, generator=generator)
    return {
        name: torch.randn(3, 40, D, generator=generator) @ mix
        for name in ("attention_input", "heads", "attention_output")
    }


@pytest.fixture
def moments(activations):
    summed = Moments([diagonal("attention_input"), diagonal("attention_output"), per_head("heads")], H)
    summed.update(activations)
    return summed


def whole(layer, moments, num_kv_heads):
    """The layer with its moments, and what the survey finds of it."""
    findings = {OUTPUT_MOMENT: moments[diagonal("attention_output")]} if moments else {}
    return seen(layer, moments, num_kv_heads, **findings)


def head_products(value: np.ndarray, output: np.ndarray, num_kv_heads: int, kept: int) -> np.ndarray:
    """W_o W_v of every query head (H, D, D)."""
    values = value.reshape(num_kv_heads, kept, D)
    outputs = output.reshape(D, H, kept)
    return np.stack([outputs[:, h] @ values[h // (H // num_kv_heads)] for h in range(H)])


def narrowed(layer, moments, num_kv_heads, kept, directions, importance=released_importance):
    """What the heads become when they keep so many of these directions."""
    shape = LayerShape(0, 0, kept, 176)
    return NarrowedHeads(directions, importance)(whole(layer, moments, num_kv_heads), shape)


@pytest.mark.parametrize("directions", [output_directions, value_directions])
def test_bases_of_fast_ond_are_orthogonal(layer, moments, num_kv_heads, directions):
    basis = directions(whole(layer, moments, num_kv_heads)).features
    identity = torch.eye(WIDTH, dtype=torch.float64).expand(num_kv_heads, -1, -1)
    torch.testing.assert_close(basis.mT @ basis, identity)


@pytest.mark.parametrize("directions", [output_directions, value_directions, product_directions])
def test_another_basis_keeps_every_heads_product(layer, moments, num_kv_heads, directions):
    rotated = narrowed(layer, moments, num_kv_heads, WIDTH, directions)
    before = head_products(
        layer.v_proj.weight.detach().double().numpy(), layer.o_proj.weight.detach().double().numpy(),
        num_kv_heads, WIDTH,
    )  # fmt: skip
    after = head_products(
        rotated["v_proj.weight"].detach().numpy(), rotated["o_proj.weight"].detach().numpy(),
        num_kv_heads, WIDTH,
    )  # fmt: skip
    np.testing.assert_allclose(after, before, atol=1e-12)
    assert not np.allclose(rotated["v_proj.weight"].detach().numpy(), layer.v_proj.weight.detach())


def test_output_basis_diagonalises_the_groups_weighted_outputs(layer, activations, moments, num_kv_heads):
    basis = output_directions(whole(layer, moments, num_kv_heads)).features.detach().numpy()
    weight = layer.o_proj.weight.detach().double().numpy().reshape(D, H, WIDTH)
    norms = (activations["attention_output"].double() ** 2).sum((0, 1)).numpy()
    group = H // num_kv_heads
    for kv in range(num_kv_heads):
        summed = sum(weight[:, h].T @ np.diag(norms) @ weight[:, h] for h in range(kv * group, (kv + 1) * group))
        rotated = basis[kv].T @ summed @ basis[kv]
        off_diagonal = rotated - np.diag(np.diag(rotated))
        assert np.abs(off_diagonal).max() < 1e-6 * np.abs(rotated).max()
        assert (np.diff(np.diag(rotated)) <= 1e-9).all(), "largest first"


def test_value_basis_holds_the_singular_vectors(layer, num_kv_heads):
    basis = value_directions(whole(layer, None, num_kv_heads)).features.detach().numpy()
    weight = layer.v_proj.weight.detach().double().numpy().reshape(num_kv_heads, WIDTH, D)
    for kv in range(num_kv_heads):
        _, _, expected = np.linalg.svd(weight[kv].T)  # W_v in the paper's orientation (D, d)
        np.testing.assert_allclose(np.abs(expected @ basis[kv]), np.eye(WIDTH), atol=1e-7)


def scores_by_hand(layer, activations, basis, num_kv_heads, norm) -> np.ndarray:
    """Both importances from their definition on rotated weights and rotated activations, norm 1 or 2."""
    group = H // num_kv_heads
    value = layer.v_proj.weight.detach().double().numpy().reshape(num_kv_heads, WIDTH, D)
    output = layer.o_proj.weight.detach().double().numpy().reshape(D, H, WIDTH)
    inputs = np.linalg.norm(activations["attention_input"].double().flatten(0, 1).numpy(), axis=0)
    heads = activations["heads"].double().flatten(0, 1).numpy().reshape(-1, H, WIDTH)
    scores = np.zeros((num_kv_heads, WIDTH))
    for kv in range(num_kv_heads):
        rows = basis[kv].T @ value[kv]
        scale = np.linalg.norm(rows, axis=1) if norm == 1 else np.ones(WIDTH)
        wanda = np.abs(rows / scale[:, None]) * inputs
        columns = []
        for h in range(kv * group, (kv + 1) * group):
            rotated_norms = np.linalg.norm(heads[:, h] @ basis[kv] / scale, axis=0)
            columns.append(np.abs(output[:, h] @ basis[kv] * scale) * rotated_norms)
        stacked = np.concatenate(columns)
        scores[kv] = np.linalg.norm(wanda, ord=norm, axis=1) + np.linalg.norm(stacked, ord=norm, axis=0)
    return scores


@pytest.mark.parametrize(("importance", "norm"), [(released_importance, 2), (paper_importance, 1)])
def test_pruning_keeps_the_most_important_directions(layer, activations, moments, num_kv_heads, importance, norm):
    basis = output_directions(whole(layer, moments, num_kv_heads)).features.detach()
    kept = 11
    pruned = narrowed(layer, moments, num_kv_heads, kept, output_directions, importance)
    scores = scores_by_hand(layer, activations, basis.numpy(), num_kv_heads, norm)
    order = np.sort(np.argsort(scores, axis=1)[:, WIDTH - kept :], axis=1)
    value = layer.v_proj.weight.detach().double().numpy().reshape(num_kv_heads, WIDTH, D)
    expected = np.stack([(basis[kv].numpy().T @ value[kv])[order[kv]] for kv in range(num_kv_heads)])
    found = pruned["v_proj.weight"].detach().numpy().reshape(num_kv_heads, kept, D)
    np.testing.assert_allclose(found, expected, atol=1e-10)
    assert pruned["o_proj.weight"].shape == (D, H * kept)


def test_biases_follow_their_projections(num_kv_heads, moments):
    layer = make_llama(num_key_value_heads=num_kv_heads, attention_bias=True).model.layers[0]
    layer = projections_of(layer)
    torch.nn.init.normal_(layer.v_proj.bias)
    basis = output_directions(whole(layer, moments, num_kv_heads)).features.detach()
    rotated = narrowed(layer, moments, num_kv_heads, WIDTH, output_directions)
    bias = layer.v_proj.bias.detach().double().numpy().reshape(num_kv_heads, WIDTH)
    expected = np.concatenate([basis[kv].numpy().T @ bias[kv] for kv in range(num_kv_heads)])
    np.testing.assert_allclose(rotated["v_proj.bias"].detach().numpy(), expected, atol=1e-12)
    assert rotated["o_proj.bias"] is layer.o_proj.bias


def test_full_ond_finds_the_singular_vectors_of_the_product(layer, num_kv_heads):
    """numpy forms the product (G D, D) of a group, which ours never does."""
    value, output, _ = product_directions(whole(layer, None, num_kv_heads))
    value, output = value.detach().numpy(), output.detach().numpy().reshape(num_kv_heads, -1, WIDTH)
    weight_v = layer.v_proj.weight.detach().double().numpy().reshape(num_kv_heads, WIDTH, D)
    weight_o = layer.o_proj.weight.detach().double().numpy().reshape(D, num_kv_heads, -1, WIDTH)
    for kv in range(num_kv_heads):
        product = weight_o[:, kv].transpose(1, 0, 2).reshape(-1, WIDTH) @ weight_v[kv]
        left, singular, right = np.linalg.svd(product, full_matrices=False)
        np.testing.assert_allclose(np.abs(left[:, :WIDTH].T @ output[kv]), np.eye(WIDTH), atol=1e-8)
        np.testing.assert_allclose(np.abs(value[kv] @ right[:WIDTH].T), np.diag(singular[:WIDTH]), atol=1e-8)


def test_the_features_of_full_ond_are_those_of_its_value_projection(moments, num_kv_heads):
    """Also where a value head is rank-deficient, and with a bias."""
    layer = projections_of(make_llama(num_key_value_heads=num_kv_heads, attention_bias=True).model.layers[0])
    with torch.no_grad():
        layer.v_proj.weight[1] = layer.v_proj.weight[0]
        layer.o_proj.weight[:, 2] = 0
        layer.v_proj.bias.normal_()
    turned = narrowed(layer, moments, num_kv_heads, WIDTH, product_directions)
    hidden = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    values = (hidden @ turned["v_proj.weight"].T + turned["v_proj.bias"]).view(5, num_kv_heads, WIDTH)
    heads = values.repeat_interleave(H // num_kv_heads, dim=1).flatten(1)
    dense = torch.nn.functional.linear(hidden, layer.v_proj.weight.double(), layer.v_proj.bias.double())
    dense_heads = dense.view(5, num_kv_heads, WIDTH).repeat_interleave(H // num_kv_heads, dim=1).flatten(1)
    torch.testing.assert_close(heads @ turned["o_proj.weight"].T, dense_heads @ layer.o_proj.weight.double().T)


@pytest.mark.parametrize("importance", [released_importance, paper_importance])
def test_a_second_moment_below_zero_by_rounding_counts_as_zero(layer, moments, num_kv_heads, importance):
    """Two features of a head that are the same one: their difference has no variance, in float32 sums maybe less."""
    summed = moments[per_head("heads")]
    summed.copy_(1 + 1e-6 * (1 - torch.eye(WIDTH)))
    basis = torch.eye(WIDTH, dtype=torch.float64)
    basis[:2, :2] = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5
    directions = rotate(whole(layer, moments, num_kv_heads), basis.expand(num_kv_heads, -1, -1))
    scores = importance(whole(layer, moments, num_kv_heads), directions)
    summed.zero_()
    from_value = importance(whole(layer, moments, num_kv_heads), directions)
    assert (scores[:, 1:] > from_value[:, 1:]).all()
    torch.testing.assert_close(scores[:, 0], from_value[:, 0])


def test_wanda_drops_directions_as_they_are(layer, activations, moments, num_kv_heads):
    kept = 11
    pruned = narrowed(layer, moments, num_kv_heads, kept, given_directions)
    identity = np.broadcast_to(np.eye(WIDTH), (num_kv_heads, WIDTH, WIDTH))
    scores = scores_by_hand(layer, activations, identity, num_kv_heads, 2)
    order = np.sort(np.argsort(scores, axis=1)[:, WIDTH - kept :], axis=1)
    value = layer.v_proj.weight.detach().double().numpy().reshape(num_kv_heads, WIDTH, D)
    expected = np.concatenate([value[kv][order[kv]] for kv in range(num_kv_heads)])
    np.testing.assert_array_equal(pruned["v_proj.weight"].detach().numpy(), expected)


@pytest.mark.parametrize("by_input", [False, True])
def test_factors_are_those_of_numpys_svd(layer, activations, num_kv_heads, by_input):
    statistics = [diagonal("attention_input"), diagonal("heads")]
    summed = Moments(statistics, H)
    summed.update(activations)
    shape = LayerShape(0, 0, WIDTH, 176, v_rank=7, o_rank=20)
    method = FactorisedProjections(by_input)
    assert method.needs(shape) == (set(statistics) if by_input else set())
    factors = method(seen(layer, summed, num_kv_heads), shape)
    for name, tap, rank in (("v_proj", "attention_input", 7), ("o_proj", "heads", 20)):
        weight = getattr(layer, name).weight.detach().double().numpy()
        norms = np.linalg.norm(activations[tap].double().flatten(0, 1).numpy(), axis=0)
        scale = norms if by_input else np.ones(D)
        left, singular, right = np.linalg.svd(weight * scale, full_matrices=False)
        expected = (left[:, :rank] * singular[:rank]) @ right[:rank] / scale
        found = factors[f"{name}.expand.weight"] @ factors[f"{name}.reduce.weight"]
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)
    assert method(seen(layer, summed, num_kv_heads), LayerShape(0, 0, WIDTH, 176)) == {}
