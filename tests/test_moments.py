import numpy as np
import pytest
import torch

from olica.moments import Moments, Statistic, cross, diagonal, full, needs, per_head, total

X, Y = "mlp_input", "intermediate"


@pytest.fixture
def activations():
    generator = torch.Generator().manual_seed(0)
    return [
        {X: torch.randn(4, 7, 6, generator=generator), Y: torch.randn(4, 7, 10, generator=generator)} for _ in range(3)
    ]


def test_sums_over_batches_are_those_of_the_whole(activations):
    statistics = [total(X), diagonal(Y), full(X), per_head(X), cross(X, Y)]
    moments = Moments(statistics, num_heads=3)
    for batch in activations:
        moments.update(batch)
    x = np.concatenate([b[X].flatten(0, 1).numpy() for b in activations]).astype(np.float64)
    y = np.concatenate([b[Y].flatten(0, 1).numpy() for b in activations]).astype(np.float64)
    assert moments.count == len(x) == 84
    heads = x.reshape(len(x), 3, 2)
    expected = {
        total(X): x.sum(0),
        diagonal(Y): (y**2).sum(0),
        full(X): x.T @ x,
        per_head(X): np.einsum("nhi,nhj->hij", heads, heads),
        cross(X, Y): x.T @ y,
        diagonal(X): (x**2).sum(0),
    }
    for statistic, value in expected.items():
        np.testing.assert_allclose(moments[statistic].numpy(), value, rtol=1e-5, atol=1e-5)


def test_a_diagonal_is_not_summed_twice():
    moments = Moments([diagonal(X), full(X), diagonal(Y)], num_heads=1)
    assert moments.statistics == {full(X), diagonal(Y)}
    assert moments.taps == {X, Y}


def test_half_precision_is_summed_in_single(activations):
    moments = Moments([full(X)], num_heads=1)
    moments.update({X: torch.full((1, 4096, 2), 100.0, dtype=torch.float16)})  # 4e7 overflows float16
    assert moments[full(X)].dtype == torch.float32
    assert moments[full(X)][0, 1] == pytest.approx(4096 * 1e4)


def test_not_finite_names_the_tap():
    moments = Moments([total(X), diagonal(Y)], num_heads=1)
    moments.update({X: torch.ones(1, 2, 3), Y: torch.tensor([[[1.0, float("nan")]]])})
    assert moments.not_finite() == [Y]


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="median"):
        Moments([Statistic("median", X)], num_heads=1)


def test_needs_marks_a_function():
    assert needs(full(X), total(Y))(lambda: None).needs == (full(X), total(Y))
