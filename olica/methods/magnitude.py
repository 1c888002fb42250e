"""Magnitude pruning: the heads and channels whose weights are smallest go, by one threshold over all layers.

The baseline of the field; no text has a part in it. D hidden size, K key/value heads, d head width, F channels
"""

from torch import Tensor

from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP
from .heads import RemovedGroups, by_group
from .linalg import by_rows
from .moments import Statistic, needs
from .recipe import Findings, Layer, Method, NoParameters, Survey
from .threshold import CHANNEL_SCORES, GROUP_SCORES, GlobalThreshold


def _squares(weight: Tensor) -> Tensor:
    """Sums of the squares of the rows."""
    return by_rows(lambda rows: rows.square().sum(1), weight)


@needs()
def channel_scores(layer: Layer) -> Tensor:
    """Mean square (F,) of the 3 D weights of every channel."""
    gate, up, down = layer.weights.gate_proj, layer.weights.up_proj, layer.weights.down_proj
    squares = _squares(gate.weight) + _squares(up.weight) + _squares(down.weight.T)
    return squares / (3 * layer.sizes.hidden_size)


@needs()
def group_scores(layer: Layer) -> Tensor:
    """Mean square (K,) of the weights of every key/value head and its query heads."""
    sizes, weights = layer.sizes, layer.weights
    of_queries = by_group(_squares(weights.q_proj.weight) + _squares(weights.o_proj.weight.T), sizes)
    of_keys = (_squares(weights.k_proj.weight) + _squares(weights.v_proj.weight)).unflatten(0, (-1, sizes.head_dim))
    return (of_queries + of_keys.sum(1)) / (2 * sizes.hidden_size * sizes.head_dim * (1 + sizes.groups))


class MagnitudeSurvey(Survey):
    """Reads the weights of all layers; sends nothing through them."""

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`."""
        return frozenset()

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`."""
        return {GROUP_SCORES: group_scores(layer).cpu(), CHANNEL_SCORES: channel_scores(layer).cpu()}


def scored(found: Findings) -> tuple[Tensor, Tensor]:
    """The scores as they are: mean squares are comparable."""
    return found[GROUP_SCORES], found[CHANNEL_SCORES]


def magnitude(_parameters: NoParameters) -> Method:
    """The method."""
    stages = (ThinnedMLP(channel_scores), RemovedGroups(group_scores))
    return Method("pruned", MagnitudeSurvey(), GlobalThreshold(scored, biases=False), (stages,))
