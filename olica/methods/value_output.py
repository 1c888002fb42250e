"""Orthogonal neuron decomposition (OND) of the value and output projections, and what the paper compares it with.

Attention mixes tokens, never the features of a value head, so any basis of a head's space serves: rotate W_v by Q^T
and every W_o that reads the head by Q, and the layer's function is unchanged. In a good basis few directions matter;
the others are dropped. With grouped-query attention a key/value head is read by G query heads: one basis serves all.

    D hidden size, H query heads, K key/value heads, G = H/K, d head width, v kept width
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import Projections
from .linalg import principal_components
from .moments import Moments, Statistic, diagonal, needs, per_head
from .query_key import low_rank_factors


def _value_heads(layer: Projections, num_kv_heads: int) -> Tensor:
    """W_v by head (K, d, D), float64."""
    return layer.v_proj.weight.double().unflatten(0, (num_kv_heads, -1))


def _output_heads(layer: Projections, num_heads: int, num_kv_heads: int) -> Tensor:
    """W_o by key/value head and query head of its group (K, G, D, d), float64."""
    heads = layer.o_proj.weight.double().unflatten(1, (num_heads, -1))  # (D, H, d)
    return heads.movedim(0, 1).unflatten(0, (num_kv_heads, -1))


class Directions(NamedTuple):
    """The value heads of a layer in another basis; per head the product W_o W_v is what it was.

    Attributes:
        value: W_v (K, d, D) there.
        output: W_o (K, G, D, d) there.
        features: (K, d, d); a head's features z are features^T z there.
    """

    value: Tensor
    output: Tensor
    features: Tensor


def rotate(layer: Projections, basis: Tensor, num_heads: int, num_kv_heads: int) -> Directions:
    """The value heads in an orthogonal basis (K, d, d), a basis vector per column."""
    value = basis.mT @ _value_heads(layer, num_kv_heads)
    return Directions(value, _output_heads(layer, num_heads, num_kv_heads) @ basis[:, None], basis)


@needs(diagonal("attention_output"))
def output_directions(layer: Projections, moments: Moments, num_heads: int, num_kv_heads: int) -> Directions:
    """Basis of the released code (D3): eigenvectors of W_o^T D^2 W_o, D the norms of the layer's attention output.

    A group's matrix is the sum over its query heads.
    """
    weight = _output_heads(layer, num_heads, num_kv_heads)
    squared_norms = moments[diagonal("attention_output")].to(weight.device)
    weighted = weight * squared_norms[:, None]
    return rotate(layer, principal_components((weighted.mT @ weight).sum(1)), num_heads, num_kv_heads)


@needs()
def value_directions(layer: Projections, moments: Moments | None, num_heads: int, num_kv_heads: int) -> Directions:
    """Basis of the paper's Fast-OND: right singular vectors of W_v (D, d) in the paper's orientation."""
    weight = _value_heads(layer, num_kv_heads)
    return rotate(layer, principal_components(weight @ weight.mT), num_heads, num_kv_heads)


@needs()
def product_directions(layer: Projections, moments: Moments | None, num_heads: int, num_kv_heads: int) -> Directions:
    """The paper's full OND: singular vectors of W_o W_v (G D, D), a group's output projections one below the other.

    The singular values go to W_v. The product, whose rank is d, is never formed: with W_o = Q R and W_v^T = P S by QR,
    its singular vectors are those of R S^T (d, d), in the bases Q and P. W_v becomes U^T R W_v, which needs no inverse.
    """
    value = _value_heads(layer, num_kv_heads)
    output = _output_heads(layer, num_heads, num_kv_heads)
    output_basis, output_factor = torch.linalg.qr(output.flatten(1, 2))  # (K, G D, d) and (K, d, d)
    value_factor = torch.linalg.qr(value.mT, mode="r").R
    left = torch.linalg.svd(output_factor @ value_factor.mT).U  # (K, d, d)
    features = output_factor.mT @ left
    return Directions(features.mT @ value, (output_basis @ left).view_as(output), features)


@needs()
def given_directions(layer: Projections, moments: Moments | None, num_heads: int, num_kv_heads: int) -> Directions:
    """The value heads as they are: Wanda without any decomposition."""
    width = layer.v_proj.out_features // num_kv_heads
    identity = torch.eye(width, dtype=torch.float64, device=layer.v_proj.weight.device)
    return rotate(layer, identity.expand(num_kv_heads, -1, -1), num_heads, num_kv_heads)


def _head_moment(moments: Moments, features: Tensor, num_kv_heads: int) -> Tensor:
    """Second moment of every feature of every head in another basis (K, G, d)."""
    blocks = moments[per_head("heads")].double().unflatten(0, (num_kv_heads, -1))  # (K, G, d, d)
    return (features[:, None] * (blocks @ features[:, None])).sum(-2)


@needs(diagonal("attention_input"), per_head("heads"))
def released_importance(value: Tensor, output: Tensor, head_moment: Tensor, input_moment: Tensor) -> Tensor:
    """Importance of the released code (D5): L2 norm of the Wanda-scaled row of W_v, plus that of the column of W_o.

    Args:
        value: W_v (K, d, D) in the new basis.
        output: W_o (K, G, D, d) there.
        head_moment: (K, G, d) second moment of the heads' features there.
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


@dataclass(frozen=True)
class NarrowedHeads:
    """Every value head loses the directions that matter least; v_proj and o_proj become narrower.

    Attributes:
        directions: (layer, survey moments, H, K) -> the heads in the basis whose directions are to be dropped.
        importance: one of the functions above.
    """

    directions: Callable
    importance: Callable
    is_factorised = False

    @property
    def survey_needs(self) -> tuple[Statistic, ...]:
        """Statistics of the dense stream."""
        return self.directions.needs

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics of the layer's calibration."""
        return self.importance.needs

    def __call__(
        self,
        layer: Projections,
        moments: Moments,
        surveyed: Moments | None,
        shape: LayerShape,
        num_heads: int,
        num_kv_heads: int,
    ) -> dict[str, Tensor]:
        """Put every value head into its basis and keep its most important `shape.v_head_dim` directions.

        Returns:
            Weights and biases of `v_proj` and `o_proj`, under the names of the padded and cropped
            projections where heads become narrower, of the dense ones (rotated, nothing dropped) where they do not.
        """
        value, output, features = self.directions(layer, surveyed, num_heads, num_kv_heads)
        v_bias, o_bias = layer.v_proj.bias, layer.o_proj.bias
        turned_bias = None if v_bias is None else (features.mT @ v_bias.double().view(num_kv_heads, -1, 1)).squeeze(-1)
        suffix = ""
        if shape.v_head_dim < features.shape[-1]:
            suffix = ".linear"
            head_moment = _head_moment(moments, features, num_kv_heads)
            scores = self.importance(value, output, head_moment, moments[diagonal("attention_input")])  # (K, d)
            kept = scores.topk(shape.v_head_dim).indices.sort().values  # (K, v)
            value = value.take_along_dim(kept[..., None], dim=1)  # (K, v, D)
            output = output.take_along_dim(kept[:, None, None], dim=-1)  # (K, G, D, v)
            turned_bias = None if turned_bias is None else turned_bias.gather(-1, kept)
        pruned = {
            f"v_proj{suffix}.weight": value.flatten(0, 1),
            f"o_proj{suffix}.weight": output.flatten(0, 1).movedim(0, 1).flatten(1),
        }
        if turned_bias is not None:
            pruned[f"v_proj{suffix}.bias"] = turned_bias.flatten()
        if o_bias is not None:
            pruned[f"o_proj{suffix}.bias"] = o_bias
        return pruned


@dataclass(frozen=True)
class FactorisedProjections:
    """v_proj and o_proj become pairs of low-rank factors, each on its own (the paper's SVD and AWSVD of Table 5).

    Attributes:
        by_input: whether the error is weighted by the norms of the projection's input, or every feature counts alike.
    """

    by_input: bool
    is_factorised = True
    survey_needs = ()

    @property
    def needs(self) -> tuple[Statistic, ...]:
        """Statistics of the layer's calibration."""
        return (diagonal("attention_input"), diagonal("heads")) if self.by_input else ()

    def __call__(
        self,
        layer: Projections,
        moments: Moments,
        surveyed: Moments | None,
        shape: LayerShape,
        num_heads: int,
        num_kv_heads: int,
    ) -> dict[str, Tensor]:
        """Factors of ranks `shape.v_rank` and `shape.o_rank`; a rank of 0 leaves the projection as it is."""
        factors = {}
        for name, tap, rank in (("v_proj", "attention_input", shape.v_rank), ("o_proj", "heads", shape.o_rank)):
            projection = getattr(layer, name)
            weight = projection.weight
            if rank:
                moment = moments[diagonal(tap)] if self.by_input else weight.new_ones(weight.shape[1])
                factors |= low_rank_factors(name, projection, moment, rank)
        return factors
