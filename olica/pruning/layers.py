"""Prune the decoder layers of a dense model one at a time (paper, Algorithm 1).

N samples, T tokens, D hidden size
"""

import torch
from torch import Tensor, nn

from ..methods import correction, feed_forward
from ..methods.moments import Moments
from ..methods.recipes import Recipe
from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import Projections, module_paths, projections_of, shrink_layer
from ..sources.dense_model import DenseModel
from .activations import calibrate, enter_layers, propagate
from .options import PruningOptions
from .progress import Progress
from .soundness import cast_weights, check_finite, decomposition, regression
from .survey import LayerSurvey


def _compress_query_key(layer: Projections, moments: Moments, shape: LayerShape, recipe: Recipe) -> dict[str, Tensor]:
    return recipe.query_key(layer, moments, shape)


def _compress_value_output(
    layer: Projections, moments: Moments, shape: LayerShape, surveyed: Moments, recipe: Recipe, config
) -> dict[str, Tensor]:
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return recipe.value_output(layer, moments, surveyed, shape, *heads)


def _compress_feed_forward(
    layer: Projections,
    moments: Moments,
    shape: LayerShape,
    recipe: Recipe,
    options: PruningOptions,
    ids_shape: tuple[int, int],
) -> dict[str, Tensor]:
    if shape.intermediate_size == layer.down_proj.in_features:
        return {}
    kept = recipe.kept_channels(layer, moments, shape)
    pruned = feed_forward.prune_feed_forward(layer, kept)
    if not shape.correction_rank:
        return pruned
    ridge = options.ridge(recipe, moments, ids_shape)
    sums = correction.residual_sums(layer, moments, kept)
    moments.drop(correction.residual_sums.needs)  # the fit needs their room
    return pruned | correction.low_rank_correction(sums, ridge, shape.correction_rank, recipe.output_weights)


def _shrink(layer: nn.Module, config, shape: LayerShape) -> None:
    with torch.device("meta"):  # the new modules are filled, not initialised
        shrink_layer(layer, config, shape)


def _replace_weights(layer: nn.Module, config, shape: LayerShape, weights: dict[str, Tensor]) -> None:
    """Shrink `layer` to `shape` and fill it with `weights`, by the names of the projections.

    Raises:
        RuntimeError: they are more or fewer than the new modules take, or of other sizes.
    """
    _shrink(layer, config, shape)
    paths, filling = module_paths(layer), {}
    for name, tensor in weights.items():
        module, _, rest = name.partition(".")
        filling[f"{paths.get(module, module)}.{rest}"] = tensor
    placeless = layer.load_state_dict(filling, strict=False, assign=True).unexpected_keys
    if placeless:
        raise RuntimeError(f"the pruned layer has no place for {', '.join(placeless)}")
    unfilled = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    if unfilled:
        raise RuntimeError(f"no weights were computed for {', '.join(unfilled)}")


def _restore(layer: nn.Module, config, shape: LayerShape, weights: dict[str, Tensor]) -> None:
    """Make of a dense `layer` what it had been pruned to."""
    device = next(layer.parameters()).device
    _shrink(layer, config, shape)
    layer.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)


def _prune_layer(
    index: int,
    layer: nn.Module,
    moments: Moments,
    config,
    shape: LayerShape,
    surveyed: Moments,
    recipe: Recipe,
    options: PruningOptions,
    ids_shape: tuple[int, int],
) -> None:
    """Prune `layer` to `shape` by the sums of its calibration."""
    projections = projections_of(layer)
    weights: dict[str, Tensor] = {}

    def add(computed: dict[str, Tensor]) -> None:
        weights.update(cast_weights(computed, index, projections.v_proj.weight))

    # First the MLP, whose sums are the largest and are dropped on the way. What is computed in double precision is cast
    # before the next is.
    with regression(options.percdamp, index), decomposition(index, "the correction beside down_proj"):
        add(_compress_feed_forward(projections, moments, shape, recipe, options, ids_shape))
    with decomposition(index, "q_proj or k_proj"):
        add(_compress_query_key(projections, moments, shape, recipe))
    with decomposition(index, "v_proj and o_proj"):
        add(_compress_value_output(projections, moments, shape, surveyed, recipe, config))
    _replace_weights(layer, config, shape, weights)


@torch.no_grad()
def prune_layers(
    dense: DenseModel,
    calibration_ids: Tensor,
    plan: list[LayerShape],
    survey: list[LayerSurvey],
    recipe: Recipe,
    options: PruningOptions,
    progress: Progress,
) -> None:
    """Prune every decoder layer of `dense` to `plan`, on the stream that the recipe names."""
    finished, entered, hidden = progress.pruned()
    if finished == len(plan):
        return
    hidden, calls = enter_layers(dense, calibration_ids, hidden, options.cache_device)
    for index, layer in dense.layers(options.device, "prune", first=entered):
        if index < finished:
            if not recipe.dense_stream:
                _restore(layer, dense.config, plan[index], progress.weights(index))
            propagate(layer, hidden, calls[index], options.batch_size)
            continue
        last = index + 1 == len(plan)
        moments = Moments(recipe.calibration_needs(plan[index].correction_rank > 0), dense.config.num_attention_heads)
        calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=recipe.dense_stream and not last)
        check_finite(moments, index, hidden.dtype)
        work = (recipe, options, calibration_ids.shape)
        _prune_layer(index, layer, moments, dense.config, plan[index], survey[index].moments, *work)
        del moments
        if not recipe.dense_stream and not last:
            propagate(layer, hidden, calls[index], options.batch_size)
        progress.save_layer(index, layer, None if last else hidden)
    progress.wait()
