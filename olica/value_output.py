"""Orthogonal neuron decomposition (OND) of the value and output projections.

Attention mixes tokens, never the features of a value head, so any basis of a head's space serves: rotate W_v by Q^T
and every W_o that reads the head by Q, and the layer's function is unchanged. In a good basis few directions matter;
the others are dropped. With grouped-query attention a key/value head is read by G query heads: one basis serves all.

    D hidden size, H query heads, K key/value heads, G = H/K, d head width, v kept width
"""

import torch
from torch import Tensor

from .configuration_olica import LayerShape
from .linalg import principal_components
from .modeling_olica import Projections
from .moments import Moments, diagonal, needs, per_head


def _value_heads(layer: Projections, num_kv_heads: int) -> Tensor:
    """W_v by head (K, d, D), float64."""
    return layer.v_proj.weight.double().unflatten(0, (num_kv_heads, -1))


def _output_heads(layer: Projections, num_heads: int, num_kv_heads: int) -> Tensor:
    """W_o by key/value head and query head of its group (K, G, D, d), float64."""
    heads = layer.o_proj.weight.double().unflatten(1, (num_heads, -1))  # (D, H, d)
    return heads.movedim(0, 1).unflatten(0, (num_kv_heads, -1))


@needs(diagonal("attention_output"))
def output_basis(layer: Projections, moments: Moments | None, num_heads: int, num_kv_heads: int) -> Tensor:
    """Basis of the released code (D3): eigenvectors of W_o^T D^2 W_o, D the norms of the layer's attention output.

    A group's matrix is the sum over its query heads.

    Returns:
        Orthogonal (K, d, d), a basis vector per column.
    """
    weight = _output_heads(layer, num_heads, num_kv_heads)
    squared_norms = moments[diagonal("attention_output")].to(weight.device)
    weighted = weight * squared_norms[:, None]
    return principal_components((weighted.mT @ weight).sum(1))


@needs()
def value_basis(layer: Projections, moments: Moments | None, num_heads: int, num_kv_heads: int) -> Tensor:
    """Basis of the paper's Fast-OND: right singular vectors of W_v (D, d) in the paper's orientation.

    Returns:
        Orthogonal (K, d, d), a basis vector per column.
    """
    weight = _value_heads(layer, num_kv_heads)
    return principal_components(weight @ weight.mT)


def _rotate(layer: Projections, basis: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """W_v (K, d, D) and W_o (K, G, D, d) in the basis: per head the product W_o W_v is what it was."""
    value = basis.mT @ _value_heads(layer, num_kv_heads)
    output = _output_heads(layer, num_heads, num_kv_heads) @ basis[:, None]
    return value, output


def _rotated_head_moment(moments: Moments, basis: Tensor, num_kv_heads: int) -> Tensor:
    """Second moment of every feature of every head in the basis (K, G, d)."""
    blocks = moments[per_head("heads")].double().unflatten(0, (num_kv_heads, -1))  # (K, G, d, d)
    return (basis[:, None] * (blocks @ basis[:, None])).sum(-2)


@needs(diagonal("attention_input"), per_head("heads"))
def released_importance(value: Tensor, output: Tensor, head_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Importance of the released code (D5): L2 norm of the Wanda-scaled row of W_v, plus that of the column of W_o.

    Args:
        value: rotated W_v (K, d, D).
        output: rotated W_o (K, G, D, d).
        head_moment: (K, G, d) second moment of the rotated head features.
        input_moment: (D,) second moment of the attention's input.

    Returns:
        (K, d); a group's column spans its query heads.
    """
    from_value = (value.square() @ input_moment).sqrt()
    from_output = (output.square().sum(-2) * head_moment).sum(1).sqrt()
    return from_value + from_output


@needs(diagonal("attention_input"), per_head("heads"))
def paper_importance(value: Tensor, output: Tensor, head_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Importance of the paper's eq. 6: the sum of the Wanda scores of the weights. Shapes as above.

    Fast-OND moves the singular values from W_v to W_o, so that the rows of W_v have norm 1. The score of a column of
    W_o does not change by that: its weights grow by what its feature shrinks.
    """
    norms = value.norm(dim=-1, keepdim=True)
    orthonormal = torch.where(norms > 0, value / norms, 0.0)
    from_value = orthonormal.abs() @ input_moment.sqrt()
    from_output = (output.abs().sum(-2) * head_moment.sqrt()).sum(1)
    return from_value + from_output


def prune_value_output(
    layer: Projections,
    moments: Moments,
    shape: LayerShape,
    basis: Tensor,
    importance,
    num_heads: int,
    num_kv_heads: int,
) -> dict[str, Tensor]:
    """Rotate every value head into its basis and keep its most important `shape.v_head_dim` directions.

    Args:
        layer: dense projections.
        moments: of the statistics that `importance` needs.
        shape: sizes to reach.
        basis: orthogonal (K, d, d).
        importance: one of the functions above.
        num_heads: H.
        num_kv_heads: K.

    Returns:
        Weights and biases of `v_proj` and `o_proj`, under the names of the padded and cropped
        projections where heads become narrower, of the dense ones (rotated, nothing dropped) where they do not.
    """
    value, output = _rotate(layer, basis, num_heads, num_kv_heads)
    v_bias, o_bias = layer.v_proj.bias, layer.o_proj.bias
    rotated_bias = None if v_bias is None else (basis.mT @ v_bias.double().view(num_kv_heads, -1, 1)).squeeze(-1)
    suffix = ""
    if shape.v_head_dim < basis.shape[-1]:
        suffix = ".linear"
        head_moment = _rotated_head_moment(moments, basis, num_kv_heads)
        scores = importance(value, output, head_moment, moments[diagonal("attention_input")])  # (K, d)
        kept = scores.topk(shape.v_head_dim).indices.sort().values  # (K, v)
        value = value.take_along_dim(kept[..., None], dim=1)  # (K, v, D)
        output = output.take_along_dim(kept[:, None, None], dim=-1)  # (K, G, D, v)
        rotated_bias = None if rotated_bias is None else rotated_bias.gather(-1, kept)
    pruned = {
        f"v_proj{suffix}.weight": value.flatten(0, 1),
        f"o_proj{suffix}.weight": output.flatten(0, 1).movedim(0, 1).flatten(1),
    }
    if rotated_bias is not None:
        pruned[f"v_proj{suffix}.bias"] = rotated_bias.flatten()
    if o_bias is not None:
        pruned[f"o_proj{suffix}.bias"] = o_bias
    return pruned
