"""Thinning: what stays of a map, how it is refitted, and what is known of the rest."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import make_llama, seen, work_on

from olica.methods.correction import LowRankCorrection, equal_output_weights, paper_ridge, residual_sums
from olica.methods.feed_forward import ThinnedMLP
from olica.methods.moments import Moments, full, needs, total
from olica.methods.recipe import Method
from olica.methods.shares import Corrections, FixedShares, kept_by_code, released_sparsities
from olica.methods.thinning import RemovedMean, highest, thin
from olica.model.configuration_olica import LayerShape
from olica.pruning.layers import prune_layers
from olica.pruning.progress import Progress

F, KEPT = 176, torch.arange(0, 176, 3)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 90, 64, generator=generator) @ torch.randn(64, 64, generator=generator) / 8 + 0.3


@pytest.fixture
def intermediate(mlp, inputs):
    with torch.no_grad():
        return mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)


@pytest.fixture
def view(layer, inputs, intermediate):
    """The layer with all that residuals and refits read."""
    moments = Moments(residual_sums.needs | {full("intermediate")}, 4)
    moments.update({"mlp_input": inputs, "intermediate": intermediate})
    return seen(layer, moments)


class Toy:
    """A refit that takes no memory worth counting."""

    is_centred = False

    def __init__(self, function):
        self.function = function

    def workspace(self, outputs, features, kept):
        return 0

    def __call__(self, dense, kept, moment):
        return self.function(dense, kept, moment)


@Toy
def scaled(dense, kept, moment):
    """What stays is scaled up by what went."""
    return dense[:, kept] * (dense.shape[1] / len(kept))


@Toy
def least_squares(dense, kept, moment):
    """W_K + W_R C_RK C_KK^-1 (O, k), by numpy, from the second moments of the input."""
    moment, kept, weight = moment.numpy(), kept.numpy(), dense.detach().double().numpy()
    return torch.from_numpy(weight @ moment[:, kept] @ np.linalg.pinv(moment[np.ix_(kept, kept)], rcond=1e-10)).float()


def by_moment(refit, view):
    """The refit with the second moment that it reads."""
    return refit and partial(refit, moment=view.moments[full("intermediate")])


REFITS = pytest.mark.parametrize("refit", [None, scaled, least_squares])


@pytest.mark.parametrize("kept", [1, 9, 40])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rows", [(), (3,)])
def test_the_highest_stay_and_a_share_of_the_lowest(rows, fraction, kept):
    scores = torch.randn(*rows, 40, generator=torch.Generator().manual_seed(0))
    found = highest(scores, kept, fraction)
    assert found.shape == (*rows, kept)
    for indices, part in zip(found.view(-1, kept).tolist(), scores.view(-1, 40).numpy(), strict=True):
        order = np.argsort(part).tolist()
        protected = min(int(fraction * 40), kept)
        assert indices == sorted(order[:protected] + order[40 - (kept - protected) :])


def test_equal_scores_go_in_the_order_of_their_indices():
    assert highest(torch.zeros(6), 2).tolist() == [4, 5]
    assert highest(torch.tensor([1.0, 0, 1, 0, 1]), 2).tolist() == [2, 4]


@REFITS
def test_what_is_lost_is_the_difference_of_the_outputs(view, intermediate, refit):
    dense = view.weights.down_proj.weight.detach()
    thinned = thin(dense, KEPT, by_moment(refit, view))
    columns, change = thinned.lost()
    x = intermediate.flatten(0, 1).double()
    expected = x @ dense.double().T - x[:, KEPT] @ thinned.weight.double().T
    torch.testing.assert_close(x[:, columns] @ change.T, expected, rtol=1e-6, atol=1e-7)
    assert change.dtype == torch.float64
    if refit is None:
        assert columns.tolist() == [i for i in range(F) if i % 3] and torch.equal(thinned.weight, dense[:, KEPT])
    else:
        assert columns.tolist() == list(range(F))


def test_least_squares_loses_less_than_leaving_what_stays(view, intermediate):
    dense, x = view.weights.down_proj.weight.detach(), intermediate.flatten(0, 1).double()

    def error(refit) -> float:
        columns, change = thin(dense, KEPT, by_moment(refit, view)).lost()
        return (x[:, columns] @ change.T).norm().item()

    exact = np.linalg.lstsq(x[:, KEPT].numpy(), (x @ dense.double().T).numpy(), rcond=None)[1].sum() ** 0.5
    assert error(least_squares) == pytest.approx(exact, rel=1e-3)
    assert error(least_squares) < error(None) < error(scaled)


def thinned_mlp(refit, *repairs) -> ThinnedMLP:
    mark = torch.zeros(F)
    mark[KEPT] = 1
    return ThinnedMLP(needs()(lambda layer: mark), refit=refit, repairs=repairs)


def run_thinned(mlp, weights, inputs) -> np.ndarray:
    """The thinned MLP's output (tokens, D), float64."""
    with torch.no_grad():
        gate, up = (inputs @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in ("gate_proj", "up_proj"))
        output = (mlp.act_fn(gate) * up) @ weights["down_proj.weight"].T + weights["down_proj.bias"]
    return output.flatten(0, 1).double().numpy()


@REFITS
def test_a_correction_after_a_refit_is_that_of_running_both_mlps(mlp, view, inputs, refit):
    rank, percdamp, shape = 6, 0.01, LayerShape(0, 0, 16, len(KEPT), correction_rank=6)
    torch.nn.init.normal_(mlp.down_proj.bias)  # in both, so that it is no part of the residual
    stage = thinned_mlp(refit, LowRankCorrection(paper_ridge, percdamp, equal_output_weights))
    assert stage.needs(shape) == residual_sums.needs | ({full("intermediate")} if refit else set())
    weights = stage(view, shape)
    x = inputs.flatten(0, 1).double().numpy()
    residual = mlp(inputs).detach().flatten(0, 1).double().numpy() - run_thinned(mlp, weights, inputs)
    ridge = percdamp * (x**2).sum(0).mean()
    solution = np.linalg.solve(x.T @ x + ridge * np.eye(64), x.T @ residual)
    u, s, vt = np.linalg.svd(solution)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found = (weights["correction.expand.weight"] @ weights["correction.reduce.weight"]).T.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


@REFITS
def test_the_mean_of_what_is_lost_goes_into_the_bias(mlp, view, inputs, refit):
    torch.nn.init.normal_(mlp.down_proj.bias)
    mean = needs(total("intermediate"))(lambda layer: layer.moments.mean("intermediate"))
    stage, shape = thinned_mlp(refit, RemovedMean("down_proj", mean)), LayerShape(0, 0, 16, len(KEPT), down_bias=True)
    assert stage.needs(shape) == {total("intermediate")} | ({full("intermediate")} if refit else set())
    weights = stage(view, shape)
    weights["down_proj.bias"] = weights["down_proj.bias"].float()
    thinned, dense = run_thinned(mlp, weights, inputs), mlp(inputs).detach().flatten(0, 1).double().numpy()
    np.testing.assert_allclose(thinned.mean(0), dense.mean(0), atol=1e-4)


class Returning:
    """A stage that returns what it was given."""

    about = "nothing"

    def __init__(self, weights):
        self.weights = weights

    def needs(self, shape):
        return frozenset()

    def workspace(self, sizes, shape):
        return 0

    def __call__(self, layer, shape):
        return self.weights


ALLOCATE = FixedShares(released_sparsities, kept_by_code, 3.0, False, Corrections(0, 0.1, last_is_eligible=False))
DENSE = LayerShape(0, 0, 16, 176)


def prune_by(*stages: Returning, shape: LayerShape = DENSE) -> None:
    """Prune all layers of a model in one pass of the stages."""
    method = Method("pruned", None, ALLOCATE, (stages,))
    work = work_on(make_llama(), torch.zeros(2, 4, dtype=torch.long), method)
    prune_layers(work, [shape] * 3, [{}] * 3, Progress())


@pytest.mark.parametrize(
    ("weights", "shape", "words"),
    [
        ({"q_proj.bias": torch.zeros(64)}, DENSE, "no place for self_attn.q_proj.bias"),
        ({"extra.weight": torch.zeros(64)}, DENSE, "no place for extra.weight"),
        ({"correction.reduce.weight": torch.zeros(3, 64)}, DENSE, "no place for correction.reduce.weight"),
        ({}, LayerShape(9, 0, 16, 176), "no weights were computed for self_attn.q_proj"),
        ({}, LayerShape(0, 0, 16, 176, down_bias=True), "no weights were computed for mlp.down_proj.bias"),
        ({"up_proj.weight": torch.zeros(100, 64)}, LayerShape(0, 0, 16, 100), "computed for mlp.gate_proj.weight"),
    ],
)
def test_what_a_stage_returns_is_what_the_layer_takes(weights, shape, words):
    with pytest.raises(RuntimeError, match=words):
        prune_by(Returning(weights), shape=shape)


def test_two_stages_return_no_weight_of_one_name():
    """Whichever of them came last would win in silence."""
    keys, values = ({f"{name}.weight": torch.zeros(64, 64)} for name in ("k_proj", "v_proj"))
    prune_by(Returning(keys), Returning(values))
    with pytest.raises(RuntimeError, match=r"k_proj\.weight"):
        prune_by(Returning(keys), Returning(values | keys))
