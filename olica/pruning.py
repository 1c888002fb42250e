"""Survey the dense model, then prune its decoder layers one at a time (paper, Algorithm 1).

N samples, T tokens, D hidden size
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import feed_forward, linear_calibration, value_output
from .activations import calibrate, propagate, record_layer_calls
from .allocation import Sizes, with_calibration
from .configuration_olica import LayerShape
from .errors import UsageError
from .linalg import multiple_correlation, ridge_regression
from .modeling_olica import Projections, module_paths, projections_of, separate_projections, shrink_layer
from .moments import Moments, full
from .recipes import Recipe

# Resident size of Python with torch, transformers and datasets imported, as seen on Linux.
INTERPRETER_BYTES = 700_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningOptions:
    """What the recipe leaves open.

    Attributes:
        percdamp: strength of the ridge.
        mlp_num: how many MLPs get a linear correction.
        calibration_rank: rank of a correction.
        batch_size: samples that go through a layer at a time.
        device: where layers run.
        cache_device: where the hidden states (N, T, D) of the calibration set live.
    """

    percdamp: float
    mlp_num: int
    calibration_rank: int
    batch_size: int
    device: torch.device
    cache_device: torch.device


@dataclass(frozen=True)
class LayerSurvey:
    """What the survey keeps of a dense layer.

    Attributes:
        correlation: mean multiple correlation of the recipe's regression; None where no layer is to be calibrated.
        value_basis: basis of every value head (K, d, d).
    """

    correlation: float | None
    value_basis: Tensor


def stream_layers(model: nn.Module, device: torch.device, title: str) -> Iterator[tuple[int, nn.Module]]:
    """Yield the decoder layers of a base model, each on `device` while it is worked on: weights move only here.

    Fused projections are separated for good: what is measured and pruned is what they hold.
    """
    for index, layer in enumerate(tqdm(model.layers, desc=title, unit="layer")):
        home = next(layer.parameters()).device
        separate_projections(layer, model.config)
        yield index, layer.to(device)
        layer.to(home)


def expected_memory(
    config, total: int, options: PruningOptions, ids_shape: tuple[int, int], itemsize: int
) -> dict[str, int | None]:
    """Rough peak memory in bytes of pruning a model of `total` parameters, from its sizes alone.

    The host holds the model, the device one layer, its sums, a batch of activations and the float64 work of a solve.
    """
    samples, seqlen = ids_shape
    hidden, channels = config.hidden_size, config.intermediate_size
    sizes = Sizes.of(config, total)
    layer = sizes.layer * itemsize
    sums = 4 * (2 * hidden**2 + (channels**2 + hidden * channels if options.mlp_num else 0))
    tokens = min(options.batch_size, samples) * seqlen
    activations = tokens * (8 * hidden + 4 * channels) * 4
    solve = 8 * (6 * hidden**2 + 2 * hidden * channels)
    states = samples * seqlen * hidden * itemsize
    working = 2 * layer + sums + max(activations, solve)
    on_gpu = options.device.type == "cuda"
    on_host = options.cache_device.type == "cpu"
    host = INTERPRETER_BYTES + total * itemsize + (states if on_host else 0) + (0 if on_gpu else working)
    device = working + (0 if on_host else states)
    return {"host_bytes": host, "device_bytes": device if on_gpu else None}


def check_mlp_num(mlp_num: int, num_layers: int, recipe: Recipe) -> None:
    """Raise UsageError unless so many layers can be calibrated."""
    eligible = num_layers if recipe.last_is_eligible else num_layers - 1
    if not 0 <= mlp_num <= eligible:
        reason = "" if recipe.last_is_eligible else ", since it never calibrates the last one"
        raise UsageError(
            f"--mlp_num {mlp_num} does not fit: of the model's {num_layers} layers --recipe {recipe.name} can "
            f"calibrate 0 to {eligible}{reason}"
        )


def _ridge(recipe: Recipe, options: PruningOptions, moments: Moments, ids_shape: tuple[int, int]) -> float:
    mean_diagonal = moments[full("mlp_input")].diagonal().mean().item()
    return recipe.ridge(options.percdamp, mean_diagonal, *ids_shape)


def _mean_correlation(sums, ridge: float) -> float:
    return multiple_correlation(sums, ridge_regression(sums, ridge)).mean().item()


@contextmanager
def _regularised(percdamp: float, index: int) -> Iterator[None]:
    """Tell the user of a fit that the ridge is too weak for."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"--percdamp {percdamp:g} is too small for the calibration set: in layer {index} the fit is singular; "
            "raise it, or --num_samples"
        ) from error


def _check_finite(moments: Moments, index: int) -> None:
    overflown = moments.not_finite()
    if overflown:
        raise UsageError(
            f"--dtype: in layer {index} the activations at {', '.join(overflown)} are NaN or infinite; "
            "a dtype of a wider range, float32 or bfloat16, may hold them"
        )


@torch.no_grad()
def survey_layers(
    model: nn.Module,
    calibration_ids: Tensor,
    shapes: list[LayerShape],
    recipe: Recipe,
    options: PruningOptions,
) -> list[LayerSurvey]:
    """Stream the calibration set (N, T) through the dense layers: the bases, and what ranks layers for calibration."""
    config = model.config
    heads = (config.num_attention_heads, config.num_key_value_heads)
    ranking = options.mlp_num > 0
    statistics = recipe.survey_needs(ranking)
    if statistics:
        hidden, calls = record_layer_calls(model, calibration_ids, options.cache_device, options.device)
    survey = []
    for index, layer in stream_layers(model, options.device, "survey"):
        moments = Moments(statistics, config.num_attention_heads)
        if statistics:
            calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=True)
            _check_finite(moments, index)
        projections, correlation = projections_of(layer), None
        if ranking:
            sums = recipe.survey_regression(recipe, projections, moments, shapes[index])
            with _regularised(options.percdamp, index):
                correlation = _mean_correlation(sums, _ridge(recipe, options, moments, calibration_ids.shape))
        basis = recipe.value_basis(projections, moments, *heads)
        survey.append(LayerSurvey(correlation, basis.cpu()))
    return survey


def _compress_attention(layer: Projections, moments, shape, basis, recipe, config) -> dict[str, Tensor]:
    heads = (config.num_attention_heads, config.num_key_value_heads)
    basis = basis.to(layer.v_proj.weight.device)
    value_output_weights = value_output.prune_value_output(
        layer, moments, shape, basis, recipe.value_importance, *heads
    )
    return recipe.query_key(layer, moments, shape) | value_output_weights


def _compress_feed_forward(layer: Projections, moments, shape, recipe, options, ids_shape) -> dict[str, Tensor]:
    if shape.intermediate_size == layer.down_proj.in_features:
        return {}
    kept = recipe.kept_channels(layer, moments, shape)
    pruned = feed_forward.prune_feed_forward(layer, kept)
    if not shape.calibration_rank:
        return pruned
    return pruned | linear_calibration.low_rank_correction(
        linear_calibration.residual_sums(layer, moments, kept),
        _ridge(recipe, options, moments, ids_shape),
        shape.calibration_rank,
        recipe.output_weights,
    )


def _replace_weights(layer: nn.Module, config, shape: LayerShape, weights: dict[str, Tensor]) -> None:
    """Shrink `layer` to `shape` and fill it with `weights`, in the dtype and on the device that it had."""
    like = next(layer.parameters())
    with torch.device("meta"):  # the new modules are filled, not initialised
        shrink_layer(layer, config, shape)
    paths, filling = module_paths(layer), {}
    for name, tensor in weights.items():
        module, _, rest = name.partition(".")
        filling[f"{paths[module]}.{rest}"] = tensor.to(like).contiguous()
    layer.load_state_dict(filling, strict=False, assign=True)
    unfilled = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    if unfilled:
        raise RuntimeError(f"no weights were computed for {', '.join(unfilled)}")


@torch.no_grad()
def prune_layers(
    model: nn.Module,
    calibration_ids: Tensor,
    plan: list[LayerShape],
    survey: list[LayerSurvey],
    recipe: Recipe,
    options: PruningOptions,
) -> None:
    """Prune every decoder layer of the base model `model` in place, on the stream that the recipe names."""
    config = model.config
    hidden, calls = record_layer_calls(model, calibration_ids, options.cache_device, options.device)
    for index, layer in stream_layers(model, options.device, "prune"):
        shape = plan[index]
        statistics = recipe.calibration_needs(calibrated=shape.calibration_rank > 0)
        moments = Moments(statistics, config.num_attention_heads)
        calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=recipe.dense_stream)
        _check_finite(moments, index)
        basis = survey[index].value_basis
        weights = _compress_attention(projections_of(layer), moments, shape, basis, recipe, config)
        with _regularised(options.percdamp, index):
            weights |= _compress_feed_forward(
                projections_of(layer), moments, shape, recipe, options, calibration_ids.shape
            )
        _replace_weights(layer, config, shape, weights)
        if not recipe.dense_stream and index + 1 < len(plan):
            propagate(layer, hidden, calls[index], options.batch_size)


def choose_calibrated(
    plan: list[LayerShape], survey: list[LayerSurvey], recipe: Recipe, options: PruningOptions
) -> list[LayerShape]:
    """The plan with corrections beside the `options.mlp_num` MLPs whose survey promises most."""
    if options.mlp_num == 0:
        return plan
    correlations = [layer.correlation for layer in survey]
    calibrated = linear_calibration.best_explained(correlations, options.mlp_num, recipe.last_is_eligible)
    logger.info("calibrated layers: %s", calibrated)
    return with_calibration(plan, calibrated, options.calibration_rank)
