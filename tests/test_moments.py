import numpy as np
import pytest
import torch

from olica.methods.moments import Moments, cosine, cross, diagonal, full, needs, per_head, total

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
    assert moments.statistics == {full(X), total(X), diagonal(Y)}
    assert moments.taps == {X, Y}


def test_half_precision_is_summed_in_single():
    moments = Moments([full(X)], num_heads=1)
    moments.update({X: torch.full((1, 4096, 2), 100.0, dtype=torch.float16)})  # 4e7 overflows float16
    assert moments.about_centre(full(X)).dtype == torch.float32
    assert moments[full(X)][0, 1] == pytest.approx(4096 * 1e4)


def test_a_large_constant_does_not_hide_what_varies():
    x = torch.randn(5, 400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[..., 1] = 3000 + 1e-2 * x[..., 1]
    moments = Moments([full(X), cross(X, Y), diagonal(Y)], num_heads=1)
    for batch in x.float():
        moments.update({X: batch, Y: batch[:, :2]})
    exact = x.float().double().flatten(0, 1).numpy()
    found = {s: moments[s].numpy() / len(exact) for s in (full(X), cross(X, Y), total(X), diagonal(Y), diagonal(X))}
    mean = found[total(X)]
    covariance = np.cov(exact.T, bias=True)
    np.testing.assert_allclose(found[full(X)] - np.outer(mean, mean), covariance, atol=2e-6)
    np.testing.assert_allclose(moments.about_mean(X).numpy() / len(exact), covariance, rtol=1e-4, atol=1e-7)
    assert moments.about_mean(X).dtype == torch.float64
    np.testing.assert_allclose(found[cross(X, Y)] - np.outer(mean, mean[:2]), covariance[:, :2], atol=2e-6)
    np.testing.assert_allclose(found[diagonal(Y)] - mean[:2] ** 2, covariance.diagonal()[:2], atol=2e-6)
    np.testing.assert_allclose(found[diagonal(X)] - mean**2, covariance.diagonal(), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cosine_is_that_of_every_token(dtype):
    """The second place has another direction, another length and, for one token, the opposite one."""
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(2, 5, 6, generator=generator).to(dtype) for _ in range(2)] for _ in range(3)]
    batches[1][1][0, 2] = -3 * batches[1][0][0, 2]
    moments = Moments([cosine("layer_input", "layer_output")], num_heads=1)
    assert moments.taps == {"layer_input", "layer_output"}
    for x, y in batches:
        moments.update({"layer_input": x, "layer_output": y})
    flat = [[t.double().flatten(0, 1).numpy() for t in batch] for batch in batches]
    pairs = [pair for x, y in flat for pair in zip(x, y, strict=True)]
    expected = sum(a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs)
    assert moments.count == len(pairs) == 30
    assert moments[cosine("layer_input", "layer_output")].item() == pytest.approx(expected, abs=1e-5)


def test_sums_that_are_dropped_are_gone_and_the_others_stay(activations):
    moments = Moments([diagonal(X), total(Y)], num_heads=1)
    moments.update(activations[0])
    before = moments[total(Y)]
    moments.drop([diagonal(X), full(Y)])  # of which one was never summed
    assert torch.equal(moments[total(Y)], before)
    with pytest.raises(KeyError):
        moments[diagonal(X)]


@pytest.mark.parametrize("later", [diagonal(X), full(X), total(X), cross(X, Y), diagonal(Y), total(Y)])
def test_what_later_statistics_are_read_off_outlives_the_others(activations, later):
    """A diagonal that is read off a matrix, and the sums that turn what is about a centre into what is about zero."""
    dropped = [total(X), full(X), total(Y), cross(X, Y)]
    moments = Moments([*dropped, diagonal(X), diagonal(Y)], num_heads=1)
    for batch in activations:
        moments.update(batch)
    before = moments[later].clone()
    moments.drop(dropped, later=[later])
    assert torch.equal(moments[later], before)
    for statistic in {full(X), cross(X, Y)} - {later}:
        with pytest.raises(KeyError):
            moments[statistic]


def test_what_was_summed_covers_what_follows_from_it():
    moments = Moments([full(X), diagonal(Y)], num_heads=1)
    assert moments.cover([full(X), diagonal(X), diagonal(Y), total(X)]) and moments.cover([])
    assert not moments.cover([full(X), full(Y)]) and not moments.cover([total(Y)])


def test_the_mean_is_that_of_the_tokens(activations):
    moments = Moments([total(X)], num_heads=1)
    for batch in activations:
        moments.update(batch)
    expected = torch.cat([batch[X].flatten(0, 1) for batch in activations]).double().mean(0)
    torch.testing.assert_close(moments.mean(X), expected, rtol=1e-6, atol=1e-7)


def test_not_finite_names_the_tap():
    moments = Moments([total(X), diagonal(Y)], num_heads=1)
    moments.update({X: torch.ones(1, 2, 3), Y: torch.tensor([[[1.0, float("nan")]]])})
    assert moments.not_finite() == [Y]


def test_needs_marks_a_function():
    marked = needs(full(X), total(Y))(lambda x: 2 * x)
    assert marked.needs == {full(X), total(Y)} and marked(4) == 8
