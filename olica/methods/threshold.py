"""Allocation by one threshold for all layers: what scores least goes, wherever it is.

D hidden size, K key/value heads, d head width, F intermediate channels
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .ratios import WholeUnits
from .recipe import Findings
from .sizes import Budget, Sizes
from .units import channel_parameters, group_parameters, most_removable, thinned_shapes, to_remove

# Names of the findings that a global threshold cuts: scores of the groups of heads (K,), and of the channels (F,).
GROUP_SCORES, CHANNEL_SCORES = "group_scores", "channel_scores"


@dataclass(frozen=True)
class GlobalThreshold(WholeUnits):
    """An allocation by one threshold for all layers: units go in the order of their scores until the budget is met.

    A unit is a key/value head with its query heads, or a channel of an MLP. Of each kind a layer keeps at least one.

    Attributes:
        scored: (layer's findings) -> scores of its groups (K,) and of its channels (F,), comparable over all layers.
    """

    scored: Callable[[Findings], tuple[Tensor, Tensor]]

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> None:
        """See `Allocate`."""
        if to_remove(sizes, budget, self.biases) > sum(map(most_removable, sizes)):
            raise ValueError("every layer would be left with one head and one channel, or less")

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        scores: list[Tensor] = []
        costs: list[int] = []
        for layer, found in zip(sizes, findings, strict=True):
            scores += [self._without_best(part.double()) for part in self.scored(found)]
            costs += [group_parameters(layer), channel_parameters(layer)]
        owners = torch.cat([torch.full((len(part),), number) for number, part in enumerate(scores)])
        order = owners[torch.cat(scores).argsort(stable=True)].tolist()
        counts = self._taken(order, costs, to_remove(sizes, budget, self.biases))
        kept = [float(layer.intermediate_size - gone) for layer, gone in zip(sizes, counts[1::2], strict=True)]
        return thinned_shapes(sizes, counts[::2], kept, budget.round_to, self.biases)

    @staticmethod
    def _taken(order: list[int], costs: list[int], left: float) -> list[int]:
        """How many units of each part go: those first in `order` that fit into what is `left` to remove.

        A head that would be too much stays, and channels take its place.
        """
        counts, smallest = [0] * len(costs), min(costs)
        for part in order:
            if left < smallest / 2:
                break
            if costs[part] <= max(left, smallest):
                counts[part] += 1
                left -= costs[part]
        return counts

    @staticmethod
    def _without_best(scores: Tensor) -> Tensor:
        """Scores (n - 1,) of the units that may go: all but the highest."""
        return scores.sort().values[:-1]
