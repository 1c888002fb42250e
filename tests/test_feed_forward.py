import numpy as np
import pytest
import torch
from conftest import seen

from olica.methods.feed_forward import (
    RELEASED_PROTECTED_FRACTION,
    ThinnedMLP,
    balanced_importance,
    paper_importance,
    released_importance,
)
from olica.methods.moments import Moments, diagonal, needs
from olica.methods.thinning import highest
from olica.model.configuration_olica import LayerShape


@pytest.fixture
def inputs():
    return torch.randn(2, 30, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 64)


@pytest.fixture
def moments(mlp, inputs):
    summed = Moments([diagonal("mlp_input"), diagonal("intermediate")], 4)
    with torch.no_grad():
        summed.update({"mlp_input": inputs, "intermediate": mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)})
    return summed


def wanda(mlp, inputs) -> dict[str, np.ndarray]:
    """|w| ||x|| of every weight of the three projections, channels along the first axis."""
    intermediate = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    norms = {
        name: np.linalg.norm(x.detach().flatten(0, 1).double().numpy(), axis=0)
        for name, x in (("in", inputs), ("mid", intermediate))
    }
    weights = {n: getattr(mlp, n).weight.detach().double().numpy() for n in ("gate_proj", "up_proj", "down_proj")}
    return {
        "gate": np.abs(weights["gate_proj"]) * norms["in"],
        "up": np.abs(weights["up_proj"]) * norms["in"],
        "down": (np.abs(weights["down_proj"]) * norms["mid"]).T,
    }


def test_released_importance_adds_l2_norms_of_all_three(mlp, layer, inputs, moments):
    expected = sum(np.linalg.norm(scores, axis=1) for scores in wanda(mlp, inputs).values())
    np.testing.assert_allclose(released_importance(seen(layer, moments)).detach().numpy(), expected, rtol=1e-5)


def test_balanced_importance_gives_all_three_the_same_weight(mlp, layer, inputs, moments):
    norms = [np.linalg.norm(scores, axis=1) for scores in wanda(mlp, inputs).values()]
    expected = sum(norm / norm.mean() for norm in norms)
    np.testing.assert_allclose(balanced_importance(seen(layer, moments)).detach().numpy(), expected, rtol=1e-5)
    with torch.no_grad():
        mlp.gate_proj.weight *= 8  # the activations that the moments are of stay as they were
    loud = balanced_importance(seen(layer, moments)).detach().numpy()
    np.testing.assert_allclose(loud, expected, rtol=1e-5, err_msg="a projection's own scale decides nothing")
    with torch.no_grad():
        mlp.gate_proj.weight *= 0
    silent = balanced_importance(seen(layer, moments)).detach().numpy()
    np.testing.assert_allclose(silent, expected - norms[0] / norms[0].mean(), rtol=1e-5)


def test_paper_importance_sums_up_and_down(mlp, layer, inputs, moments):
    scores = wanda(mlp, inputs)
    expected = scores["up"].sum(1) + scores["down"].sum(1)
    np.testing.assert_allclose(paper_importance(seen(layer, moments)).detach().numpy(), expected, rtol=1e-5)


def test_the_released_code_keeps_the_lowest_hundredth():
    assert RELEASED_PROTECTED_FRACTION == 0.01
    importance = torch.randperm(300, generator=torch.Generator().manual_seed(0)).double()
    kept = highest(importance, 200, RELEASED_PROTECTED_FRACTION)
    assert sorted(importance[kept].int().tolist()) == [0, 1, 2, *range(103, 300)]
    assert kept.tolist() == sorted(kept.tolist())


def test_without_protection_the_highest_stay():
    importance = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    assert highest(importance, 3, 0.0).tolist() == [0, 3, 4]
    assert highest(importance, 5, 0.0).tolist() == [0, 1, 2, 3, 4]


def test_the_pruned_mlp_is_the_dense_one_with_channels_silenced(mlp, layer, inputs):
    for bias in (mlp.gate_proj.bias, mlp.up_proj.bias, mlp.down_proj.bias):
        torch.nn.init.normal_(bias)
    kept, mark = torch.arange(0, 176, 3), torch.zeros(176)
    mark[kept] = 1
    stage = ThinnedMLP(needs()(lambda layer: mark))
    pruned = stage(seen(layer), LayerShape(0, 0, 16, len(kept)))
    assert stage(seen(layer), LayerShape(0, 0, 16, 176)) == {}, "an MLP that keeps every channel is left alone"
    gate = inputs @ pruned["gate_proj.weight"].T + pruned["gate_proj.bias"]
    up = inputs @ pruned["up_proj.weight"].T + pruned["up_proj.bias"]
    found = (mlp.act_fn(gate) * up) @ pruned["down_proj.weight"].T + pruned["down_proj.bias"]
    intermediate = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    silenced = torch.zeros_like(intermediate)
    silenced[..., kept] = intermediate[..., kept]
    torch.testing.assert_close(found, mlp.down_proj(silenced))
