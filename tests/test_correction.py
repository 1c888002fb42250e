import numpy as np
import pytest
import torch
from conftest import make_llama

from olica.methods import correction
from olica.methods.correction import (
    RELEASED_RIDGE_TOKENS,
    RELEASED_TEMPERATURE,
    dense_output_sums,
    equal_output_weights,
    low_rank_correction,
    paper_ridge,
    released_output_weights,
    released_ridge,
    residual_sums,
)
from olica.methods.linalg import ridge_regression
from olica.methods.moments import Moments
from olica.methods.shares import Corrections, FixedShares, kept_by_code, released_sparsities
from olica.methods.sizes import Budget, Sizes


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 60, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8


@pytest.fixture
def moments(mlp, inputs):
    summed = Moments([*dense_output_sums.needs, *residual_sums.needs], 4)
    with torch.no_grad():
        intermediate = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
        summed.update({"mlp_input": inputs, "intermediate": intermediate, "mlp_output": mlp.down_proj(intermediate)})
    return summed


KEPT, REMOVED = torch.arange(0, 176, 2), torch.arange(1, 176, 2)


def lost(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """The channels that go, and what the down projection loses by it."""
    return REMOVED, layer.down_proj.weight[:, REMOVED].double()


def residual(mlp, inputs) -> np.ndarray:
    """f(X) - f_hat(X) by running both MLPs."""
    intermediate = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    silenced = torch.zeros_like(intermediate)
    silenced[..., KEPT] = intermediate[..., KEPT]
    return (mlp.down_proj(intermediate) - mlp.down_proj(silenced)).detach().flatten(0, 1).double().numpy()


def check_sums(sums, x: np.ndarray, y: np.ndarray) -> None:
    assert sums.count == len(x)
    x, y = x - sums.x_centre.numpy(), y - sums.y_centre.detach().numpy()
    for found, expected in (
        (sums.x, x.sum(0)),
        (sums.y, y.sum(0)),
        (sums.xx, x.T @ x),
        (sums.xy, x.T @ y),
        (sums.yy, (y**2).sum(0)),
    ):
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("block", [correction.DOUBLE_BLOCK, 30])
def test_residual_sums_are_those_of_the_residual(mlp, layer, inputs, moments, monkeypatch, block):
    """In one block of channels, and in several of which the last is smaller."""
    monkeypatch.setattr(correction, "DOUBLE_BLOCK", block)
    x = inputs.flatten(0, 1).double().numpy()
    check_sums(residual_sums(moments, *lost(layer)), x, residual(mlp, inputs))


def test_dense_output_sums_are_those_of_the_output(mlp, inputs, moments):
    x = inputs.flatten(0, 1).double().numpy()
    check_sums(dense_output_sums(moments), x, mlp(inputs).detach().flatten(0, 1).double().numpy())


def test_released_output_weights_come_from_the_correlations(mlp, layer, inputs, moments):
    assert RELEASED_TEMPERATURE == 0.05
    sums = residual_sums(moments, *lost(layer))
    solution = ridge_regression(sums, 5.0).detach()
    x, e = inputs.flatten(0, 1).double().numpy(), residual(mlp, inputs)
    predicted, n = x @ solution.numpy(), len(x)
    # Mean product over unbiased deviations, as the released code has it.
    product = ((predicted - predicted.mean(0)) * (e - e.mean(0))).mean(0)
    correlation = product / (predicted.std(0, ddof=1) * e.std(0, ddof=1))
    expected = 1 / (1 + np.exp(-(correlation - correlation.mean()) / 0.05))
    assert n == 240
    np.testing.assert_allclose(released_output_weights(sums, solution).detach().numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize("output_weights", [released_output_weights, equal_output_weights])
def test_correction_is_the_weighted_svd_of_the_ridge_solution(mlp, layer, inputs, moments, output_weights):
    rank, ridge = 6, 3.0
    sums = residual_sums(moments, *lost(layer))
    factors = low_rank_correction(sums, ridge, rank, output_weights)
    x, e = inputs.flatten(0, 1).double().numpy(), residual(mlp, inputs)
    augmented = np.vstack([x, np.sqrt(ridge) * np.eye(64)])
    solution = np.linalg.lstsq(augmented, np.vstack([e, np.zeros((64, 64))]), rcond=None)[0]
    weights = output_weights(sums, torch.from_numpy(solution)).detach().numpy()
    u, s, vt = np.linalg.svd(solution * weights)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank] / weights
    found = (factors["correction.expand.weight"] @ factors["correction.reduce.weight"]).T.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_full_rank_correction_is_the_ridge_solution(layer, moments):
    sums = residual_sums(moments, *lost(layer))
    factors = low_rank_correction(sums, 3.0, 64, released_output_weights)
    found = (factors["correction.expand.weight"] @ factors["correction.reduce.weight"]).T
    torch.testing.assert_close(found, ridge_regression(sums, 3.0), rtol=1e-6, atol=1e-8)


def test_ridges():
    assert RELEASED_RIDGE_TOKENS == 128 * 128
    assert released_ridge(0.5, 8.0, tokens=256 * 128) == pytest.approx(2.0)  # half of the paper's
    assert released_ridge(0.5, 8.0, tokens=24 * 32) == pytest.approx(4 / (24 / 128 * 32 / 128))
    assert paper_ridge(0.5, 8.0, 256 * 128) == 4.0


@pytest.mark.parametrize(
    ("correlations", "number", "last_is_eligible", "expected"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.95], 2, True, [1, 4]),
        ([0.1, 0.9, 0.3, 0.2, None], 2, False, [1, 2]),
        ([0.1, 0.9, 0.3, 0.2, 0.95], 2, False, [1, 2]),
        ([None] * 5, 0, True, []),
    ],
)
def test_the_best_explained_mlps_get_a_correction(correlations, number, last_is_eligible, expected):
    """The released code leaves the last layer out, and does not rank it; the others are in the order of the layers."""
    sizes = [Sizes.of(make_llama().config)] * 5
    corrections = Corrections(number, ratio=6 / 64, last_is_eligible=last_is_eligible)
    allocate = FixedShares(released_sparsities, kept_by_code, 3.0, False, corrections)
    findings = [{} if value is None else {"correlation": torch.tensor(value)} for value in correlations]
    plan = allocate(sizes, Budget(5 * sizes[0].layer, 0.2), findings)
    assert [index for index, shape in enumerate(plan) if shape.correction_rank] == expected
    assert {shape.correction_rank for shape in plan} <= {0, 6}
