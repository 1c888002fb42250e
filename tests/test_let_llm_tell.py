"""Transfer entropy against known values, the ratios that it gives, and by brute force what is cut."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from by_threshold import features, inputs_of, lowest, silenced, weights_of
from conftest import make_llama, prune, prune_to, work_on, write_pruned
from tiny_families import make_family
from transformers import AutoModelForCausalLM

from olica.errors import UsageError
from olica.methods.let_llm_tell import (
    LEAST_RATIO,
    MOST_LOST,
    MOST_RATIO,
    NOISE,
    RIDGE,
    TransferSurvey,
    by_transfer,
    transfer_entropy,
    transferred,
    windows,
)
from olica.methods.moments import Moments
from olica.methods.recipes import RECIPES
from olica.methods.sizes import Budget, Sizes
from olica.model.configuration_olica import LayerShape
from olica.pruning.progress import SurveyProgress
from olica.run import measure_and_decide

RECIPE = "let-llm-tell"
IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
TAPS = ("layer_input", "attention_output", "mlp_output", "layer_output")


def conditional(covariance: np.ndarray, targets: range, given: list[int]) -> np.ndarray:
    """Covariance of what a linear regression on the features `given` leaves of the `targets`."""
    chosen = covariance[np.ix_(targets, given)]
    return covariance[np.ix_(targets, targets)] - chosen @ np.linalg.inv(covariance[np.ix_(given, given)]) @ chosen.T


def textbook(covariance: np.ndarray) -> float:
    """Half the log of det Cov(y | h) / det Cov(y | h, x), for the covariance of x, h and y."""
    width = len(covariance) // 3
    source, past, target = (range(start, start + width) for start in range(0, 3 * width, width))
    residuals = [conditional(covariance, target, given) for given in ([*past], [*source, *past])]
    return (np.linalg.slogdet(residuals[0])[1] - np.linalg.slogdet(residuals[1])[1]) / 2


def stationary(transition: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Covariance S of z_t = A z_{t-1} + e: S = A S A^T + Cov(e)."""
    size = len(transition)
    solution = np.linalg.solve(np.eye(size * size) - np.kron(transition, transition), noise.flatten())
    return solution.reshape(size, size)


def process(seed: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A stable transition of (x, y), each of so many features, in which x drives y, and the noise's covariance."""
    random = np.random.default_rng(seed)
    transition = random.normal(size=(2 * width, 2 * width))
    transition *= 0.8 / np.abs(np.linalg.eigvals(transition)).max()
    root = random.normal(size=(2 * width, 2 * width)) + 2 * np.eye(2 * width)
    return transition, root @ root.T


def of_process(transition: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Covariance of x_{t-1}, y_{t-1} and y_t."""
    past, width = stationary(transition, noise), len(transition) // 2
    present = transition[width:]
    return np.block([[past, past @ present.T], [present @ past, present @ past @ present.T + noise[width:, width:]]])


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.0), (0.5, 0.7), (-0.9, 2.0)])
def test_a_process_of_two_variables_has_the_value_of_the_textbook(a, b):
    """y_t = a y_{t-1} + b x_{t-1} + e_t, x and e white of variance 4 and 9: TE = log(1 + 4 b^2 / 9) / 2."""
    covariance = of_process(np.array([[0.0, 0.0], [b, a]]), np.diag([4.0, 9.0]))
    found = transfer_entropy(torch.from_numpy(covariance))
    assert found.item() == pytest.approx(np.log(1 + 4 * b**2 / 9) / 2, abs=1e-12)


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_process_of_many_variables_has_the_value_of_its_residual_covariances(width):
    """And what x does not drive gets nothing from it, whatever y drives in turn."""
    transition, noise = process(width, width)
    covariance = of_process(transition, noise)
    found = transfer_entropy(torch.from_numpy(covariance)).item()
    assert found == pytest.approx(textbook(covariance), rel=1e-9) and found > 0.01
    transition[width:, :width] = 0  # y has its own past alone, in which x then has no part
    noise[width:, :width] = noise[:width, width:] = 0
    assert transfer_entropy(torch.from_numpy(of_process(transition, noise))).item() == pytest.approx(0, abs=1e-9)


def test_a_simulated_process_has_its_analytic_value_within_the_sampling_error():
    width, steps = 4, 40_000
    transition, noise = process(3, width)
    random, root = np.random.default_rng(0), np.linalg.cholesky(noise)
    states = [np.zeros(2 * width)]
    for shock in random.normal(size=(steps, 2 * width)) @ root.T:
        states.append(transition @ states[-1] + shock)
    seen = np.array(states[100:])
    joint = np.cov(np.concatenate([seen[:-1], seen[1:, width:]], axis=1).T)
    expected = transfer_entropy(torch.from_numpy(of_process(transition, noise))).item()
    # 2 n TE is about chi-squared with p^2 degrees of freedom and the noncentrality 2 n TE.
    error = 4 * np.sqrt(2 * expected / steps) + width**2 / (2 * steps)
    assert transfer_entropy(torch.from_numpy(joint)).item() == pytest.approx(expected, abs=error)
    assert error < 0.1 * expected


def random_taps(hidden: int, tokens: int = 2000) -> dict[str, torch.Tensor]:
    """Activations at the four taps of a made-up layer: both modules mix features, the MLP not linearly."""
    random = torch.Generator().manual_seed(0)
    stream, mix, back = (torch.randn(rows, hidden, generator=random) for rows in (tokens, hidden, hidden))
    attention = stream.roll(1, 0) @ mix / hidden**0.5 + 3
    mlp = torch.tanh((stream + attention) @ back / hidden**0.5)
    return dict(zip(TAPS, (stream, attention, mlp, stream + attention + mlp), strict=True))


def summed(taps: dict[str, torch.Tensor], batches: int = 3) -> Moments:
    moments = Moments(TransferSurvey().needs(0, 1), num_heads=1)
    for rows in torch.arange(len(taps["layer_input"])).tensor_split(batches):
        moments.update({tap: x[rows] for tap, x in taps.items()})
    return moments


def by_hand(taps: dict[str, np.ndarray], source: str) -> float:
    """Nats per feature, from activations (tokens, D) that are brought to variance 1."""
    standardised = [(x - x.mean(0)) / x.std(0) for x in (taps[tap] for tap in (source, "layer_input", "layer_output"))]
    nats = 0.0
    for window in windows(standardised[0].shape[1]):
        joint = np.concatenate([x[:, window.numpy()] for x in standardised], axis=1)
        nats += textbook(joint.T @ joint / len(joint) + np.diag(np.repeat([RIDGE, RIDGE, NOISE], len(window))))
    return nats / standardised[0].shape[1]


@pytest.mark.parametrize("hidden", [1, 64, 65, 150])
def test_every_feature_is_in_one_window_of_64_at_the_most(hidden):
    dealt = windows(hidden)
    assert torch.equal(torch.cat(dealt).sort().values, torch.arange(hidden))
    assert len(dealt) == -(-hidden // 64) and max(map(len, dealt)) <= 64
    assert all(torch.equal(a, b) for a, b in zip(dealt, windows(hidden), strict=True))


@pytest.mark.parametrize("hidden", [20, 150])
def test_the_entropy_of_moments_is_that_of_activations(hidden):
    taps = random_taps(hidden)
    moments = summed(taps)
    arrays = {tap: x.double().numpy() for tap, x in taps.items()}
    for source in ("attention_output", "mlp_output"):
        assert transferred(moments, source).item() == pytest.approx(by_hand(arrays, source), rel=1e-4)


def test_the_scale_and_the_mean_of_a_feature_and_the_order_of_tokens_have_no_part_in_it():
    taps, random = random_taps(150), torch.Generator().manual_seed(1)
    order = torch.randperm(2000, generator=random)
    changed = {
        tap: x[order] * (0.1 + 10 * torch.rand(150, generator=random)) + torch.randn(150, generator=random)
        for tap, x in taps.items()
    }
    for source in ("attention_output", "mlp_output"):
        expected = transferred(summed(taps), source).item()
        assert transferred(summed(changed, batches=5), source).item() == pytest.approx(expected, rel=1e-4)


def test_it_is_nothing_for_a_silent_module_and_never_more_than_the_noise_lets_through():
    """A target that follows from past and source is no infinity: that is the case where the MLP is silent."""
    taps = random_taps(40)
    taps |= {"mlp_output": torch.full((2000, 40), 7.0), "layer_output": taps["layer_input"] + taps["attention_output"]}
    moments = summed(taps)
    assert transferred(moments, "mlp_output").item() == pytest.approx(0, abs=1e-9)
    most = np.log((1 + NOISE) / NOISE) / 2
    assert 0.1 * most < transferred(moments, "attention_output").item() < most
    new = torch.randn(2000, 40, generator=torch.Generator().manual_seed(2))
    taps |= {"attention_output": new, "layer_output": new}
    assert transferred(summed(taps), "attention_output").item() == pytest.approx(most, rel=0.02)


def test_a_source_that_tells_nothing_has_what_chance_gives_it():
    """p / 2n nats for each feature; and what is not a number is an error."""
    taps = random_taps(40)
    taps["mlp_output"] = torch.randn(2000, 40, generator=torch.Generator().manual_seed(2))
    found = transferred(summed(taps), "mlp_output").item()
    assert found == pytest.approx(40 / (2 * 2000), rel=0.2)
    with pytest.raises(torch.linalg.LinAlgError):
        transfer_entropy(torch.full((6, 6), torch.nan))


def test_it_grows_with_what_a_module_writes():
    taps, found = random_taps(40), []
    for scale in (0.01, 0.1, 0.5, 1.0):
        mlp = torch.tanh(taps["layer_input"] + scale * taps["attention_output"]).roll(1, 1)
        both = taps["layer_input"] + scale * taps["attention_output"] + mlp
        found.append(transferred(summed(taps | {"layer_output": both}), "attention_output").item())
    assert found == sorted(found) and found[0] < 0.1 * found[-1]


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text", "olmo2"])
def test_the_survey_finds_the_entropies_of_every_layer(family):
    model, seen = make_family(family), {}
    for index, layer in enumerate(model.model.layers):

        def keep(_, args, output, index=index, place=None) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[index, place] = output.detach().flatten(0, 1).double().numpy()

        def enter(_, args, index=index) -> None:
            seen[index, "layer_input"] = args[0].detach().flatten(0, 1).double().numpy()

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(partial(keep, place="layer_output"))
        layer.self_attn.o_proj.register_forward_hook(partial(keep, place="attention_output"))
        layer.mlp.down_proj.register_forward_hook(partial(keep, place="mlp_output"))
    model(IDS)
    findings, _ = prune(make_family(family), IDS, RECIPE, 0.0)
    for index, found in enumerate(findings):
        taps = {tap: seen[index, tap] for tap in TAPS}
        expected = [by_hand(taps, source) for source in ("attention_output", "mlp_output")]
        np.testing.assert_allclose(found["transfer_entropy"], expected, rtol=2e-3)
        assert found["transfer_entropy"].dtype == torch.float64


def ratios_by_hand(entropies: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp(-entropies / (temperature * entropies.mean()))
    return np.clip(weights / weights.mean(), LEAST_RATIO, MOST_RATIO)


def as_findings(entropies: np.ndarray) -> list[dict[str, torch.Tensor]]:
    return [{"transfer_entropy": torch.from_numpy(row)} for row in entropies]


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 4.0])
def test_ratios_are_a_softmax_over_all_modules_that_is_clipped(temperature):
    entropies = np.array([[0.2, 0.9], [0.1, 0.4], [0.05, 0.6]])
    found = by_transfer(temperature)(as_findings(entropies), 3)
    np.testing.assert_allclose(found, ratios_by_hand(entropies, temperature), rtol=1e-12)
    np.testing.assert_allclose(by_transfer(temperature)(as_findings(7 * entropies), 3), found, rtol=1e-12)
    assert found.argmax() == 4 and found[2, 0] >= found[1, 0] >= found[0, 0] >= found[2, 1] >= found[0, 1]
    if temperature == 0.1:
        assert found.max() == MOST_RATIO and found.min() == LEAST_RATIO
    if temperature == 4.0:
        assert LEAST_RATIO < found.min() < 1 < found.max() < MOST_RATIO


@pytest.mark.parametrize("entropies", [np.zeros((3, 2)), np.full((3, 2), 0.7), np.full((3, 2), 1e-15) * [1, 9]])
def test_modules_that_are_alike_lose_alike(entropies):
    torch.testing.assert_close(
        by_transfer(1.0)(as_findings(entropies), 3), torch.ones(3, 2).double(), atol=1e-5, rtol=0
    )


def test_ratios_are_scaled_to_the_budget_and_capped():
    """With a million channels there is no rounding to speak of; the heads of layers of equal findings lose alike."""
    sizes = [Sizes(64, 20, 10, 16, intermediate_size=10**6)] * 3
    entropies = np.array([[0.2, 0.9], [0.1, 0.4], [0.1, 0.6]])
    allocate = RECIPES[RECIPE].method(RECIPES[RECIPE].parameters()).allocate
    for sparsity in (0.2, 0.5, 0.85):
        plan = allocate(sizes, Budget(3 * sizes[0].layer, sparsity), as_findings(entropies))
        lost = np.array([1 - shape.intermediate_size / 10**6 for shape in plan])
        relative = ratios_by_hand(entropies, 1.0)[:, 1]
        low, high = 0.0, 100.0
        for _ in range(60):
            factor = (low + high) / 2
            low, high = (factor, high) if np.minimum(factor * relative, MOST_LOST).mean() < sparsity else (low, factor)
        np.testing.assert_allclose(lost, np.minimum(high * relative, MOST_LOST), atol=2e-3)
        assert sum(10 - (shape.kv_heads or 10) for shape in plan) > 0


@pytest.mark.parametrize(("name", "part"), [("self_attn.o_proj", 0), ("mlp.down_proj", 1)])
def test_a_module_that_transfers_less_loses_more(name, part):
    """`part` of the middle layer writes a twentieth of what it did."""
    sizes = dict(hidden_size=128, num_attention_heads=16, num_key_value_heads=8, head_dim=8, intermediate_size=384)
    lost = []
    for scale in (1.0, 0.05):
        model = make_llama(**sizes)
        model.model.layers[1].get_submodule(name).weight.data *= scale
        _, plan = prune(model, IDS, RECIPE, 0.2)
        lost.append([(8 - (shape.kv_heads or 8), 384 - shape.intermediate_size)[part] for shape in plan])
    assert lost[1][1] > lost[0][1] and lost[1][1] == max(lost[1]) and lost[0][0] >= lost[1][0]


def mean_output(model, index: int, name: str) -> np.ndarray:
    """Mean over the tokens (D,) of what a projection of a layer gives."""
    found = []
    projection = model.model.layers[index].get_submodule(name)
    handle = projection.register_forward_hook(lambda _, args, output: found.append(output.detach().double()))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return found[0].mean((0, 1)).numpy()


@pytest.mark.parametrize("groups", [4, 2])
def test_heads_go_by_fluctuation_channels_behind_them_and_biases_take_up_the_means(groups):
    model = make_llama(num_key_value_heads=groups, mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.normal_()
    dense = copy.deepcopy(model)
    _, plan = prune(model, IDS, RECIPE, 0.4)
    assert any(shape.kv_heads for shape in plan)
    # Layer by layer: the stream is that of the pruned layers in front, the MLP's also of its own pruned attention.
    mixed, width = copy.deepcopy(dense), 64 // groups
    for index, shape in enumerate(plan):
        new, old = model.model.layers[index], dense.model.layers[index]
        read, weight = inputs_of(mixed, IDS)[index]["o_proj"], old.self_attn.o_proj.weight.detach().double().numpy()
        mean = mean_output(mixed, index, "self_attn.o_proj")
        scores = (read.var(axis=0) * (weight**2).sum(0)).reshape(groups, -1).sum(1)
        gone = (lowest(scores, shape.kv_heads or groups)[:, None] * width + np.arange(width)).flatten()
        stay = np.setdiff1d(np.arange(64), gone)
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[:, stay])
        if len(gone):
            expected = weight[:, gone] @ read.mean(0)[gone]
            np.testing.assert_allclose(new.self_attn.o_proj.bias.detach(), expected, atol=1e-5)
        mixed.model.layers[index].self_attn = new.self_attn
        np.testing.assert_allclose(mean_output(mixed, index, "self_attn.o_proj"), mean, atol=1e-5)

        read, weight = inputs_of(mixed, IDS)[index]["down_proj"], old.mlp.down_proj.weight.detach().double().numpy()
        mean = mean_output(mixed, index, "mlp.down_proj")
        gone = lowest(read.var(axis=0) * (weight**2).sum(0), shape.intermediate_size)
        stay = np.setdiff1d(np.arange(176), gone)
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, stay])
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[stay])
        expected = old.mlp.down_proj.bias.detach().double().numpy() + weight[:, gone] @ read.mean(0)[gone]
        np.testing.assert_allclose(new.mlp.down_proj.bias.detach(), expected, atol=1e-5)
        mixed.model.layers[index] = new
        np.testing.assert_allclose(mean_output(mixed, index, "mlp.down_proj"), mean, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_the_checkpoint_is_the_dense_model_with_means_for_what_is_gone(family, tmp_path):
    """Of a plan that prunes the first layer alone, whose attention sees the dense stream."""
    model, nothing = make_family(family), {name: np.array([], int) for name in ("o_proj", "down_proj")}
    weights, inputs = weights_of(model)[0], inputs_of(model, IDS)[0]
    scores = inputs["o_proj"].var(axis=0) * (weights["o_proj"] ** 2).sum(0)
    heads = features(lowest(scores.reshape(3, -1).sum(1), 2), model.config)
    means = [{name: x.mean(0) for name, x in inputs.items()}] * 3
    with silenced(model, [nothing | {"o_proj": heads}, nothing, nothing], means):
        behind = inputs_of(model, IDS)[0]["down_proj"]
    channels = lowest(behind.var(axis=0) * (weights["down_proj"] ** 2).sum(0), 101)
    means[0] = means[0] | {"down_proj": behind.mean(0)}
    with silenced(model, [{"o_proj": heads, "down_proj": channels}, nothing, nothing], means), torch.no_grad():
        expected = model(IDS).logits
    plan = [LayerShape(0, 0, 10, 101, kv_heads=2, o_bias=True, down_bias=True), *[LayerShape(0, 0, 10, 177)] * 2]
    prune_to(model, IDS, plan, RECIPE)
    write_pruned(model, plan, None, tmp_path / "pruned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_another_temperature_reads_the_same_survey_and_a_high_one_makes_layers_alike():
    plans = []
    for temperature in (0.5, 1e6):
        parameters = RECIPES[RECIPE].with_parameters({"te_temperature": temperature})
        method, model = RECIPES[RECIPE].method(parameters), make_llama(num_key_value_heads=2)
        assert method.survey.decided_by(parameters) == {}
        work = work_on(model, IDS, method)
        plans.append(measure_and_decide(work, Budget(model.num_parameters(), 0.2), SurveyProgress())[0])
    channels = [[shape.intermediate_size for shape in plan] for plan in plans]
    assert max(channels[1]) - min(channels[1]) <= 1 < max(channels[0]) - min(channels[0])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_mean_nothing_are_refused(temperature):
    with pytest.raises(UsageError, match="--te_temperature .* must be a number above 0"):
        RECIPES[RECIPE].with_parameters({"te_temperature": temperature})


def test_what_cannot_be_met_is_refused_before_anything_is_measured():
    """Nothing loses more than nine tenths."""
    sizes = [Sizes(64, 20, 10, 16, intermediate_size=1000)] * 3
    allocate = RECIPES[RECIPE].method(RECIPES[RECIPE].parameters()).allocate
    assert allocate.before_survey(sizes, Budget(3 * sizes[0].layer, 0.89)) is None
    with pytest.raises(ValueError, match="one head and one channel"):
        allocate.before_survey(sizes, Budget(3 * sizes[0].layer, 0.91))
