"""A pruned model in the modules of its family's own: factors multiplied out, and zeros where something was removed.

D hidden size, H query heads, K key/value heads, d head width, v kept width of a value head,
F intermediate channels, r rank
"""

import copy
from dataclasses import fields
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from ..checks import all_finite
from .configuration_olica import PREFIX, LayerShape, PrunedConfig, head_dim
from .modeling_olica import (
    FUSED,
    CorrectedMLP,
    CroppedHeadsLinear,
    LowRankLinear,
    PaddedHeadsLinear,
    projections_of,
    separate_projections,
)

# Bias of the gate of a channel that is to pass on what `up_proj` gives. Its activation has to be this number itself,
# and a power of two, by which the row of `up_proj` is divided, changes no digit.
OPEN = 32.0


def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the dense model of which a pruned one of `config` was made."""
    ours = {"model_type", "architectures", "auto_map", "transformers_version", *PrunedConfig.__annotations__}
    return CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)](
        **{name: value for name, value in config.to_dict().items() if name not in ours}
    )


def plan_of(config: PreTrainedConfig) -> list[LayerShape]:
    """Sizes of all layers of a pruned model of `config`; a layer that has all of its heads says 0 of them."""
    dense = LayerShape(0, 0, head_dim(config), config.intermediate_size).to_dict()
    rows = config.layer_shapes or [dense] * config.num_hidden_layers
    return [LayerShape(**row | {"kv_heads": row.get("kv_heads", 0) % config.num_key_value_heads}) for row in rows]


def dense_config(config: PreTrainedConfig, plan: list[LayerShape]) -> PreTrainedConfig:
    """The configuration of the family's own model, of the dense sizes `config`, that can do what pruned layers do.

    It has biases where layers got some that the dense model lacks, or corrections, which go into channels that biases
    keep open (`filled`).

    Raises:
        ValueError: the family's model has no place for one of these; says for which.
    """
    known, channels = {field.name for field in fields(config)}, config.intermediate_size
    corrected = [shape for shape in plan if shape.correction_rank]
    o_bias, down_bias = any(shape.o_bias for shape in plan), any(shape.down_bias for shape in plan)
    faults = {
        "biases of o_proj, which the family lacks": o_bias and "attention_bias" not in known,
        "biases of down_proj, which the family lacks": down_bias and "mlp_bias" not in known,
    }
    if corrected:
        faults |= {
            "corrections beside MLPs, whose gates have no biases in this family": "mlp_bias" not in known,
            "corrections of a higher rank than channels have gone": any(
                shape.intermediate_size + shape.correction_rank > channels for shape in corrected
            ),
            "corrections, with this activation": "mlp_bias" in known and not _is_open(config.hidden_act),
        }
    if any(faults.values()):
        raise ValueError(f"the layout dense cannot hold {', '.join(words for words in faults if faults[words])}")
    settings = config.to_dict()
    settings |= {"attention_bias": True} if o_bias else {}
    settings |= {"mlp_bias": True} if down_bias or corrected else {}
    return type(config).from_dict(settings)


def _is_open(activation: str) -> bool:
    return ACT2FN[activation](torch.tensor(OPEN)).item() == OPEN


@torch.no_grad()
def filled(layer: nn.Module, own: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights with which a layer of the family's own model does what a pruned one does.

    A correction x -> E R x, R (r, D) and E (D, r), takes r of the removed channels, each with the gate OPEN whatever
    x is: act(OPEN) (R / OPEN) x = R x is what E reads as those columns of `down_proj`.

    Args:
        layer: pruned, with weights.
        own: without, of sizes that are not smaller.
        config: of the model that `own` is of.

    Returns:
        The weights by the names and in the order of `own`.

    Raises:
        ValueError: a product is beyond the largest number of the dtype.
    """
    like = copy.deepcopy(own)
    separate_projections(like, config)
    state = layer.state_dict()
    weights: dict[str, Tensor] = {}
    matrices = {name: as_matrix(projection) for name, projection in projections_of(layer)._asdict().items()}
    if large := [name for name, (weight, _) in matrices.items() if not all_finite(weight)]:
        raise ValueError(f"a product of factors of {large[0]} is beyond the largest number of the dtype")
    for name, empty in like.named_parameters():
        path, _, kind = name.rpartition(".")
        if (projection := path.rpartition(".")[2]) in matrices:
            weight, bias = matrices[projection]
            weights[name] = _padded(weight if kind == "weight" else bias, empty.shape, weight.dtype)
        else:
            weights[name] = state[name]
    if isinstance(layer.mlp, CorrectedMLP):
        correction = layer.mlp.correction
        first, rank = matrices["down_proj"][0].shape[1], correction.reduce.out_features
        weights["mlp.gate_proj.bias"][first : first + rank] = OPEN
        weights["mlp.up_proj.weight"][first : first + rank] = correction.reduce.weight / OPEN
        weights["mlp.down_proj.weight"][:, first : first + rank] = correction.expand.weight
    for path, parts in FUSED.items():
        separate = [f"{path}.{part}.weight" for part in parts]
        if separate[0] in weights:
            weights[f"{path}.weight"] = torch.cat([weights.pop(name) for name in separate])
    return {name: weights[name] for name, _ in own.named_parameters()}


def as_matrix(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, in) that a projection of a pruned layer applies, and its bias (out,), if it has one.

    Removed heads at the end are left out where they are zeros that nothing is added to.
    """
    if isinstance(projection, LowRankLinear):
        reduce, expand = projection.reduce.weight, projection.expand.weight
        return (expand.double() @ reduce.double()).to(expand.dtype), cast(Tensor | None, projection.expand.bias)
    if isinstance(projection, PaddedHeadsLinear | CroppedHeadsLinear):
        weight, bias = as_matrix(projection.linear)
        kept, narrower = projection.kept, projection.width - projection.kept
        pad = nn.functional.pad
        if isinstance(projection, CroppedHeadsLinear):
            return pad(weight.unflatten(1, (-1, kept)), (0, narrower)).flatten(1), bias  # (D, h, v) -> (D, h d)
        if bias is not None:
            bias = pad(bias.unflatten(0, (-1, kept)), (0, narrower)).flatten()
        return pad(weight.unflatten(0, (-1, kept)), (0, 0, 0, narrower)).flatten(0, 1), bias  # (k, v, D) -> (k d, D)
    return cast(Tensor, projection.weight), cast(Tensor | None, projection.bias)


def _padded(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor with zeros behind it in every dimension; zeros alone in place of None."""
    grown = torch.zeros(shape, dtype=dtype)
    if tensor is not None:
        grown[tuple(map(slice, tensor.shape))] = tensor
    return grown
