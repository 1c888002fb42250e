"""Wanda-sp: Wanda (Sun et al., ICLR 2024) for structures, as the FLAP paper (An et al., AAAI 2024) compares with it.

A weight's score is its size times the norm of what it reads, |W_ij| ||x_j||. A feature x_j is a column of the map that
reads it, and its score the sum over the column. Every layer loses the same share of its heads and of its channels;
what stays stays as it is. D hidden size, K key/value heads, F channels
"""

from torch import Tensor

from .feed_forward import ThinnedMLP
from .heads import RemovedGroups, by_group
from .linalg import by_rows
from .moments import diagonal, needs
from .ratios import LayerRatios, uniform
from .recipe import Layer, Method, NoParameters


def column_scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """sum_i |W_ij| ||x_j|| (f,) of the columns of W (D, f), from ||x_j||^2 (f,), float64."""
    return by_rows(lambda columns: columns.abs().sum(1), weight.T) * squared_norms.double().sqrt()


@needs(diagonal("intermediate"))
def channel_scores(layer: Layer) -> Tensor:
    """Scores (F,) of the columns of `down_proj`."""
    return column_scores(layer.weights.down_proj.weight, layer.moments[diagonal("intermediate")])


@needs(diagonal("heads"))
def group_scores(layer: Layer) -> Tensor:
    """Scores (K,) of the key/value heads: sums over the columns of `o_proj` that read their query heads."""
    return by_group(column_scores(layer.weights.o_proj.weight, layer.moments[diagonal("heads")]), layer.sizes)


def wanda_sp(_parameters: NoParameters) -> Method:
    """The method; statistics of a layer are taken once, while all of it is intact, as Wanda does.

    A head goes as a key/value head with its query heads. The paper's models have one query head each.
    """
    stages = (ThinnedMLP(channel_scores), RemovedGroups(group_scores))
    return Method("pruned", None, LayerRatios(uniform, reads_findings=False, biases=False), (stages,))
