"""Magnitude pruning: the heads and channels whose weights are smallest go, by one threshold over all layers.

The baseline of the field; no text has a part in it. D hidden size, K key/value heads, d head width, F channels
"""

from torch import Tensor

from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP
from .heads import RemovedGroups, by_group
from .linalg import squared_norms
from .moments import Statistic, needs
from .recipe import Findings, Layer, Method, NoParameters, Survey
from .threshold import CHANNEL_SCORES, GROUP_SCORES, GlobalThreshold
from .units import channel_parameters, group_parameters


@needs()
def channel_scores(layer: Layer) -> Tensor:
    """Mean square (F,) of the 3 D weights of every channel."""
    gate, up, down = layer.weights.gate_proj, layer.weights.up_proj, layer.weights.down_proj
    squares = squared_norms(gate.weight) + squared_norms(up.weight) + squared_norms(down.weight.T)
    return squares / channel_parameters(layer.sizes)


@needs()
def group_scores(layer: Layer) -> Tensor:
    """Mean square (K,) of the weights that go with every key/value head and its query heads."""
    sizes, weights = layer.sizes, layer.weights
    of_queries, of_keys = squared_norms(weights.o_proj.weight.T), squared_norms(weights.v_proj.weight)
    if not sizes.norm_spans_heads:  # queries and keys go too
        of_queries, of_keys = (
            squared_norms(weights.q_proj.weight) + of_queries,
            squared_norms(weights.k_proj.weight) + of_keys,
        )
    of_both = by_group(of_queries, sizes) + of_keys.unflatten(0, (-1, sizes.head_dim)).sum(1)
    return of_both / group_parameters(sizes)


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
