"""Sizes in whole numbers: ranks that shares make, multiples, and what attention then holds.

D hidden size, H query heads, K key/value heads, d head width, F intermediate channels
"""

from dataclasses import replace
from math import ceil, floor

from ..model.configuration_olica import LayerShape
from .sizes import Sizes


def factor_rank(out_features: int, in_features: int, sparsity: float) -> int:
    """Rank at which two factors have (1 - sparsity) of the parameters of an (out, in) matrix, rounded up.

    A rank-r pair holds r (in + out) numbers. 0, "leave it dense", where the pair would hold no fewer than the matrix.
    """
    size = out_features * in_features
    rank = ceil((1 - sparsity) * size / (out_features + in_features))
    return rank if rank * (out_features + in_features) < size else 0


def nearest_multiple(size: float, multiple: int) -> int:
    """The multiple nearest to `size`, the larger of two, and at least one."""
    return multiple * max(1, floor(size / multiple + 0.5))


def rounded(size: float, multiple: int, dense: int) -> int:
    """The nearest multiple of `multiple` if that is smaller than the dense size; the dense size stays."""
    return dense if size >= dense else min(nearest_multiple(size, multiple), dense)


def rounded_rank(rank: int, multiple: int, out_features: int, in_features: int) -> int:
    """The nearest multiple for a pair of factors; 0, "leave it dense", as `factor_rank` does."""
    rounded = rank and nearest_multiple(rank, multiple)
    return rounded if rounded * (out_features + in_features) < out_features * in_features else 0


def attention_parameters(layer: Sizes, shape: LayerShape) -> int:
    """Weights of the four attention projections of a layer of sizes `shape`, biases left out."""
    hidden, query, key = layer.hidden_size, layer.query_width, layer.key_width
    sizes = (  # rank, width beside the hidden size, that width where there are no factors
        (shape.q_rank, query, query),
        (shape.k_rank, key, key),
        (shape.v_rank, key, layer.num_kv_heads * shape.v_head_dim),
        (shape.o_rank, query, layer.num_heads * shape.v_head_dim),
    )
    return sum(rank * (whole + hidden) if rank else left * hidden for rank, whole, left in sizes)


def round_shape(shape: LayerShape, layer: Sizes, multiple: int) -> LayerShape:
    """Sizes that are multiples of `multiple` N (or dense), for the same number of parameters as nearly as may be.

    Ranks and the width of value heads go to the nearest multiple. The intermediate channels F take up what the
    attention projections' parameters A change to, A', since a channel has 3 D parameters:

        F' = N round((F + (A - A') / 3 D) / N)

    so that a layer ends within N/2 channels of the size it had, unless F' would be below N or above the dense size.

    Raises:
        ValueError: the attention projections leave the MLP no channel.
    """
    hidden, query, key = layer.hidden_size, layer.query_width, layer.key_width
    whole = replace(
        shape,
        q_rank=rounded_rank(shape.q_rank, multiple, query, hidden),
        k_rank=rounded_rank(shape.k_rank, multiple, key, hidden),
        v_head_dim=rounded(shape.v_head_dim, multiple, layer.head_dim),
        v_rank=rounded_rank(shape.v_rank, multiple, key, hidden),
        o_rank=rounded_rank(shape.o_rank, multiple, hidden, query),
    )
    moved = attention_parameters(layer, shape) - attention_parameters(layer, whole)
    channels = shape.intermediate_size + moved / (3 * hidden)
    if channels < 1:
        raise ValueError("an MLP would keep no channel")
    return replace(whole, intermediate_size=rounded(channels, multiple, layer.intermediate_size))
