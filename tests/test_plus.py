"""Olica-plus: value bases, error curves, damages and plans against brute force and numerical optimisation."""

import numpy as np
import pytest
import torch
from conftest import make_llama, pruning_options, seen
from torch import Tensor

from olica.errors import UsageError
from olica.machine import BatchSize
from olica.methods.moments import Moments, diagonal, full
from olica.methods.plus import FeedForward, PlusParameters, QueryKey, ValueOutput, divergence, plus
from olica.methods.recipes import RECIPES
from olica.methods.sizes import Budget, Sizes
from olica.methods.value_output import activation_directions, head_blocks
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of
from olica.pruning.options import Work
from olica.pruning.progress import SurveyProgress
from olica.pruning.survey import survey_layers
from olica.run import measure_and_decide
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
def test_the_error_of_an_mlp_is_that_of_the_stages_cut(layer, activations, size):
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
def test_the_error_of_value_heads_bounds_that_of_the_cut(layer, activations, num_kv_heads, size):
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


def survey(method, group: int = 1, ids: Tensor = IDS, **sizes) -> list[dict[str, Tensor]]:
    work = Work(DenseModel(make_llama(**sizes)), ids, method, pruning_options(batch_size=BatchSize(4)))
    return survey_layers(work, None, SurveyProgress())


def test_variants_that_travel_together_do_the_damage_of_each_alone():
    """Bit for bit."""
    together = plus(PlusParameters(probes=3))
    found = survey(together, num_key_value_heads=2)
    for part in together.allocate.parts:
        alone = type(together.survey)((part,), together.survey.samples)
        for one, all_of_them in zip(survey(replace_survey(together, alone), num_key_value_heads=2), found, strict=True):
            assert one.keys() == {part.name}
            assert torch.equal(one[part.name], all_of_them[part.name])


def replace_survey(method, survey):
    return type(method)(method.stream, survey, method.allocate, method.passes)
