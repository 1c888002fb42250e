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
from .linalg import principal_components
from .moments import DOUBLE, Moments, Needing, Statistic, diagonal, needs, per_head
from .query_key import low_rank_factors
from .recipe import Layer, Weights
from .sizes import Sizes
from .thinning import highest

# What the released basis asks of the survey: the diagonal of the attention output's second moment, by this name.
OUTPUT_MOMENT = "attention_output"


def _value_heads(layer: Layer) -> Tensor:
    """W_v by head (K, d, D), float64."""
    return layer.weights.v_proj.weight.double().unflatten(0, (layer.sizes.num_kv_heads, -1))


def _output_heads(layer: Layer) -> Tensor:
    """W_o by key/value head and query head of its group (K, G, D, d), float64."""
    heads = layer.weights.o_proj.weight.double().unflatten(1, (layer.sizes.num_heads, -1))  # (D, H, d)
    return heads.movedim(0, 1).unflatten(0, (layer.sizes.num_kv_heads, -1))


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


def rotate(layer: Layer, basis: Tensor) -> Directions:
    """The value heads in an orthogonal basis (K, d, d), a basis vector per column."""
    return Directions(basis.mT @ _value_heads(layer), _output_heads(layer) @ basis[:, None], basis)


def output_directions(layer: Layer) -> Directions:
    """Basis of the released code (D3): eigenvectors of W_o^T D^2 W_o, D the norms of the dense layer's output.

    A group's matrix is the sum over its query heads. The norms are the survey's finding OUTPUT_MOMENT (D,).
    """
    weight = _output_heads(layer)
    squared_norms = layer.findings[OUTPUT_MOMENT].to(weight.device)
    weighted = weight * squared_norms[:, None]
    return rotate(layer, principal_components((weighted.mT @ weight).sum(1)))


def value_directions(layer: Layer) -> Directions:
    """Basis of the paper's Fast-OND: right singular vectors of W_v (D, d) in the paper's orientation."""
    weight = _value_heads(layer)
    return rotate(layer, principal_components(weight @ weight.mT))


def product_directions(layer: Layer) -> Directions:
    """The paper's full OND: singular vectors of W_o W_v (G D, D), a group's output projections one below the other.

    The singular values go to W_v. The product, whose rank is d, is never formed: with W_o = Q R and W_v^T = P S by QR,
    its singular vectors are those of R S^T (d, d), in the bases Q and P. W_v becomes U^T R W_v, which needs no inverse.
    """
    value, output = _value_heads(layer), _output_heads(layer)
    output_basis, output_factor = torch.linalg.qr(output.flatten(1, 2))  # (K, G D, d) and (K, d, d)
    value_factor = torch.linalg.qr(value.mT, mode="r").R
    left = torch.linalg.svd(output_factor @ value_factor.mT).U  # (K, d, d)
    features = output_factor.mT @ left
    return Directions(features.mT @ value, (output_basis @ left).view_as(output), features)


def given_directions(layer: Layer) -> Directions:
    """The value heads as they are: Wanda without any decomposition."""
    sizes = layer.sizes
    identity = torch.eye(sizes.head_dim, dtype=torch.float64, device=layer.weights.v_proj.weight.device)
    return rotate(layer, identity.expand(sizes.num_kv_heads, -1, -1))


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
    """Stage: every value head loses the directions that matter least; v_proj and o_proj become narrower.

    Attributes:
        directions: layer -> the heads in the basis whose directions are to be dropped.
        importance: one of the functions above.
    """

    directions: Callable[[Layer], Directions]
    importance: Needing[[Tensor, Tensor, Tensor, Tensor], Tensor]

    about = "v_proj and o_proj"

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        return self.importance.needs

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: both projections, and both again in the basis."""
        return DOUBLE * 2 * sizes.value_output

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Put every value head into its basis and keep its most important `shape.v_head_dim` directions.

        Returns:
            Weights and biases of `v_proj` and `o_proj`; where heads keep their width, rotated, and nothing dropped.
        """
        sizes = layer.sizes
        value, output, features = self.directions(layer)
        v_bias, o_bias = layer.weights.v_proj.bias, layer.weights.o_proj.bias
        turned_bias = None
        if v_bias is not None:
            turned_bias = (features.mT @ v_bias.double().view(sizes.num_kv_heads, -1, 1)).squeeze(-1)
        if shape.v_head_dim < sizes.head_dim:
            head_moment = _head_moment(layer.moments, features, sizes.num_kv_heads)
            input_moment = layer.moments[diagonal("attention_input")]
            kept = highest(self.importance(value, output, head_moment, input_moment), shape.v_head_dim)  # (K, v)
            value = value.take_along_dim(kept[..., None], dim=1)  # (K, v, D)
            output = output.take_along_dim(kept[:, None, None], dim=-1)  # (K, G, D, v)
            turned_bias = None if turned_bias is None else turned_bias.gather(-1, kept)
        pruned = {
            "v_proj.weight": value.flatten(0, 1),
            "o_proj.weight": output.flatten(0, 1).movedim(0, 1).flatten(1),
        }
        if turned_bias is not None:
            pruned["v_proj.bias"] = turned_bias.flatten()
        if o_bias is not None:
            pruned["o_proj.bias"] = o_bias
        return pruned


@dataclass(frozen=True)
class FactorisedProjections:
    """Stage: v_proj and o_proj become pairs of low-rank factors, each on its own (the paper's SVD, AWSVD of Table 5).

    Attributes:
        by_input: whether the error is weighted by the norms of the projection's input, or every feature counts alike.
    """

    by_input: bool

    about = "v_proj and o_proj"

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        return frozenset({diagonal("attention_input"), diagonal("heads")} if self.by_input else ())

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: the factors of v, then o's W, W C W^T, its eigenvectors and what finding them takes."""
        return DOUBLE * (sizes.hidden_size * (sizes.key_width + 2 * sizes.query_width) + 4 * sizes.hidden_size**2)

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Factors of ranks `shape.v_rank` and `shape.o_rank`; a rank of 0 leaves the projection as it is."""
        factors: Weights = {}
        for name, tap, rank in (("v_proj", "attention_input", shape.v_rank), ("o_proj", "heads", shape.o_rank)):
            projection = getattr(layer.weights, name)
            weight = projection.weight
            if rank:
                moment = layer.moments[diagonal(tap)] if self.by_input else weight.new_ones(weight.shape[1])
                factors |= low_rank_factors(name, projection, moment, rank)
        return factors
