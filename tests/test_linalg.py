import numpy as np
import pytest
import torch

from olica.methods import linalg
from olica.methods.linalg import (
    RegressionSums,
    SingularError,
    by_rows,
    low_rank_split,
    multiple_correlation,
    principal_components,
    ridge_regression,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def sums_of(x: torch.Tensor, y: torch.Tensor) -> RegressionSums:
    """Sums about centres that are no means."""
    a, b = x[0] + 1, y[0] - 2
    x, y = x - a, y - b
    return RegressionSums(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0), a, b)


def test_principal_components_are_the_leading_singular_vectors(generator):
    matrix = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    found = principal_components(matrix.T @ matrix, 5).numpy()
    _, _, expected = np.linalg.svd(matrix.numpy())
    overlap = np.abs(expected[:5] @ found)  # a basis vector is known up to its sign
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_low_rank_split_reaches_the_weighted_optimum(generator, shape):
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    norms = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1
    reduce, expand = low_rank_split(weight, norms.square(), 7)
    assert reduce.shape == (7, shape[1]) and expand.shape == (shape[0], 7)
    error = np.linalg.norm(((weight - expand @ reduce) * norms).numpy())
    dropped = np.linalg.svd((weight * norms).numpy(), compute_uv=False)[7:]  # Eckart and Young
    assert error == pytest.approx(np.linalg.norm(dropped), rel=1e-10)


def test_low_rank_split_beats_perturbed_factors(generator):
    weight = torch.randn(9, 14, generator=generator, dtype=torch.float64)
    norms = torch.rand(14, generator=generator, dtype=torch.float64)
    reduce, expand = low_rank_split(weight, norms.square(), 3)
    best = ((weight - expand @ reduce) * norms).norm()
    for _ in range(50):
        nudge = 0.05 * torch.randn(9, 3, generator=generator, dtype=torch.float64)
        assert ((weight - (expand + nudge) @ reduce) * norms).norm() > best


def test_low_rank_split_takes_a_full_second_moment(generator):
    weight = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, 16, generator=generator, dtype=torch.float64) @ torch.randn(
        16, 16, generator=generator, dtype=torch.float64
    )
    reduce, expand = low_rank_split(weight, inputs.T @ inputs, 4)
    error = np.linalg.norm((inputs @ (weight - expand @ reduce).T).numpy())
    dropped = np.linalg.svd((inputs @ weight.T).numpy(), compute_uv=False)[4:]
    assert error == pytest.approx(np.linalg.norm(dropped), rel=1e-9)


def test_low_rank_split_survives_a_feature_that_is_always_zero(generator):
    weight = torch.randn(6, 8, generator=generator)
    norms = torch.ones(8)
    norms[3] = 0
    reduce, expand = low_rank_split(weight, norms, 6)
    assert torch.isfinite(reduce).all() and torch.isfinite(expand).all()
    torch.testing.assert_close(expand @ reduce, weight.double())


def test_ridge_regression_is_least_squares_on_the_augmented_system(generator):
    x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    ridge = 2.5
    augmented_x = np.vstack([x.numpy(), np.sqrt(ridge) * np.eye(8)])
    augmented_y = np.vstack([y.numpy(), np.zeros((8, 5))])
    expected = np.linalg.lstsq(augmented_x, augmented_y, rcond=None)[0]
    np.testing.assert_allclose(ridge_regression(sums_of(x, y), ridge).numpy(), expected, atol=1e-12)


def test_ridge_regression_with_fewer_tokens_than_features(generator):
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    solution = ridge_regression(sums_of(x, y), 1e-3).numpy()
    gradient = x.numpy().T @ (x.numpy() @ solution - y.numpy()) + 1e-3 * solution
    np.testing.assert_allclose(gradient, 0, atol=1e-10)


def test_ridge_regression_refuses_a_singular_system():
    x = torch.zeros(4, 3)
    with pytest.raises(SingularError):
        ridge_regression(sums_of(x, torch.ones(4, 2)), 0.0)


def test_ridge_regression_leaves_the_sums_alone(generator):
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    sums = sums_of(x, x)
    before = sums.xx.clone()
    ridge_regression(sums, 1.0)
    assert torch.equal(sums.xx, before)


def test_multiple_correlation_is_the_correlation_with_the_prediction(generator):
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64) + 3
    y = x @ torch.randn(6, 4, generator=generator, dtype=torch.float64)
    y += torch.randn(50, 4, generator=generator, dtype=torch.float64) - 1
    sums = sums_of(x, y)
    solution = ridge_regression(sums, 0.7)
    predicted = (x @ solution).numpy()
    expected = [np.corrcoef(y[:, j].numpy(), predicted[:, j])[0, 1] for j in range(4)]
    np.testing.assert_allclose(multiple_correlation(sums, solution).numpy(), expected, atol=1e-10)


def test_multiple_correlation_of_a_constant_column_is_zero(generator):
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = torch.cat([x[:, :1], torch.full((20, 1), 2.0, dtype=torch.float64)], dim=1)
    sums = sums_of(x, y)
    correlation = multiple_correlation(sums, torch.zeros(3, 2, dtype=torch.float64))
    assert correlation.tolist() == [0.0, 0.0]
    assert multiple_correlation(sums, ridge_regression(sums, 1e-6))[0] == pytest.approx(1)


@pytest.mark.parametrize("block", [linalg.DOUBLE_BLOCK, 4])
def test_rows_are_worked_on_in_double_precision_in_blocks(monkeypatch, block):
    monkeypatch.setattr(linalg, "DOUBLE_BLOCK", block)
    matrix = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = by_rows(lambda rows: rows.square().sum(1), matrix)
    np.testing.assert_allclose(found.numpy(), (matrix.double().numpy() ** 2).sum(1), rtol=1e-14)
