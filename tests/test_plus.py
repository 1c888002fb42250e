"""Olica-plus: value bases, error curves, damages and plans against brute force and numerical optimisation."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import make_llama, pruning_options, seen
from torch import Tensor

import olica.methods.damage as damage_module
import olica.methods.parts as parts_module
import olica.methods.plus as plus_module
import olica.pruning.survey as survey_module
from olica.errors import UsageError
from olica.machine import BatchSize
from olica.methods.damage import LARGEST_EXPONENT
from olica.methods.moments import Moments, diagonal, full
from olica.methods.parts import FeedForward, QueryKey, ValueOutput
from olica.methods.plus import PlusParameters, plus
from olica.methods.recipe import Findings
from olica.methods.recipes import RECIPES
from olica.methods.rounding import attention_parameters
from olica.methods.sizes import Budget, Sizes
from olica.methods.value_output import activation_directions, head_blocks
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of
from olica.model.skeleton import count_parameters
from olica.pruning.activations import reading_logits
from olica.pruning.layers import prune_layers
from olica.pruning.options import Work
from olica.pruning.progress import Progress, SurveyProgress
from olica.pruning.survey import survey_layers
from olica.sources.dense_model import DenseModel

IDS = torch.randint(3, 319, (6, 32), generator=torch.Generator().manual_seed(0))
D, H, WIDTH, F = 64, 4, 16, 176
RIDGE = 1e-6
NEEDS = (full("attention_input"), full("heads"), full("intermediate"), diagonal("mlp_input"))


@pytest.fixture(params=[4, 2, 1], ids=lambda k: f"{k} key/value heads")
def num_kv_heads(request) -> int:
    return request.param


@pytest.fixture
def activations() -> dict[str, Tensor]:
    """Correlated inputs of the projections (8, 40, f)."""
    generator, widths = torch.Generator().manual_seed(1), {"intermediate": F}
    made = {}
    for tap in ("attention_input", "heads", "intermediate", "mlp_input"):
        width = widths.get(tap, D)
        made[tap] = (
            torch.randn(8, 40, width, generator=generator) @ torch.randn(width, width, generator=generator) + 0.2
        )
    return made


@pytest.fixture
def layer(num_kv_heads, activations):
    """A layer with the moments of `activations`."""
    moments = Moments(NEEDS, H)
    moments.update(activations)
    model = make_llama(num_key_value_heads=num_kv_heads).requires_grad_(False)
    return seen(projections_of(model.model.layers[0]), moments, num_kv_heads)


@pytest.fixture
def exact(monkeypatch) -> None:
    """Curves and bases of second moments as they are, that formulas can be compared with."""
    for module in (parts_module, plus_module):
        monkeypatch.setattr(module, "DEFINITE", RIDGE)


def parts_of(ridge: float = RIDGE) -> tuple[QueryKey, ValueOutput, FeedForward]:
    return plus(PlusParameters(ridge=ridge)).allocate.parts


def unexplained(basis: Tensor, moments: Tensor, outputs: Tensor) -> Tensor:
    """Error of a group's maps (G, D, d), each refitted to the features basis^T z, basis (d, r), moments (G, d, d)."""
    error = 0.0
    for moment, output in zip(moments, outputs, strict=True):
        kept = basis.T @ moment @ basis
        mixed = output @ moment @ basis
        error = error + (output @ moment * output).sum() - (torch.linalg.solve(kept, mixed.T).T * mixed).sum()
    return error


@pytest.mark.parametrize("kept", [2, 7, 13])
def test_no_value_basis_loses_much_less(layer, num_kv_heads, kept):
    """Against a minimiser that starts at the basis: with plain heads it is the best, with grouped ones nearly so."""
    directions = activation_directions(RIDGE)(layer)
    blocks = head_blocks(layer.moments[full("heads")], layer.sizes)
    basis = directions.features[:, :, :kept]
    eye = torch.eye(WIDTH, dtype=torch.float64).expand(num_kv_heads, -1, -1)
    torch.testing.assert_close(directions.features.mT @ directions.features, eye)
    for head in range(num_kv_heads):
        outputs = layer.weights.o_proj.weight.double().unflatten(1, (H, -1)).movedim(1, 0)
        outputs = outputs.unflatten(0, (num_kv_heads, -1))[head]
        found = unexplained(basis[head], blocks[head], outputs).item()
        free = basis[head].clone(memory_format=torch.contiguous_format).requires_grad_()
        optimiser = torch.optim.LBFGS([free], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def step(free=free, head=head, outputs=outputs, optimiser=optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = unexplained(free, blocks[head], outputs)
            loss.backward()
            return loss

        optimiser.step(step)
        best = unexplained(free.detach(), blocks[head], outputs).item()
        assert best <= found
        # Query heads of random weights differ as much as can be.
        assert found <= best * (1 + 1e-6 if num_kv_heads == H else 1.2)
        random = torch.linalg.qr(torch.randn(WIDTH, kept, dtype=torch.float64)).Q
        assert found < unexplained(random, blocks[head], outputs)


def relative_error(dense: np.ndarray, cut: np.ndarray) -> float:
    return float(((dense - cut) ** 2).sum() / (dense**2).sum())


@pytest.mark.parametrize("size", [20, 90, 175])
def test_the_error_of_an_mlp_is_that_of_the_stages_cut(layer, activations, exact, size):
    part = parts_of()[2]
    x = activations["intermediate"].flatten(0, 1).double().numpy()
    weights = part.stage(layer, LayerShape(0, 0, WIDTH, size))
    kept = part.stage.kept(layer, LayerShape(0, 0, WIDTH, size)).numpy()
    dense = x @ layer.weights.down_proj.weight.double().numpy().T
    expected = relative_error(dense, x[:, kept] @ weights["down_proj.weight"].numpy().T)
    errors = part.errors(layer)
    assert errors.shape == (F + 1,) and errors[0] == pytest.approx(1) and errors[F] == 0
    assert errors[size].item() == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert torch.equal(weights["gate_proj.weight"], layer.weights.gate_proj.weight[kept])


def test_errors_grow_with_what_goes_as_those_of_the_cut_do_at_the_default_ridge(layer, activations, monkeypatch):
    """The pull of the ridge is no part of them: errors that count it grow too little."""
    part = parts_of(PlusParameters().ridge)[2]
    x = activations["intermediate"].flatten(0, 1).double().numpy()
    dense = x @ layer.weights.down_proj.weight.double().numpy().T
    tried = part.tried_size(layer.sizes)

    def of_cut(size: int) -> float:
        shape = LayerShape(0, 0, WIDTH, size)
        kept = part.stage.kept(layer, shape).numpy()
        return relative_error(dense, x[:, kept] @ part.stage(layer, shape)["down_proj.weight"].numpy().T)

    curve = part.errors(layer)
    monkeypatch.setattr(parts_module, "DEFINITE", PlusParameters().ridge)
    pulled = part.errors(layer)
    for size in (30, 60):
        expected = of_cut(size) / of_cut(tried)
        assert 0.9 * expected < curve[size] / curve[tried] < 2.2 * expected
        assert pulled[size] / pulled[tried] < 0.8 * expected


@pytest.mark.parametrize("rank", [4, 17, 30])
def test_the_error_of_queries_and_keys_is_that_of_their_factors(layer, activations, num_kv_heads, rank):
    part = parts_of()[0]
    shape = part.shape(LayerShape(0, 0, WIDTH, F), layer.sizes, rank)
    assert (shape.q_rank, shape.k_rank) == (rank, rank if num_kv_heads == H else 0)
    factors = part.stage(layer, shape)
    x = activations["attention_input"].flatten(0, 1).double().numpy()
    expected = []
    for name in ["q_proj", "k_proj"][: 2 if num_kv_heads == H else 1]:
        dense = x @ getattr(layer.weights, name).weight.double().numpy().T
        reduce, expand = (factors[f"{name}.{part}.weight"].detach().double().numpy() for part in ("reduce", "expand"))
        cut = x @ reduce.T @ expand.T
        # No map of that rank does better: what the samples themselves leave beyond so many directions.
        squares = np.linalg.svd(dense, compute_uv=False) ** 2
        assert relative_error(dense, cut) == pytest.approx(squares[rank:].sum() / squares.sum(), rel=1e-4)
        expected.append(relative_error(dense, cut))
    assert part.errors(layer)[rank].item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert part.errors(layer)[0] == 0


@pytest.mark.parametrize("size", [3, 9, 15])
def test_the_error_of_value_heads_bounds_that_of_the_cut(layer, activations, exact, num_kv_heads, size):
    """The curve lets every head see its own features only; the cut's refit sees those of all."""
    part = parts_of()[1]
    weights = part.stage(layer, part.shape(LayerShape(0, 0, WIDTH, F), layer.sizes, size))
    assert weights["v_proj.weight"].shape == (num_kv_heads * size, D)
    assert weights["o_proj.weight"].shape == (D, H * size)
    basis = activation_directions(RIDGE)(layer).features[:, :, :size]
    x = activations["heads"].flatten(0, 1).double()
    output = layer.weights.o_proj.weight.double()
    heads = x.unflatten(1, (H, -1))
    kept = torch.stack([heads[:, head] @ basis[head * num_kv_heads // H] for head in range(H)], 1).flatten(1)
    exact = np.linalg.lstsq(kept.numpy(), (x @ output.T).numpy(), rcond=None)[0]
    np.testing.assert_allclose(weights["o_proj.weight"].T, exact, rtol=1e-2, atol=1e-3 * np.abs(exact).max())
    blocks = head_blocks(layer.moments[full("heads")], layer.sizes).flatten(0, 1)
    outputs = output.unflatten(1, (H, -1)).movedim(1, 0)
    alone = whole = 0.0
    for head, (moment, one) in enumerate(zip(blocks, outputs, strict=True)):
        alone += unexplained(basis[head * num_kv_heads // H], moment[None], one[None]).item()
        whole += (one @ moment * one).sum().item()
    assert part.errors(layer)[size].item() == pytest.approx(alone / whole, rel=1e-3)


def survey(method, ids: Tensor = IDS, **sizes) -> list[dict[str, Tensor]]:
    """Findings of a tiny LLaMA."""
    work = Work(DenseModel(make_llama(**sizes)), ids, method, pruning_options(batch_size=BatchSize(4)))
    return survey_layers(work, None, SurveyProgress())


def test_variants_that_travel_together_do_the_damage_of_each_alone():
    """Bit for bit."""
    method = plus(PlusParameters(probes=3))
    together = survey(method, num_key_value_heads=2)
    for part in method.allocate.parts:
        alone = survey(replace(method, survey=replace(method.survey, parts=(part,))), num_key_value_heads=2)
        for one, all_parts in zip(alone, together, strict=True):
            assert one.keys() == {part.name} and one[part.name][1] > 0
            assert torch.equal(one[part.name], all_parts[part.name])


@pytest.mark.parametrize(("given", "samples", "seen"), [(0, 768, 24), (0, 256, 8), (0, 60, 8), (0, 3, 3), (7, 768, 7)])
def test_one_sample_of_32_is_a_probe_unless_the_user_says(given, samples, seen):
    assert plus(PlusParameters(probes=given)).survey.samples(samples) == seen


@pytest.mark.parametrize(
    ("probes", "samples", "read"),
    [(0, 96, 96), (0, 128, 128), (0, 200, 128), (0, 256, 128), (0, 768, 384), (0, 769, 385), (200, 256, 200)],
)
def test_the_survey_reads_half_of_a_large_text_and_all_of_a_small_one(probes, samples, read):
    assert plus(PlusParameters(probes=probes)).survey.reads(samples) == read


def test_the_damage_of_the_size_that_is_tried_is_what_it_does_to_the_output():
    """Against the dense model run with the layer pruned to that size alone, for all tokens that are compared."""
    method, model = plus(PlusParameters(probes=6)), make_llama(num_key_value_heads=2)
    found = survey(method, num_key_value_heads=2)
    sizes = Sizes.of(model.config)
    for index in range(3):
        for part in method.allocate.parts:
            size = part.tried_size(sizes)
            dense = LayerShape(0, 0, WIDTH, F)
            plan = [part.shape(dense, sizes, size) if index == layer else dense for layer in range(3)]
            pruned = make_llama(num_key_value_heads=2)
            only = replace(method, stream="dense", passes=((part.stage,),))
            prune_layers(Work(DenseModel(pruned), IDS, only, pruning_options()), plan, [{}] * 3, Progress())
            with torch.no_grad():
                expected, changed = (m(IDS).logits[:, 3::4].double().log_softmax(-1) for m in (model, pruned))
            damage = (expected.exp() * (expected - changed)).sum(-1).mean().item()
            assert found[index][part.name][size].item() == pytest.approx(damage, rel=1e-3)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [1, 1, 1]),
        (18, [1] * 18),
        (19, [1, 1, *[2] * 7, 1, 1, 1]),
        (30, [1, 1, *[2] * 13, 1, 1]),
        (32, [1, 1, *[2] * 14, 1, 1]),
        (80, [1, 1, *[6] * 12, 4, 1, 1]),
    ],
)
def test_layers_at_the_ends_are_tried_alone_and_those_between_with_neighbours(layers, expected):
    groups = plus(PlusParameters()).survey.groups(layers)
    assert [len(group) for group in groups] == expected
    assert [index for group in groups for index in group] == [*range(layers)]


def test_a_group_shares_its_damage_alike_whatever_the_errors_of_its_layers(monkeypatch):
    """And of its sizes each layer's own error says what each damages."""
    monkeypatch.setattr(damage_module, "ALONE", 0)
    monkeypatch.setattr(damage_module, "MOST_GROUPS", 2)
    method = plus(PlusParameters(probes=2))
    survey = replace(method.survey, parts=method.allocate.parts[2:])
    scales = (1, 300, 5)
    findings = [{"mlp": torch.tensor([4.0, 2.0, 0.0]) * scale, "mlp_tried": torch.tensor(2.0 * scale)}
                for scale in scales]  # fmt: skip
    damage = survey.complete(findings, {(0, 0): 0.8, (2, 0): 0.5})
    for found, expected in zip(damage, ([0.8, 0.4, 0], [0.8, 0.4, 0], [1.0, 0.5, 0]), strict=True):
        torch.testing.assert_close(found["mlp"], torch.tensor(expected))
    nothing = {"mlp": torch.tensor([1.0, 0.0, 0.0]), "mlp_tried": torch.tensor(0.0)}
    damage = survey.complete([findings[0], nothing, findings[2]], {(0, 0): 0.8, (2, 0): -1e-9})
    expected = ([1.6, 0.8, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0])  # one alone lost something; one got no worse
    for found, by_size in zip(damage, expected, strict=True):
        torch.testing.assert_close(found["mlp"], torch.tensor(by_size))


@cache
def findings_of(groups: int) -> list[Findings]:
    """What the survey finds of a model with so many key/value heads, whatever is decided on it."""
    work = Work(DenseModel(make_llama(num_key_value_heads=groups)), IDS, plus(PlusParameters()), pruning_options())
    return survey_layers(work, None, SurveyProgress())


@pytest.mark.parametrize(("groups", "layer_groups"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("sizes_of", ["layer", "model"])
@pytest.mark.parametrize("round_to", [1, 8])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.55])
def test_plans_meet_the_budget(groups, layer_groups, sizes_of, round_to, sparsity):
    model = make_llama(num_key_value_heads=groups)
    whole = count_parameters(model)["decoder_layers"]
    method, budget = plus(PlusParameters(sizes_of=sizes_of)), Budget(whole, sparsity, round_to)
    work = Work(DenseModel(model), IDS, method, pruning_options())
    sizes, findings = Sizes.of_all(model.config), findings_of(groups)
    assert method.allocate.before_survey(sizes, budget) is None
    plan = method.allocate(sizes, budget, findings)
    prune_layers(work, plan, findings, Progress())
    measured = 1 - count_parameters(model)["decoder_layers"] / whole
    layers = 3 if sizes_of == "model" else 1
    coarsest = 3 * 64 * round_to * layers / whole  # a step in the channels
    assert sparsity <= measured < sparsity + coarsest
    if sizes_of == "model":
        assert len(set(plan)) == 1
    for shape in plan:
        assert (shape.k_rank > 0) == (shape.q_rank > 0 and layer_groups == 1)
        for size, dense in ((shape.q_rank, 0), (shape.v_head_dim, WIDTH), (shape.intermediate_size, F)):
            assert size % round_to == 0 or size == dense
    assert torch.isfinite(model(IDS).logits).all()


def test_a_size_that_loses_nothing_says_nothing_of_smaller_ones():
    """Keys and queries of low rank: what is divided by is rounding."""
    method = plus(PlusParameters())
    errors, part = torch.tensor([0.0, 0.4, 1e-16, 0.0]), method.allocate.parts[0]
    survey = replace(method.survey, parts=(part,))
    (found,) = survey.complete([{"query_key": errors, "query_key_tried": torch.tensor(1e-16)}], {(0, 0): 1e-9})
    torch.testing.assert_close(found["query_key"], errors)


def test_a_variant_whose_output_is_no_number_is_named(monkeypatch):
    """As in half precision, where what the dense model computes is still in range."""
    method, model = plus(PlusParameters(probes=2)), make_llama()
    advance = survey_module.Probes.advance

    def overflowing(self, index, *arguments):
        advance(self, index, *arguments)
        if index == 1:
            self.states[1, 2][0, 3, 5] = torch.inf

    monkeypatch.setattr(survey_module.Probes, "advance", overflowing)
    work = Work(DenseModel(model), IDS, method, pruning_options())
    with pytest.raises(UsageError, match="with another form of layer 1 the model's output is NaN or infinite"):
        survey_layers(work, None, SurveyProgress())


def test_a_ridge_that_is_too_small_is_named():
    ids = IDS[:1, :4].expand(6, -1)  # four tokens cannot determine a refit
    work = Work(DenseModel(make_llama()), ids, plus(PlusParameters(ridge=1e-300)), pruning_options())
    with pytest.raises(UsageError, match="--ridge 1e-300 is too small .* layer 0 the regression on the features"):
        survey_layers(work, None, SurveyProgress())


@pytest.mark.parametrize("tied", [False, True])
def test_small_damage_is_seen_in_half_precision(tied):
    """Logits of half precision would round it away."""
    model = make_llama(tie_word_embeddings=tied).to(torch.bfloat16)
    states = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with reading_logits(DenseModel(model), torch.arange(8), torch.device("cpu")) as logits:
        found = logits(states)
        with torch.no_grad():
            normed = model.model.norm(states)
            expected = normed.float() @ model.lm_head.weight.float().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert model(IDS[:1]).logits.dtype == torch.bfloat16, "the head is as it was"


def test_a_layer_whose_parts_do_no_damage_loses_all_that_goes():
    sizes = [Sizes(64, 4, 4, 16, F)] * 2
    method = plus(PlusParameters())
    curves = {"query_key": torch.linspace(1, 0, 65), "value_output": torch.linspace(1, 0, 17)}
    curves |= {"mlp": torch.linspace(1, 0, F + 1)}
    curves["query_key"][0] = 0
    harmless = {name: torch.zeros_like(curve) for name, curve in curves.items()}
    whole = sum(layer.layer for layer in sizes)
    for sparsity in (0.02, 0.1, 0.3):
        first, second = method.allocate(sizes, Budget(whole, sparsity), [harmless, curves])
        assert second == LayerShape(0, 0, WIDTH, F)
        left = attention_parameters(sizes[0], first) + 3 * 64 * first.intermediate_size
        assert 0 <= sizes[0].layer - left - sparsity * whole < 3 * 64
    first, second = method.allocate(sizes, Budget(whole, 0.6), [harmless, curves])
    assert first == LayerShape(7, 7, 2, 18) and second.intermediate_size > 18


def test_a_budget_below_what_every_part_keeps_is_refused():
    sizes = [Sizes(64, 4, 4, 16, F)] * 2
    method = plus(PlusParameters())
    whole = sum(layer.layer for layer in sizes)
    method.allocate.before_survey(sizes, Budget(whole, 0.85))
    with pytest.raises(ValueError, match="with 10% of every part"):
        method.allocate.before_survey(sizes, Budget(whole, 0.95))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ridge": 0}, "--ridge 0 must be a number above 0"),
        ({"ridge": "inf"}, "--ridge inf must"),
        ({"ridge": "much"}, "--ridge much: give a number"),
        ({"probes": -1}, "--probes -1: give at least 1, or 0"),
        ({"probes": 1.5}, "--probes 1.5: give a whole number"),
        ({"sizes_of": "head"}, "--sizes_of head: give layer or model"),
        ({"mlp_num": 3}, "--mlp_num is no parameter of --recipe olica-plus"),
    ],
)
def test_wrong_parameters_are_refused(values, words):
    with pytest.raises(UsageError, match=words):
        RECIPES["olica-plus"].with_parameters(values)


def test_divergence_is_that_of_the_distributions():
    generator = torch.Generator().manual_seed(0)
    dense, changed = torch.randn(2, 5, 11, generator=generator)
    p, q = (torch.softmax(logits.double(), -1).numpy() for logits in (dense, changed))
    survey = plus(PlusParameters()).survey
    found = survey.compare(dense, torch.stack([changed, dense]))
    assert found == [pytest.approx((p * np.log(p / q)).sum(-1).mean()), 0]


@pytest.mark.parametrize("change", [1e-3, 1e-2, 1.0])
def test_small_divergences_do_not_sink_in_rounding(change):
    """Of logits of the size that models give, moved a little, and all of them by the same, which changes nothing."""
    generator = torch.Generator().manual_seed(0)
    dense, noise = 5 * torch.randn(2, 16, 50_000, generator=generator)
    changed = dense + change * noise + 3.0
    p, q = (torch.log_softmax(logits.double(), -1).numpy() for logits in (dense, changed))
    (found,) = plus(PlusParameters()).survey.compare(dense, changed[None])
    assert found == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-2)


def test_a_token_that_becomes_certain_is_a_large_damage_and_a_number():
    dense = torch.zeros(1, 10)
    changed = torch.nn.functional.one_hot(torch.tensor([3]), 10) * 300.0
    (found,) = plus(PlusParameters()).survey.compare(dense, changed[None])
    assert found == pytest.approx(LARGEST_EXPONENT - np.log(10))  # a tenth of the chances moves
