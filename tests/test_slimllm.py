"""SlimLLM by brute force: ratios by a softmax, heads by correlation, channels by output, outputs by regression."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_threshold import features, inputs_of, weights_of
from conftest import as_method, make_llama, prune, prune_to, raising, seen
from tiny_families import make_family
from torch import nn

from olica.errors import UsageError
from olica.jobs import plan_before_survey
from olica.methods import similarity, slimllm
from olica.methods.feed_forward import released_importance
from olica.methods.moments import Moments
from olica.methods.recipes import RECIPES
from olica.methods.redundancy import best_by_swaps, block_covariances, redundancy
from olica.methods.similarity import CosineRatios, papers_selection, softmax_ratios
from olica.methods.sizes import Budget, Sizes
from olica.model.configuration_olica import LayerShape
from olica.model.families import FAMILIES
from olica.model.modeling_olica import projections_of

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))


def correlation(whole: np.ndarray, part: np.ndarray) -> float:
    """Sum over the outputs of |Pearson|, of activations (n, D); 0 where one does not vary."""
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(whole.T, part.T, strict=True) if a.std() > 0 and b.std() > 0]
    return np.abs(found).sum()


def added(x: np.ndarray, weight: np.ndarray, units: int) -> np.ndarray:
    """What each unit adds to the outputs (K, n, D)."""
    return np.stack([a @ b.T for a, b in zip(np.split(x, units, 1), np.split(weight, units, 1), strict=True)])


def redundancy_by_hand(parts: np.ndarray) -> np.ndarray:
    return np.array([correlation(parts.sum(0), parts.sum(0) - part) for part in parts])


def swapped_by_hand(parts: np.ndarray, kept: set[int]) -> set[int]:
    """The best swap of a kept and a gone unit, again and again."""
    whole, units = parts.sum(0), set(range(len(parts)))

    def quality(staying) -> float:
        return correlation(whole, parts[sorted(staying)].sum(0))

    while kept < units:
        best = max(((kept - {out}) | {into} for out in kept for into in units - kept), key=quality)
        if quality(best) <= quality(kept) * (1 + 1e-9):
            break
        kept = best
    return kept


def stays_by_hand(parts: np.ndarray, kept: int) -> list[int]:
    """The least redundant units, then swaps."""
    order = np.argsort(-redundancy_by_hand(parts), kind="stable")
    return sorted(swapped_by_hand(parts, set(order[len(order) - kept :].tolist())))


def units_of(seed: int, units: int = 7, width: int = 3, outputs: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Correlated activations (n, units width), none of mean zero, and weights (outputs, units width)."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(200, 4)) @ generator.normal(size=(4, units * width))
    x += 0.5 * generator.normal(size=x.shape) + generator.normal(size=x.shape[1])
    return x, generator.normal(size=(outputs, units * width))


def covariances_of(x: np.ndarray, weight: np.ndarray, units: int) -> torch.Tensor:
    covariance = len(x) * np.cov(x.T, bias=True)
    return block_covariances(torch.from_numpy(weight), torch.from_numpy(covariance), units)


def test_covariances_of_pairs_are_those_of_what_the_units_add():
    x, weight = units_of(0)
    parts = added(x, weight, 7)
    centred = parts - parts.mean(1, keepdims=True)
    np.testing.assert_allclose(covariances_of(x, weight, 7), np.einsum("gnd,hnd->dgh", centred, centred), rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_redundancy_is_that_of_explicit_activations(seed):
    x, weight = units_of(seed)
    expected = redundancy_by_hand(added(x, weight, 7))
    np.testing.assert_allclose(redundancy(covariances_of(x, weight, 7)), expected, rtol=1e-9)
    assert np.ptp(expected) > 0.05


def test_what_remains_may_have_the_opposite_sign():
    x, weight = units_of(0)
    weight[:, :3] = 0
    x[:, 0] = -2 * (x @ weight.T)[:, 0]  # the first unit takes twice from the first output what the others add
    weight[0, 0] = 1
    parts = added(x, weight, 7)
    assert np.corrcoef(parts.sum(0)[:, 0], parts[1:].sum(0)[:, 0])[0, 1] == pytest.approx(-1)
    np.testing.assert_allclose(redundancy(covariances_of(x, weight, 7)), redundancy_by_hand(parts), rtol=1e-9)


def test_the_swaps_are_those_of_explicit_activations():
    """From the least redundant units, which the search leaves for better ones more often than not."""
    moved = 0
    for seed, kept in itertools.product(range(6), (1, 3, 5)):
        x, weight = units_of(seed)
        parts, covariances = added(x, weight, 7), covariances_of(x, weight, 7)
        start = (-redundancy(covariances)).argsort(stable=True)[-kept:].sort().values
        found = best_by_swaps(covariances, start).tolist()
        assert found == stays_by_hand(parts, kept)
        moved += found != start.tolist()
    assert moved > 6


def test_one_unit_that_stays_is_the_best_of_all_and_all_stay_as_they_are():
    x, weight = units_of(3)
    parts, covariances = added(x, weight, 7), covariances_of(x, weight, 7)
    best = max(range(7), key=lambda unit: correlation(parts.sum(0), parts[unit]))
    assert all(best_by_swaps(covariances, torch.tensor([start])).tolist() == [best] for start in range(7))
    assert best_by_swaps(covariances, torch.tensor([6, 0, 2, 1, 4, 5, 3])).tolist() == list(range(7))


def test_outputs_and_units_that_do_not_vary_count_nothing():
    x, weight = units_of(5)
    weight[1] = 0
    x[:, 6:9] = 4.0  # the third unit adds a constant
    parts, covariances = added(x, weight, 7), covariances_of(x, weight, 7)
    np.testing.assert_allclose(redundancy(covariances), redundancy_by_hand(parts), rtol=1e-9)
    assert redundancy(covariances)[2].item() == pytest.approx(4)  # of five outputs, one of which is always zero
    zero = torch.zeros(5, 7, 7, dtype=torch.float64)
    assert not redundancy(zero).any() and best_by_swaps(zero, torch.tensor([1, 4])).tolist() == [1, 4]


def test_the_papers_values_and_the_line_through_them():
    assert (similarity.PAPERS, slimllm.PROTECTED_FRACTION) == (((0.2, 26 / 32, 10.0), (0.5, 30 / 32, 7.0)), 0.01)
    assert papers_selection(0.2, 32) == (26, pytest.approx(10)) and papers_selection(0.5, 32) == (30, pytest.approx(7))
    assert papers_selection(0.35, 32) == (28, pytest.approx(8.5))
    assert papers_selection(0.2, 30) == (24, pytest.approx(10)) and papers_selection(0.2, 1)[0] == 1
    assert papers_selection(0.9, 32) == (32, pytest.approx(3))


@pytest.mark.parametrize("alpha", [0.0, 3.0, 10.0])
def test_ratios_are_the_softmax_over_the_most_similar_layers(alpha):
    cosines = np.array([0.2, 0.9, 0.7, 0.95, 0.9, 0.4])
    chosen = [1, 2, 3, 4]
    expected = np.zeros(6)
    expected[chosen] = 4 * np.exp(alpha * cosines[chosen]) / np.exp(alpha * cosines[chosen]).sum()
    np.testing.assert_allclose(softmax_ratios(torch.from_numpy(cosines), 4, alpha), expected, rtol=1e-12)
    found = softmax_ratios(torch.from_numpy(cosines), 6, 1e9)  # whatever alpha, there is no layer that cannot lose
    assert (found > 0).all() and found[3].item() == pytest.approx(6)


LAYER = Sizes(hidden_size=64, num_heads=8, num_kv_heads=8, head_dim=8, intermediate_size=400)


def findings_of(*cosines: float) -> list[dict[str, torch.Tensor]]:
    return [{"cosine": torch.tensor(cosine, dtype=torch.float64)} for cosine in cosines]


def test_channels_are_lost_in_the_proportion_of_the_softmax():
    cosines = (0.1, 0.8, 0.85, 0.9, 0.6)
    plan = CosineRatios(3, 8.0, biases=True)([LAYER] * 5, Budget(5 * LAYER.layer, 0.2), findings_of(*cosines))
    lost = np.array([400 - shape.intermediate_size for shape in plan])
    assert [shape.down_bias for shape in plan] == [False, True, True, True, False] and lost[0] == lost[4] == 0
    share = np.exp(8 * np.array(cosines[1:4]))
    np.testing.assert_allclose(lost[1:4] / lost.sum(), share / share.sum(), atol=2 / lost.sum())
    heads = [8 - shape.kv_heads if shape.kv_heads else 0 for shape in plan]
    assert heads[0] == heads[4] == 0 and sum(heads) == round(8 * lost.sum() / 400)


def test_the_sparsity_decides_what_is_not_given():
    sizes = [LAYER] * 32
    for sparsity, given, expected in (
        (0.2, (-1, -1.0), (26, 10)),
        (0.5, (-1, -1.0), (30, 7)),
        (0.2, (20, -1.0), (20, 10)),
        (0.5, (-1, 0.0), (30, 0)),
    ):
        allocate, budget = CosineRatios(*given, biases=True), Budget(32 * LAYER.layer, sparsity)
        plan = allocate(sizes, budget, findings_of(*np.linspace(0.9, 0.95, 32).tolist()))
        lost = np.array([400 - shape.intermediate_size for shape in plan])
        assert np.flatnonzero(lost).tolist() == list(range(32 - expected[0], 32))
        last, first = lost[-1], lost[32 - expected[0]]
        assert last / first == pytest.approx(np.exp(expected[1] * 0.05 * (expected[0] - 1) / 31), rel=0.05)
        assert f"{expected[0]} of the 32 layers" in allocate.notes(sizes, budget)[0]


def test_the_survey_finds_the_cosines():
    model = make_llama()
    states = []
    handles = [
        layer.register_forward_hook(lambda _, args, out: states.append((args[0], out))) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    flat = [[x.flatten(0, 1).double().numpy() for x in pair] for pair in states]
    expected = [((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean() for x, y in flat]
    findings, _ = prune(model, IDS, "slimllm", 0.0)
    np.testing.assert_allclose([found["cosine"] for found in findings], expected, rtol=1e-5)


def test_the_search_begins_with_the_heads_that_the_others_stand_for_least(monkeypatch):
    model = make_llama(num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    x, weight = inputs_of(model, IDS)[0]["o_proj"], weights_of(model)[0]["o_proj"]
    moments = Moments(slimllm.LeastRedundant.needs, 8)
    moments.update({"heads": torch.from_numpy(x)})
    layer = replace(seen(projections_of(model.model.layers[0]), moments), sizes=Sizes(64, 8, 8, 8, 176))
    parts, select = added(x, weight, 8), slimllm.LeastRedundant()
    assert all(select(layer, kept).tolist() == stays_by_hand(parts, kept) for kept in range(1, 8))
    monkeypatch.setattr(slimllm, "best_by_swaps", lambda _covariances, kept: kept)
    order = np.argsort(-redundancy_by_hand(parts))
    assert all(select(layer, kept).tolist() == sorted(order[8 - kept :].tolist()) for kept in range(1, 8))


def hybrid(pruned: nn.Module, dense: nn.Module, index: int, attention_too: bool) -> nn.Module:
    """The pruned model with the dense MLP of one layer, or with the whole of it."""
    model = copy.deepcopy(pruned)
    if attention_too:
        model.model.layers[index] = copy.deepcopy(dense.model.layers[index])
    else:
        model.model.layers[index].mlp = copy.deepcopy(dense.model.layers[index].mlp)
    return model


def regressed(y: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts (D,) of every output on what is left of it."""
    slopes, intercepts = zip(*(np.polyfit(b, a, 1) for a, b in zip(y.T, left.T, strict=True)), strict=True)
    return np.array(slopes), np.array(intercepts)


def importance_by_hand(weights: dict, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Of channels, from what the MLP and its down projection read."""
    output = hidden @ weights["down_proj"].T
    values, vectors = np.linalg.eigh(np.cov(output.T, bias=True))
    projected = (vectors.T @ weights["down_proj"]) * (1 / (1 + np.exp(-values / values.mean())))[:, None]
    norms = np.linalg.norm(x, axis=0)
    from_input = sum(np.linalg.norm(weights[name] * norms, axis=1) for name in ("gate_proj", "up_proj"))
    return from_input + np.linalg.norm(hidden, axis=0) * np.linalg.norm(projected, axis=0)


def mlp_input_of(model: nn.Module, index: int) -> np.ndarray:
    seen = []
    handle = model.model.layers[index].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].flatten(0, 1).double().numpy()


@pytest.mark.parametrize("groups", [8, 4])
def test_layers_are_what_brute_force_makes_of_them_on_the_pruned_stream(groups):
    """Heads by what the dense layer reads behind pruned ones, channels by what the MLP reads behind pruned heads."""
    model = make_llama(num_attention_heads=8, num_key_value_heads=groups, head_dim=8, intermediate_size=200)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(3)  # so that the attention has a say
    dense, kept_heads = copy.deepcopy(model), (groups // 2, groups - 1, 0)
    plan = [
        LayerShape(0, 0, 8, 90, kv_heads=kept_heads[0], o_bias=True, down_bias=True),
        LayerShape(0, 0, 8, 200, kv_heads=kept_heads[1], o_bias=True),
        LayerShape(0, 0, 8, 150, down_bias=True),
    ]
    prune_to(model, IDS, plan, "slimllm")
    for index, (shape, weights) in enumerate(zip(plan, weights_of(dense), strict=True)):
        was, now = dense.model.layers[index], model.model.layers[index]
        if shape.kv_heads:
            x = inputs_of(hybrid(model, dense, index, True), IDS)[index]["o_proj"]
            parts = added(x, weights["o_proj"], groups)
            stay = np.array(stays_by_hand(parts, shape.kv_heads))
            columns = features(stay, dense.config)
            assert torch.equal(now.self_attn.q_proj.weight, was.self_attn.q_proj.weight[columns])
            slopes, intercepts = regressed(parts.sum(0), parts[stay].sum(0))
            expected = slopes[:, None] * weights["o_proj"][:, columns]
            np.testing.assert_allclose(now.self_attn.o_proj.weight.detach(), expected, rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(now.self_attn.o_proj.bias.detach(), intercepts, atol=1e-3)
            assert np.abs(slopes - 1).max() > 0.01
        if shape.down_bias:
            behind = hybrid(model, dense, index, False)
            x, hidden = mlp_input_of(behind, index), inputs_of(behind, IDS)[index]["down_proj"]
            order = np.argsort(importance_by_hand(weights, x, hidden))
            stay = np.sort(np.concatenate([order[:2], order[200 - (shape.intermediate_size - 2) :]]))
            assert torch.equal(now.mlp.gate_proj.weight, was.mlp.gate_proj.weight[stay])
            left = hidden[:, stay] @ weights["down_proj"][:, stay].T
            slopes, intercepts = regressed(hidden @ weights["down_proj"].T, left)
            expected = slopes[:, None] * weights["down_proj"][:, stay]
            np.testing.assert_allclose(now.mlp.down_proj.weight.detach(), expected, rtol=2e-3, atol=1e-4)
            np.testing.assert_allclose(now.mlp.down_proj.bias.detach(), intercepts, atol=1e-3)
        else:
            assert torch.equal(now.mlp.down_proj.weight, was.mlp.down_proj.weight)


def test_the_importance_is_that_of_the_principal_directions_of_the_output(mlp, layer):
    """Of an MLP of which a few outputs have most of the variance, and others a large mean that counts nothing."""
    with torch.no_grad():
        mlp.down_proj.weight[:4] *= 5
        mlp.down_proj.bias[9:] = 100
        x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        taken = {"mlp_input": x, "intermediate": hidden, "mlp_output": mlp.down_proj(hidden)}
    moments = Moments(slimllm.principal_importance.needs, 4)
    moments.update(taken)
    weights = {n: getattr(mlp, n).weight.detach().double().numpy() for n in ("gate_proj", "up_proj", "down_proj")}
    expected = importance_by_hand(weights, x.double().numpy(), hidden.double().numpy())
    found = slimllm.principal_importance(seen(layer, moments))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5)
    assert (found.argsort() != released_importance(seen(layer, moments)).argsort()).any()
    moments = Moments(slimllm.principal_importance.needs, 4)
    moments.update({name: torch.zeros_like(tensor) for name, tensor in taken.items()})
    assert not slimllm.principal_importance(seen(layer, moments)).any()


@pytest.mark.parametrize(("sparsity", "groups"), [(0.1, 2), (0.2, 8), (0.33, 2), (0.5, 4), (0.5, 8)])
def test_the_sparsity_is_reached(sparsity, groups):
    sizes = dict(hidden_size=128, num_attention_heads=8, intermediate_size=384, num_hidden_layers=5)
    model = make_llama(num_key_value_heads=groups, **sizes)
    before = model.num_parameters()
    _, plan = prune(model, IDS, "slimllm", sparsity)
    assert 1 - model.num_parameters() / before == pytest.approx(sparsity, abs=0.005)
    assert torch.isfinite(model(IDS).logits).all()
    assert sum(shape.intermediate_size < 384 for shape in plan) == papers_selection(sparsity, 5)[0]
    assert any(shape.kv_heads for shape in plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_pruned(family):
    model = make_family(family)
    before = model.num_parameters()
    _, plan = prune(model, IDS, "slimllm", 0.3, pruned_layers=2)
    # The biases of gate and up go uncounted: with a hidden size of 63, a hundredth of a channel.
    assert 1 - model.num_parameters() / before == pytest.approx(0.3, abs=0.006)
    assert torch.isfinite(model(IDS).logits).all() and any(shape.kv_heads for shape in plan)


def test_what_cannot_be_met_is_refused_before_anything_is_measured():
    recipe, sizes = RECIPES["slimllm"], [LAYER] * 4
    method = as_method("slimllm", pruned_layers=2)
    with pytest.raises(UsageError, match="the 2 layers .* one head and one channel, or less; the largest possible is"):
        plan_before_survey(recipe, method, sizes, Budget(4 * LAYER.layer, 0.6))
    for thousandths in range(400, 500):  # what is not refused can be met, whatever the cosines
        budget = Budget(4 * LAYER.layer, thousandths / 1000)
        try:
            assert method.allocate.before_survey(sizes, budget) is None
        except ValueError:
            break
        method.allocate(sizes, budget, findings_of(0.1, 0.9, 0.2, -0.5))
    assert 470 < thousandths < 499
    with pytest.raises(UsageError, match="--pruned_layers 5: the model has 4 layers"):
        plan_before_survey(recipe, as_method("slimllm", pruned_layers=5), sizes, Budget(4 * LAYER.layer, 0.1))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"pruned_layers": 0}, "--pruned_layers 0: give at least 1"),
        ({"pruned_layers": -2}, "--pruned_layers -2"),
        ({"alpha": -0.5}, "--alpha -0.5: give a number from 0"),
        ({"alpha": float("nan")}, "--alpha nan"),
        ({"alpha": float("inf")}, "--alpha inf"),
    ],
)
def test_parameters_that_no_model_can_have(parameters, words):
    with pytest.raises(UsageError, match=words):
        RECIPES["slimllm"].with_parameters(parameters)


def test_cosines_that_are_no_numbers_name_the_layer():
    with pytest.raises(UsageError, match="in layer 1 the cosine"):
        CosineRatios(-1, -1.0, biases=True)([LAYER] * 2, Budget(2 * LAYER.layer, 0.2), findings_of(0.5, float("nan")))


def test_a_decomposition_that_fails_names_the_layer(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", raising(torch.linalg.LinAlgError("did not converge")))
    with pytest.raises(UsageError, match=r"in layer \d the decomposition of the MLP fails \(did not converge\)"):
        prune(make_llama(), IDS, "slimllm", 0.2)
