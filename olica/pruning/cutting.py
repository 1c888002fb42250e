"""A decoder layer as the methods see it, and the weights that they return put into it."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..methods.moments import Moments
from ..methods.recipe import Findings, Layer, Stage, Weights, needs_of, together
from ..methods.sizes import Sizes
from ..model.configuration_olica import LayerShape, head_dim
from ..model.modeling_olica import MODULES, CroppedHeadsLinear, PaddedHeadsLinear, projections_of, shrink_layer
from .options import Work
from .soundness import cast_weights, solvable

# What methods may see and change beside it, where it spans all heads.
NORMS = ("q_norm", "k_norm")


def as_seen(layer: nn.Module, config: PreTrainedConfig, moments: Moments, findings: Findings) -> Layer:
    """What a method gets of a decoder layer."""
    sizes, norms = Sizes.of(config), {}
    if sizes.norm_spans_heads:
        norms = {name: layer.get_submodule(path).weight for name, path in _paths(layer, NORMS).items()}
    return Layer(projections_of(layer), moments, findings, sizes, norms)


def heads_of(layer: nn.Module, config: PreTrainedConfig) -> int:
    """Query heads whose outputs o_proj reads, of a layer that may have lost some in an earlier pass."""
    width = getattr(projections_of(layer).o_proj, "in_features", None)  # a wrapper or factors read all
    return config.num_attention_heads if width is None else width // head_dim(config)


def cut(
    work: Work, index: int, layer: nn.Module, stages: tuple[Stage, ...], seen: Layer, shape: LayerShape
) -> set[str]:
    """Have the stages of a pass replace their parts of `layer`, whose moments are used up; returns the parts' names.

    Raises:
        UsageError: a fit or a decomposition fails, or the dtype cannot hold what it gives.
        RuntimeError: what the stages return is not what the new modules take.
    """

    def compute(number: int, stage: Stage) -> Weights:
        own = replace(seen, later=needs_of(stages[number + 1 :], shape))
        with solvable(index, stage.about):
            # What is computed in double precision is cast before the next is.
            weights = cast_weights(stage(own, shape), index, next(layer.parameters()))
        own.drop(stage.needs(shape))
        return weights

    parts = work.options.processes.share_out([partial(compute, *numbered) for numbered in enumerate(stages)])
    return put(layer, work.dense.config, shape, together(parts))


def put(layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, weights: Weights) -> set[str]:
    """Shrink the parts of `layer` that `weights` name to `shape`, and fill them; returns the parts' names.

    Raises:
        RuntimeError: the weights are more or fewer than the new modules take, or of other sizes.
    """
    replaced = {name.partition(".")[0] for name in weights}.intersection(MODULES)
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
    _check_filled(layer)
    return replaced


def _check_filled(layer: nn.Module) -> None:
    unfilled = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
    if unfilled:
        raise RuntimeError(f"no weights were computed for {', '.join(unfilled)}")


def check_complete(layer: nn.Module, config: PreTrainedConfig, shape: LayerShape, replaced: Collection[str]) -> None:
    """Raise RuntimeError unless nothing but the parts `replaced` had to become other modules for `shape`."""
    _shrink(layer, config, shape, set(MODULES) - set(replaced))
    _check_filled(layer)


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
