"""Least-squares refits and the curve of their errors, against numpy on the samples themselves."""

import numpy as np
import pytest
import torch

from olica.methods.moments import Moments, full
from olica.methods.refit import LeastSquares, ScaledOutputs, refit_errors, with_moment, with_ridge

O, F, N = 7, 12, 400  # noqa: E741


@pytest.fixture
def samples() -> np.ndarray:
    """Correlated features (N, F), one of which never varies and one of which is always zero."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(N, F)) @ generator.normal(size=(F, F)) + 0.5
    x[:, 3], x[:, 8] = 2.0, 0.0
    return x


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(O, F))


def moment_of(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def with_pseudo_samples(x: np.ndarray, ridge: float) -> np.ndarray:
    """The samples and F more, so that their second moment is C + ridge I."""
    return np.concatenate([x, np.sqrt(N * ridge) * np.eye(F)])


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 3.0])
def test_errors_by_size_are_those_of_removing_and_refitting(samples, weight, ridge):
    moment = moment_of(samples)
    regular = with_ridge(torch.from_numpy(moment), ridge)
    scale = ridge * moment.diagonal().mean()
    np.testing.assert_allclose(regular.numpy(), moment + scale * np.eye(F), rtol=1e-12)
    x = with_pseudo_samples(samples, scale)
    y = x @ weight.T
    expected = [(y**2).sum() / N]
    for kept in range(1, F + 1):
        solution = np.linalg.lstsq(x[:, :kept], y, rcond=None)[0]
        expected.append(((y - x[:, :kept] @ solution) ** 2).sum() / N)
    found = refit_errors(torch.from_numpy(weight), regular).numpy()
    assert found.shape == (F + 1,) and found[-1] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * expected[0])


def test_errors_of_several_maps_at_once(samples, weight):
    moments = [with_ridge(torch.from_numpy(moment_of(x)), 0.1) for x in (samples, samples[::-1, ::-1].copy())]
    weights = torch.from_numpy(np.stack([weight, weight[::-1].copy()]))
    both = refit_errors(weights, torch.stack(moments))
    for part, one, moment in zip(both, weights, moments, strict=True):
        torch.testing.assert_close(part, refit_errors(one, moment))


@pytest.mark.parametrize("kept", [[0], [0, 3, 8], [1, 2, 4, 9, 11], list(range(F))])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_least_squares_draws_towards_the_old_columns(samples, weight, kept, ridge):
    """On samples whose targets for the pseudo-samples are the old columns."""
    moment = moment_of(samples)
    scale = ridge * moment.diagonal()[kept].mean()
    x = np.concatenate([samples[:, kept], np.sqrt(N * scale) * np.eye(len(kept))])
    y = np.concatenate([samples @ weight.T, np.sqrt(N * scale) * weight[:, kept].T])
    expected = np.linalg.lstsq(x, y, rcond=None)[0].T
    found = LeastSquares(ridge)(torch.from_numpy(weight), torch.tensor(kept), torch.from_numpy(moment))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    if len(kept) == F:
        np.testing.assert_allclose(found.numpy(), weight, rtol=1e-12)


@pytest.mark.parametrize("kept", [[0], [1, 2, 4, 9, 11]])
def test_the_ridge_may_be_one_of_all_features(samples, weight, kept):
    """The refit is then the best in the metric C + lambda I of all features: Optimal Brain Surgeon."""
    moment = moment_of(samples)
    x = with_pseudo_samples(samples, 0.1 * moment.diagonal().mean())
    expected = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    refit = LeastSquares(0.1, of_all=True)
    found = refit(torch.from_numpy(weight), torch.tensor(kept), torch.from_numpy(moment))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)


def test_features_that_are_always_zero_do_no_harm(weight):
    zero, kept = torch.zeros(F, F), torch.tensor([1, 5])
    found = LeastSquares(0.1)(torch.from_numpy(weight), kept, zero)
    np.testing.assert_array_equal(found.numpy(), weight[:, [1, 5]])
    assert torch.equal(found, LeastSquares(0.1, of_all=True)(torch.from_numpy(weight), kept, zero))
    assert torch.isfinite(refit_errors(torch.from_numpy(weight), with_ridge(zero, 0.1))).all()


def test_arguments_are_left_as_they_are(samples, weight):
    moment, dense = torch.from_numpy(moment_of(samples)), torch.from_numpy(weight)
    before = moment.clone(), dense.clone()
    with_ridge(moment, 0.3)
    LeastSquares(0.3)(dense, torch.tensor([0, 2]), moment)
    assert torch.equal(moment, before[0]) and torch.equal(dense, before[1])


def regressions(y: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Slope and intercept (O, 2) of every output on what is left of it."""
    return np.array([np.polyfit(b, a, 1) for a, b in zip(y.T, left.T, strict=True)])


@pytest.mark.parametrize("kept", [[0], [0, 2, 7], [1, 2, 4, 9, 11], list(range(F))])
def test_every_output_is_regressed_on_what_is_left_of_it(samples, weight, kept):
    y, left = samples @ weight.T, samples[:, kept] @ weight[:, kept].T
    covariance = N * np.cov(samples.T, bias=True)
    found = ScaledOutputs()(torch.from_numpy(weight), torch.tensor(kept), torch.from_numpy(covariance)).numpy()
    expected = regressions(y, left)
    np.testing.assert_allclose(found, expected[:, :1] * weight[:, kept], rtol=1e-8)
    np.testing.assert_allclose((y - samples[:, kept] @ found.T).mean(0), expected[:, 1], atol=1e-8)
    assert len(kept) == F or np.abs(expected[:, 0] - 1).min() > 1e-3


def test_an_output_of_which_nothing_varies_stays_as_it_is(samples, weight):
    """Because its columns are zero, because what it reads is constant, or but for rounding."""
    weight[2] = 0
    kept, covariance = [3, 8, 5], N * np.cov(samples.T, bias=True)
    weight[4, 5] = 0  # it reads the two features that do not vary
    weight[5, 5] = 1e-7
    found = ScaledOutputs()(torch.from_numpy(weight), torch.tensor(kept), torch.from_numpy(covariance)).numpy()
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[[2, 4, 5]], weight[[2, 4, 5]][:, kept])
    assert (np.abs(found[[0, 1, 3, 6], 2] - weight[[0, 1, 3, 6], 5]) > 1e-3).all()


def test_a_refit_has_the_moment_that_it_wants(samples):
    moments = Moments([full("heads")], num_heads=1)
    moments.update({"heads": torch.from_numpy(samples)})

    def wanted(refit) -> np.ndarray:
        return with_moment(refit, moments, "heads").keywords["moment"].numpy()

    np.testing.assert_allclose(wanted(LeastSquares(1.0)), samples.T @ samples, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(wanted(ScaledOutputs()), N * np.cov(samples.T, bias=True), rtol=1e-4, atol=1e-2)
    assert with_moment(None, moments, "heads") is None
