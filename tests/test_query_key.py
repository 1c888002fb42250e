import numpy as np
import torch
from conftest import make_llama, seen

from olica.methods.moments import Moments, diagonal
from olica.methods.query_key import LowRankQueryKey
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of


def factors_of(layer, shape):
    inputs = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 64)
    moments = Moments([diagonal("attention_input")], 4)
    moments.update({"attention_input": inputs})
    norms = np.linalg.norm(inputs.flatten(0, 1).double().numpy(), axis=0)
    return LowRankQueryKey()(seen(layer, moments), shape), norms


def test_factors_are_the_weighted_svd_of_the_paper():
    layer = projections_of(make_llama(num_key_value_heads=2).model.layers[0])
    shape = LayerShape(20, 10, 16, 176)
    factors, norms = factors_of(layer, shape)
    assert LowRankQueryKey().needs(shape) == {diagonal("attention_input")}
    for name, rank in (("q_proj", 20), ("k_proj", 10)):
        weight = getattr(layer, name).weight.detach().double().numpy()
        u, s, vt = np.linalg.svd(weight * norms, full_matrices=False)  # W D = U S V^T
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank] / norms
        found = factors[f"{name}.expand.weight"] @ factors[f"{name}.reduce.weight"]
        np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)


def test_a_rank_of_zero_leaves_the_projection():
    layer = projections_of(make_llama(attention_bias=True).model.layers[0])
    factors, _ = factors_of(layer, LayerShape(8, 0, 16, 176))
    assert set(factors) == {f"q_proj.{part}" for part in ("reduce.weight", "expand.weight", "expand.bias")}
    assert factors["q_proj.expand.bias"] is layer.q_proj.bias
