"""Units that go and come in a least-squares problem, against removing them and solving anew."""

from itertools import combinations

import numpy as np
import pytest
import torch
from by_obs import ByHand, regularised
from conftest import make_llama, prune, seen

from olica.errors import UsageError
from olica.methods.linalg import SingularError
from olica.methods.moments import Moments, full
from olica.methods.obs import LeastError, LeastSquaresTable, exchange, remove
from olica.methods.refit import LeastSquares, with_ridge
from olica.methods.thinning import highest
from olica.model.modeling_olica import projections_of

O, F, N = 7, 12, 300  # noqa: E741
DAMPING = 0.01
IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
WIDTHS = pytest.mark.parametrize("width", [1, 3])


def problem(width: int, seed: int = 0, features: int = F) -> tuple[ByHand, LeastSquaresTable]:
    """Correlated features, one of which is always zero and two of which are nearly the same."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(N, features)) @ generator.normal(size=(features, features)) + 0.5
    x[:, 8], x[:, 5] = 0.0, x[:, 2] + 0.01 * x[:, 5]
    weight = generator.normal(size=(O, features))
    regular = with_ridge(torch.from_numpy(x.T @ x / N), DAMPING)
    by_hand = ByHand(weight, regularised(x, DAMPING), width)
    return by_hand, LeastSquaresTable(torch.from_numpy(weight), regular, width)


def staying(table: LeastSquaresTable) -> set[int]:
    return set(table.staying.nonzero().flatten().tolist())


def compare(by_hand: ByHand, table: LeastSquaresTable) -> None:
    """The costs and gains of all units and the columns that stay are those of a fresh solution."""
    stay = staying(table)
    expected = by_hand.costs(stay) | by_hand.gains(stay)
    scale = max(expected.values())
    np.testing.assert_allclose(table.changes(), [expected[u] for u in sorted(expected)], rtol=1e-7, atol=1e-10 * scale)
    found = by_hand.solved(stay)[:, by_hand.columns(stay)]
    np.testing.assert_allclose(table.weight, found, rtol=1e-7, atol=1e-9)


@WIDTHS
def test_the_error_of_a_removal_is_that_of_removing_and_solving_anew(width):
    by_hand, table = problem(width)
    compare(by_hand, table)
    for units in ([1], [0, 3]):
        before = by_hand.error(staying(table))
        change = table.pivot(torch.tensor(units))
        assert change == pytest.approx(by_hand.error(staying(table)) - before, rel=1e-8)
        compare(by_hand, table)


@WIDTHS
def test_a_group_costs_w_times_the_inverse_of_its_block_of_the_inverse(width):
    """The equation of the paper: tr w_G [H^-1_GG]^-1 w_G^T."""
    by_hand, table = problem(width)
    inverse = np.linalg.inv(by_hand.samples.T @ by_hand.samples / N)
    for unit, found in enumerate(table.changes()):
        group = by_hand.columns({unit})
        w = by_hand.weight[:, group]
        assert found.item() == pytest.approx(np.trace(w @ np.linalg.inv(inverse[np.ix_(group, group)]) @ w.T), rel=1e-8)


@WIDTHS
def test_after_many_pivots_the_inverse_is_a_fresh_one(width):
    by_hand, table = problem(width)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        side = table.staying.nonzero().flatten() if table.staying.sum() > 2 else (~table.staying).nonzero().flatten()
        table.pivot(side[torch.randperm(len(side), generator=generator)[:2]])
    compare(by_hand, table)
    columns = by_hand.columns(staying(table))
    moment = by_hand.samples.T @ by_hand.samples / N
    fresh = np.linalg.inv(moment[np.ix_(columns, columns)])
    np.testing.assert_allclose(-table._matrix[columns][:, columns], fresh, rtol=1e-7, atol=1e-9 * abs(fresh).max())


@WIDTHS
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_is_that_of_a_slow_greedy_removal(width, seed):
    for kept in range(1, F // width):
        by_hand, table = problem(width, seed)
        error = remove(table, kept, smallest=1)
        assert staying(table) == by_hand.greedy(kept)
        assert error == pytest.approx(by_hand.error(staying(table)), rel=1e-8)


@pytest.mark.parametrize(
    ("smallest", "share", "groups"),
    [(3, 0.0, [3] * 7), (1, 0.5, [10, 5, 3, 1, 1, 1]), (8, 1 / 16, [8, 8, 5]), (100, 0.0, [21])],
)
def test_several_go_at_once(monkeypatch, smallest, share, groups):
    by_hand, table = problem(1, features=30)
    pivot, sizes = table.pivot, []
    monkeypatch.setattr(table, "pivot", lambda units: sizes.append(len(units)) or pivot(units))
    error = remove(table, 9, smallest, share)
    assert sizes == groups and staying(table) == by_hand.greedy(9, smallest, share)
    assert error == pytest.approx(by_hand.error(staying(table)), rel=1e-8)


@pytest.mark.parametrize("features", [12, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_exchanges_never_raise_the_error(features, seed):
    by_hand, table = problem(1, seed, features)
    left = remove(table, features // 3, smallest=features)  # a poor choice
    chosen = staying(table)
    for rounds in (1, 3, 1000):
        fell = exchange(table, rounds)
        assert fell >= 0 and staying(table) == (chosen := by_hand.exchanged(chosen, rounds))
        left -= fell
        assert left == pytest.approx(by_hand.error(chosen), rel=1e-8)
        compare(by_hand, table)
    assert exchange(table, 1000) == 0 and staying(table) == chosen
    assert left < by_hand.error(by_hand.greedy(features // 3, smallest=features))


def test_exchanges_find_what_greedy_removal_missed():
    """The best of all choices, which is seldom the greedy one where features are alike."""
    greedy, searched = [], []
    for seed in range(8):
        by_hand, table = problem(1, seed)
        best = min(by_hand.error(set(kept)) for kept in combinations(range(F), 4))
        left = remove(table, 4, smallest=4)
        greedy.append(left / best)
        searched.append((left - exchange(table, 100)) / best)
    assert min(searched) == pytest.approx(1, rel=1e-8) and sum(searched) < sum(greedy)
    assert all(after <= before for before, after in zip(greedy, searched, strict=True))


def test_no_unit_is_left_to_exchange_where_all_stay():
    _, table = problem(1)
    assert remove(table, F, 1) == 0 and exchange(table, 10) == 0 and table.staying.all()


def layer_of(groups: int, moment_rank: int | None = None):
    """A layer of a tiny model and the moments of random inputs, of a rank that may be low."""
    generator = torch.Generator().manual_seed(0)
    weights = projections_of(make_llama(num_key_value_heads=groups).requires_grad_(False).model.layers[0])
    inputs = {
        tap: torch.randn(500, width, generator=generator) for tap, width in (("heads", 64), ("intermediate", 176))
    }
    if moment_rank:
        inputs = {tap: x[:moment_rank] for tap, x in inputs.items()}
    moments = Moments([full("heads"), full("intermediate")], 4)
    moments.update(inputs)
    return seen(weights, moments, groups), inputs


@pytest.mark.parametrize(("tap", "projection"), [("heads", "o_proj"), ("intermediate", "down_proj")])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_refit_leaves_the_error_that_was_compared(groups, tap, projection):
    """The columns of the table are those of the recipe's refit, whose ridge is the same lambda."""
    layer, inputs = layer_of(groups)
    select = LeastError(projection, tap, 0.05)
    units = groups if tap == "heads" else 176
    kept = select(layer, units // 2)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == units // 2
    weight, moment = getattr(layer.weights, projection).weight.detach(), layer.moments[full(tap)]
    table = LeastSquaresTable(weight, with_ridge(moment, 0.05), weight.shape[1] // units)
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    table.pivot(gone.nonzero().flatten())
    columns = torch.arange(weight.shape[1]).unflatten(0, (units, -1))[kept].flatten()
    torch.testing.assert_close(select.refit(weight, columns, moment), table.weight, rtol=1e-8, atol=1e-10)
    x = inputs[tap].double().numpy()
    by_hand = ByHand(weight.double().numpy(), regularised(x, 0.05), weight.shape[1] // units)
    np.testing.assert_allclose(table.weight, by_hand.solved(set(kept.tolist()))[:, columns], rtol=1e-4, atol=1e-5)


def test_too_small_a_damping_is_said_in_a_sentence():
    layer, _ = layer_of(4, moment_rank=5)
    with pytest.raises(SingularError, match="--damping 1e-20 is too small") as caught:
        LeastError("down_proj", "intermediate", 1e-20)(layer, 100)
    assert caught.value.inputs == "the input of down_proj"
    with pytest.raises(SingularError, match="--damping 1e-20 is too small"):
        LeastSquares(1e-20, of_all=True, flag="damping")(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(3, 3))


@pytest.mark.parametrize("recipe", ["slimgpt", "osscar"])
def test_a_run_says_which_layer_it_was(recipe):
    with pytest.raises(UsageError, match="--damping 1e-18 is too small .*: in layer 0 the regression on the input of"):
        prune(make_llama(), IDS[:1, :8], recipe, 0.3, damping=1e-18)


def test_inputs_that_are_always_zero_do_no_harm():
    layer, inputs = layer_of(4)
    moments = Moments([full("intermediate")], 4)
    moments.update({"intermediate": torch.zeros_like(inputs["intermediate"])})
    layer = seen(layer.weights, moments)
    norms = layer.weights.down_proj.weight.detach().square().sum(0)
    found = LeastError("down_proj", "intermediate", DAMPING, rounds=3)(layer, 100)
    assert torch.equal(found, highest(norms, 100))
