"""A decoder layer as the methods see it, and the weights that they return put into it."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..methods.moments import Moments
from ..methods.recipe import Findings, Layer, Stage, Weights
from ..methods.sizes import Sizes
from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import MODULES, CroppedHeadsLinear, PaddedHeadsLinear, projections_of, shrink_layer
from .soundness import cast_weights, solvable

# What methods may see and change beside it, where it spans all heads.
NORMS = ("q_norm", "k_norm")


def as_seen(layer: nn.Module, config: PreTrainedConfig, moments: Moments, findings: Findings) -> Layer:
    """What a method gets of a decoder layer."""
    sizes, norms = Sizes.of(config), {}
    if sizes.norm_spans_heads:
        norms = {name: layer.get_submodule(path).weight for name, path in _paths(layer, NORMS).items()}
    return Layer(projections_of(layer), moments, findings, sizes, norms)


def cut(
    index: int, layer: nn.Module, config: PreTrainedConfig, stages: tuple[Stage, ...], seen: Layer, shape: LayerShape
) -> set[str]:
    """Have the stages of a pass replace their parts of `layer`, whose moments are used up; returns the parts' names.

    Raises:
        UsageError: a fit or a decomposition fails, or the dtype cannot hold what it gives.
        RuntimeError: what the stages return is not what the new modules take.
    """
    weights: Weights = {}
    for number, stage in enumerate(stages):
        later = frozenset().union(*(other.needs(shape) for other in stages[number + 1 :]))
        with solvable(index, stage.about):
            computed = stage(replace(seen, later=later), shape)
            # What is computed in double precision is cast before the next is.
            weights |= cast_weights(computed, index, next(layer.parameters()))
        del computed
        seen.moments.drop(stage.needs(shape), later)
    replaced = {name.partition(".")[0] for name in weights}.intersection(MODULES)
    put(layer, config, shape, weights, replaced)
    return replaced


def put(
    layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, weights: Weights, replaced: Collection[str]
) -> None:
    """Shrink the parts `replaced` of `layer` to `shape`, and fill them with `weights`, by the names of projections.

    Raises:
        RuntimeError: they are more or fewer than the new modules take, or of other sizes.
    """
    _shrink(layer, config, shape, replaced)
    paths, filling = _paths(layer, {name.partition(".")[0] for name in weights}), {}
    for name, tensor in weights.items():
        module, _, rest = name.partition(".")
        path = paths.get(module, module)
        is_wrapped = module in paths and isinstance(layer.get_submodule(path), PaddedHeadsLinear | CroppedHeadsLinear)
        filling[f"{path}.{'linear.' if is_wrapped else ''}{rest}"] = tensor
    placeless = layer.load_state_dict(filling, strict=False, assign=True).unexpected_keys
    if placeless:
        raise RuntimeError(f"the pruned layer has no place for {', '.join(placeless)}")
    unfilled = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    if unfilled:
        raise RuntimeError(f"no weights were computed for {', '.join(unfilled)}")


def check_complete(layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, replaced: Collection[str]) -> None:
    """Raise RuntimeError unless nothing but the parts `replaced` had to become other modules for `shape`."""
    put(layer, config, shape, {}, set(MODULES) - set(replaced))


def restore(layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, weights: dict[str, Tensor]) -> None:
    """Make of a dense `layer` what it had been pruned to."""
    device = next(layer.parameters()).device
    _shrink(layer, config, shape, MODULES)
    layer.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)


def _shrink(layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, replaced: Collection[str]) -> None:
    with torch.device("meta"):  # the new modules are filled, not initialised
        shrink_layer(layer, config, shape, only=replaced)


def _paths(layer: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Where a decoder layer has modules of these names."""
    return {name: path for path, _ in layer.named_modules() if (name := path.rpartition(".")[2]) in names}
