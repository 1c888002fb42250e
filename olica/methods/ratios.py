"""Allocation by ratios: every layer loses a share of its own of its heads, and of its channels.

A method says how these shares are to each other; a common factor makes them meet the budget.

D hidden size, K key/value heads, F intermediate channels, L layers
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .linalg import ROUNDING
from .recipe import Allocate, Findings
from .sizes import Budget, Sizes
from .units import channel_parameters, group_parameters, thinned_shapes, to_remove

# Halvings of the interval in which the common factor is sought.
HALVINGS = 100
# (findings of all layers, number of layers) -> (L, 2), not negative: how much of its heads and of its channels a layer
# loses, relative to the others. Rules that read no findings, which are then empty, say so.
Ratios = Callable[[list[Findings], int], Tensor]


def uniform(_findings: list[Findings], layers: int) -> Tensor:
    """`Ratios`: the same for all layers and parts, whatever the findings."""
    return torch.ones(layers, 2, dtype=torch.float64)


def scaled(relative: Tensor, costs: Tensor, caps: Tensor, budget: float) -> Tensor:
    """Ratios c r, or their caps where they are smaller, with the factor c for which they cost the budget.

    Args:
        relative: r, not negative.
        costs: parameters that go where a ratio is 1.
        caps: the largest ratios.
        budget: sum of ratio x cost that is asked for.

    Raises:
        ValueError: it is more than what the caps cost where r is above zero.
    """
    relative, costs, caps = (values.double() for values in (relative, costs, caps))
    most = torch.where(relative > 0, caps, 0.0)
    if budget > (most * costs).sum():
        raise ValueError("the layers that this recipe prunes have too few parameters for it")
    if budget <= 0:
        return torch.zeros_like(relative)
    low, high = 0.0, float((caps[relative > 0] / relative[relative > 0]).max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        costly = (torch.minimum(middle * relative, most) * costs).sum() >= budget
        low, high = (low, middle) if costly else (middle, high)
    return torch.minimum(high * relative, most)


@dataclass(frozen=True)
class WholeUnits(Allocate):
    """An allocation of whole key/value heads and channels, each layer's own.

    Attributes:
        biases: whether what is thinned gets a bias, which takes D parameters each.
    """

    biases: bool = field(kw_only=True)

    def without_repairs(self) -> Self:
        """See `Allocate`."""
        return replace(self, biases=False)

    def alike(self, kv_heads: tuple[int, ...]) -> Allocate:
        """See `Allocate`."""
        return AlikeUnits(kv_heads)


@dataclass(frozen=True)
class LayerRatios(WholeUnits):
    """An allocation by ratios of heads and channels in every layer; each keeps a key/value head and a channel.

    Key/value heads go as wholes with their query heads: what rounding them adds to a layer the next ones have less of,
    and the channels take up what is left of the budget, in the proportion of their ratios.

    Attributes:
        ratios: how they are to each other.
        reads_findings: whether `ratios` does.
        most: the largest ratio of a part.
    """

    ratios: Ratios
    reads_findings: bool
    most: float = 1.0

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> list[LayerShape] | None:
        """See `Allocate`."""
        if not self.reads_findings:
            return self(sizes, budget, [])
        caps = self._caps(sizes)
        if to_remove(sizes, budget, self.biases) > (caps * self._costs(sizes)).sum():
            raise ValueError("every layer would be left with one head and one channel, or less")
        return None

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        relative, costs, caps = self.ratios(findings, len(sizes)), self._costs(sizes), self._caps(sizes)
        left = to_remove(sizes, budget, self.biases)
        of_heads = scaled(relative, costs, caps, left)[:, 0]
        most_channels = (caps * costs)[relative[:, 1] > 0, 1].sum().item()
        groups = self._enough(self._whole(of_heads, sizes), of_heads, sizes, left - most_channels)
        left -= sum(count * group_parameters(layer) for count, layer in zip(groups, sizes, strict=True))
        of_channels = scaled(relative[:, 1], costs[:, 1], caps[:, 1], left)
        kept = [(1 - gone) * layer.intermediate_size for layer, gone in zip(sizes, of_channels.tolist(), strict=True)]
        return thinned_shapes(sizes, groups, kept, budget.round_to, self.biases)

    @staticmethod
    def _whole(ratios: Tensor, sizes: list[Sizes]) -> list[int]:
        """Whole key/value heads that go from each layer."""
        counts, owed = [], 0.0
        for layer, ratio in zip(sizes, ratios.tolist(), strict=True):
            wanted = ratio * layer.num_kv_heads + owed
            count = min(max(round(wanted), 0), layer.num_kv_heads - 1) if ratio else 0
            owed = wanted - count if ratio else owed
            counts.append(count)
        return counts

    @staticmethod
    def _enough(counts: list[int], ratios: Tensor, sizes: list[Sizes], budget: float) -> list[int]:
        """The counts, raised where rounding left them short of a budget, which channels then could not make up for."""
        counts = list(counts)
        wanted = [ratio * layer.num_kv_heads for ratio, layer in zip(ratios.tolist(), sizes, strict=True)]
        short = budget - sum(count * group_parameters(layer) for count, layer in zip(counts, sizes, strict=True))
        while short > 0:
            able = [i for i, layer in enumerate(sizes) if wanted[i] and counts[i] < layer.num_kv_heads - 1]
            if not able:
                break
            index = max(able, key=lambda i: wanted[i] - counts[i])
            counts[index] += 1
            short -= group_parameters(sizes[index])
        return counts

    @staticmethod
    def _costs(sizes: list[Sizes]) -> Tensor:
        return torch.tensor(
            [
                [layer.num_kv_heads * group_parameters(layer), layer.intermediate_size * channel_parameters(layer)]
                for layer in sizes
            ],
            dtype=torch.float64,
        )

    def _caps(self, sizes: list[Sizes]) -> Tensor:
        caps = [[1 - 1 / layer.num_kv_heads, 1 - 1 / layer.intermediate_size] for layer in sizes]
        return torch.tensor(caps, dtype=torch.float64).clamp(max=self.most)


@dataclass(frozen=True)
class AlikeUnits(Allocate):
    """An allocation that takes as many units of every layer: of its heads no more than the sparsity, channels the rest.

    Attributes:
        kv_heads: how many key/value heads a layer may keep, ascending, all of them last.
    """

    kv_heads: tuple[int, ...]

    sizes_are = "alike"
    reads_survey = False

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> list[LayerShape]:
        """See `Allocate`."""
        layer = sizes[0]
        left = budget.to_remove / len(sizes)
        units = layer.num_kv_heads * group_parameters(layer), layer.intermediate_size * channel_parameters(layer)
        # A share that is a whole number of heads but for rounding is one.
        least = (1 - left / sum(units)) * layer.num_kv_heads - ROUNDING
        groups = layer.num_kv_heads - next(count for count in self.kv_heads if count >= least)
        channels = layer.intermediate_size - (left - groups * group_parameters(layer)) / channel_parameters(layer)
        if channels < 1:
            raise ValueError("an MLP would keep no channel")
        return thinned_shapes([layer], [groups], [channels], budget.round_to, biases=False) * len(sizes)

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        return self.before_survey(sizes, budget)
