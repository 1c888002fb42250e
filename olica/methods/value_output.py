"""Orthogonal neuron decomposition (OND) of the value and output projections, and what the paper compares it with.

Attention mixes tokens, never the features of a value head, so any basis of a head's space serves: rotate W_v by Q^T
and every W_o that reads the head by Q, and the layer's function is unchanged. In a good basis few directions matter;
the others are dropped. With grouped-query attention a key/value head is read by G query heads: one basis serves all.

    D hidden size, H query heads, K key/value heads, G = H/K, d head width, v kept width
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..model.configuration_olica import LayerShape
from .linalg import diagonal_blocks, principal_components
from .moments import DOUBLE, Moments, Needing, Statistic, diagonal, full, needs, per_head
from .query_key import low_rank_factors
from .recipe import Layer, Weights
from .refit import Refit, with_ridge
from .sizes import Sizes
from .thinning import highest, thin

# What the released basis asks of the survey: the diagonal of the attention output's second moment, by this name.
OUTPUT_MOMENT = "attention_output"


def value_heads(layer: Layer) -> Tensor:
    """W_v by head (K, d, D), float64."""
    return layer.weights.v_proj.weight.double().unflatten(0, (layer.sizes.num_kv_heads, -1))


def output_heads(layer: Layer) -> Tensor:
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
    return Directions(basis.mT @ value_heads(layer), output_heads(layer) @ basis[:, None], basis)


@needs()
def output_directions(layer: Layer) -> Directions:
    """Basis of the released code (D3): eigenvectors of W_o^T D^2 W_o, D the norms of the dense layer's output.

    A group's matrix is the sum over its query heads. The norms are the survey's finding OUTPUT_MOMENT (D,).
    """
    weight = output_heads(layer)
    squared_norms = layer.findings[OUTPUT_MOMENT].to(weight.device)
    weighted = weight * squared_norms[:, None]
    return rotate(layer, principal_components((weighted.mT @ weight).sum(1)))


@needs()
def value_directions(layer: Layer) -> Directions:
    """Basis of the paper's Fast-OND: right singular vectors of W_v (D, d) in the paper's orientation."""
    weight = value_heads(layer)
    return rotate(layer, principal_components(weight @ weight.mT))


def singular_directions(layer: Layer, left_vectors: Callable[[Tensor, Tensor], Tensor]) -> Directions:
    """Left singular vectors of W_o W_v M, a group's output projections one below the other, M some metric of the input.

    The product is never formed: with W_o = Q R by QR (Q (K, G D, d), R (K, d, d)) they are Q U, U those of R W_v M. W_o
    becomes Q U and W_v becomes U^T R W_v, which needs no inverse. Where heads are wider than G D, columns of zeros fill
    Q and rows of zeros R: directions that reach no output.

    Args:
        layer: whose value heads they are.
        left_vectors: gives U (K, d, d), of R and W_v (K, d, D).
    """
    value, output = value_heads(layer), output_heads(layer)
    basis, factor = torch.linalg.qr(output.flatten(1, 2))
    missing = factor.shape[2] - factor.shape[1]
    basis, factor = pad(basis, (0, missing)), pad(factor, (0, 0, 0, missing))
    left = left_vectors(factor, value)
    features = factor.mT @ left
    return Directions(features.mT @ value, (basis @ left).view_as(output), features)


@needs()
def product_directions(layer: Layer) -> Directions:
    """The paper's full OND: singular vectors of W_o W_v (G D, D); the singular values go to W_v.

    With W_v^T = P S by QR those of R W_v are those of R S^T (d, d).
    """
    return singular_directions(
        layer, lambda factor, value: torch.linalg.svd(factor @ torch.linalg.qr(value.mT, mode="r").R.mT).U
    )


def activation_directions(ridge: float) -> Needing[[Layer], Directions]:
    """Basis in which leading directions are those that the output needs most, by what the heads carry.

    A group's query heads mix its values z with the second moments A_q and read them by W_o,q. With A = sum A_q = L L^T
    and B = sum W_o,q^T W_o,q, the r directions N that lose least, if every query head had the moment A and its map were
    refitted to N^T z, are L^-T V, V the r leading eigenvectors of L^T B L. The basis is orthogonal, and its first r
    directions span the same space for every r: Q of N = Q R. Exact where heads are plain.

    Args:
        ridge: what is added to A, in its mean diagonals: enough to make it definite.
    """

    @needs(full("heads"))
    def directions(layer: Layer) -> Directions:
        output = output_heads(layer)
        pooled = head_blocks(layer.moments[full("heads")], layer.sizes).sum(1)
        factor = torch.linalg.cholesky(with_ridge(pooled, ridge))
        needed = factor.mT @ (output.mT @ output).sum(1) @ factor
        leading = torch.linalg.solve_triangular(factor.mT, principal_components(needed), upper=True)
        return rotate(layer, torch.linalg.qr(leading).Q)

    return directions


@needs()
def given_directions(layer: Layer) -> Directions:
    """The value heads as they are: Wanda without any decomposition."""
    sizes = layer.sizes
    identity = torch.eye(sizes.head_dim, dtype=torch.float64, device=layer.weights.v_proj.weight.device)
    return rotate(layer, identity.expand(sizes.num_kv_heads, -1, -1))


@needs()
def in_order(layer: Layer, directions: Directions) -> Tensor:
    """Importance (K, d) of directions that come with the most important one first."""
    sizes = layer.sizes
    return torch.arange(sizes.head_dim, 0, -1, device=directions.value.device).expand(sizes.num_kv_heads, -1)


def _head_moment(moments: Moments, features: Tensor, num_kv_heads: int) -> Tensor:
    """Second moment of every feature of every head in another basis (K, G, d); none is below zero by rounding."""
    blocks = moments[per_head("heads")].double().unflatten(0, (num_kv_heads, -1))  # (K, G, d, d)
    return (features[:, None] * (blocks @ features[:, None])).sum(-2).clamp(min=0)


@needs(diagonal("attention_input"), per_head("heads"))
def released_importance(layer: Layer, directions: Directions) -> Tensor:
    """Importance (K, d) of the released code (D5): L2 norms of the Wanda-scaled row of W_v and column of W_o, added.

    A group's column spans its query heads.
    """
    head_moment = _head_moment(layer.moments, directions.features, layer.sizes.num_kv_heads)
    from_value = (directions.value.square() @ layer.moments[diagonal("attention_input")]).sqrt()
    from_output = (directions.output.square().sum(-2) * head_moment).sum(1).sqrt()
    return from_value + from_output


@needs(diagonal("attention_input"), per_head("heads"))
def paper_importance(layer: Layer, directions: Directions) -> Tensor:
    """Importance (K, d) of the paper's eq. 6: the sum of the Wanda scores of the weights.

    Fast-OND moves the singular values from W_v to W_o, so that the rows of W_v have norm 1. The score of a column of
    W_o does not change by that: its weights grow by what its feature shrinks.
    """
    head_moment = _head_moment(layer.moments, directions.features, layer.sizes.num_kv_heads)
    norms = directions.value.norm(dim=-1, keepdim=True)
    orthonormal = torch.where(norms > 0, directions.value / norms, 0.0)
    from_value = orthonormal.abs() @ layer.moments[diagonal("attention_input")].sqrt()
    from_output = (directions.output.abs().sum(-2) * head_moment.sqrt()).sum(1)
    return from_value + from_output


@dataclass(frozen=True)
class NarrowedHeads:
    """Stage: every value head loses the directions that matter least; v_proj and o_proj become narrower.

    Attributes:
        directions: layer -> the heads in the basis whose directions are to be dropped.
        importance: (layer, directions) -> (K, d).
        refit: of `o_proj`, over the features of all heads; None leaves the columns that stay as they are.
        rotates_whole: whether heads that lose nothing are put into the basis too, as the released code does.
    """

    directions: Needing[[Layer], Directions]
    importance: Needing[[Layer, Directions], Tensor]
    refit: Refit | None = None
    rotates_whole: bool = True

    about = "v_proj and o_proj"
    makes = "narrower value heads"
    own_form = makes

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        refit = {full("heads")} if self.refit else set()
        return self.directions.needs | self.importance.needs | refit

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: both projections, and again in the basis; for a refit the moment, in two bases and between."""
        bases = DOUBLE * 2 * sizes.value_output
        if self.refit is None:
            return bases
        refit = self.refit.workspace(sizes.hidden_size, sizes.query_width, sizes.num_heads * shape.v_head_dim)
        return bases + DOUBLE * 3 * sizes.query_width**2 + refit

    def refitted(self, refit: Refit | None) -> "NarrowedHeads":
        """See `Stage`."""
        return replace(self, refit=refit)

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Put every value head into its basis and keep its most important `shape.v_head_dim` directions.

        Returns:
            Weights and biases of `v_proj` and `o_proj`; where heads keep their width, rotated, and nothing dropped.
        """
        sizes = layer.sizes
        if shape.v_head_dim == sizes.head_dim and not self.rotates_whole:
            return {}
        directions = self.directions(layer)
        value, features = directions.value, directions.features
        output = directions.output.flatten(0, 1).movedim(0, 1).flatten(1)  # (D, H d)
        v_bias, o_bias = layer.weights.v_proj.bias, layer.weights.o_proj.bias
        turned_bias = None
        if v_bias is not None:
            turned_bias = (features.mT @ v_bias.double().view(sizes.num_kv_heads, -1, 1)).squeeze(-1)
        if shape.v_head_dim < sizes.head_dim:
            kept = highest(self.importance(layer, directions), shape.v_head_dim)  # (K, v)
            value = value.take_along_dim(kept[..., None], dim=1)  # (K, v, D)
            turned_bias = None if turned_bias is None else turned_bias.gather(-1, kept)
            heads = torch.arange(sizes.num_heads, device=kept.device) * sizes.head_dim
            columns = (heads[:, None] + kept.repeat_interleave(sizes.groups, 0)).flatten()  # (H v,)
            refit = None
            if self.refit:
                refit = partial(self.refit, moment=moment_in_basis(layer.moments[full("heads")], features, sizes))
            output = thin(output, columns, refit).weight
        pruned = {"v_proj.weight": value.flatten(0, 1), "o_proj.weight": output}
        if turned_bias is not None:
            pruned["v_proj.bias"] = turned_bias.flatten()
        if o_bias is not None:
            pruned["o_proj.bias"] = o_bias
        return pruned


def moment_in_basis(moment: Tensor, features: Tensor, sizes: Sizes) -> Tensor:
    """Second moment (H d, H d) of all heads' features in the basis `features` (K, d, d), from what it is (H d, H d)."""
    basis = features.repeat_interleave(sizes.groups, 0)  # (H, d, d)

    def turned(rows: Tensor) -> Tensor:
        return (basis.mT @ rows.unflatten(0, (sizes.num_heads, -1))).flatten(0, 1)

    return turned(turned(moment).T).T


def head_blocks(moment: Tensor, sizes: Sizes) -> Tensor:
    """The blocks (K, G, d, d) of every head of a second moment (H d, H d)."""
    return diagonal_blocks(moment, sizes.head_dim).unflatten(0, (sizes.num_kv_heads, -1))


@dataclass(frozen=True)
class FactorisedProjections:
    """Stage: v_proj and o_proj become pairs of low-rank factors, each on its own (the paper's SVD, AWSVD of Table 5).

    Attributes:
        by_input: whether the error is weighted by the norms of the projection's input, or every feature counts alike.
    """

    by_input: bool

    about = "v_proj and o_proj"
    makes = "factors of v, o"
    own_form = makes

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        return frozenset({diagonal("attention_input"), diagonal("heads")} if self.by_input else ())

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: the factors of v, then o's W, W C W^T, its eigenvectors and what finding them takes."""
        return DOUBLE * (sizes.hidden_size * (sizes.key_width + 2 * sizes.query_width) + 4 * sizes.hidden_size**2)

    def refitted(self, refit: Refit | None) -> "FactorisedProjections":
        """See `Stage`; the factors are what is chosen."""
        return self

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
