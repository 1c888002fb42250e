"""Thinning: a linear map reads fewer features than it did.

Channels of an MLP, directions of a value head and whole heads are all columns of the map that reads them: W (O, f).
What stays is chosen by a score, W may be refitted on it, and what W lost is repaired from the moments of its input.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .moments import DOUBLE, Needing, Statistic
from .recipe import Layer, Weights
from .sizes import Sizes


def highest(scores: Tensor, kept: int, protected_fraction: float = 0.0) -> Tensor:
    """Indices, ascending, of the units that stay.

    Args:
        scores: (..., f).
        kept: k, how many of the f stay.
        protected_fraction: share of f, taken from the lowest scores, that stays whatever its score.

    Returns:
        (..., k) indices: the protected ones and the highest scores.
    """
    order = scores.argsort(dim=-1, stable=True)
    units = order.shape[-1]
    protected = min(int(protected_fraction * units), kept)
    staying = torch.cat([order[..., :protected], order[..., units - (kept - protected) :]], dim=-1)
    return staying.sort(dim=-1).values


class Selection(ABC):
    """What chooses the units that stay where scores do not: the choice may depend on how many they are.

    Attributes:
        needs: statistics that it reads.
    """

    needs: frozenset[Statistic]

    @abstractmethod
    def workspace(self, sizes: Sizes) -> int:
        """Bytes that a call takes at its peak, beside the sums of `needs`."""

    @abstractmethod
    def __call__(self, layer: Layer, kept: int) -> Tensor:
        """Indices (kept,), ascending, of the units that stay."""


Choice = Needing[[Layer], Tensor] | Selection  # scores, the highest of which stay; or what selects


def chosen(choice: Choice, layer: Layer, kept: int, protected_fraction: float = 0.0) -> Tensor:
    """Indices (kept,), ascending, of the units that stay; `protected_fraction` as in `highest`, of scores alone."""
    return choice(layer, kept) if isinstance(choice, Selection) else highest(choice(layer), kept, protected_fraction)


def others(kept: Tensor, units: int) -> Tensor:
    """Indices (f - k,), ascending, of the units that are not among those `kept` (k,) of f."""
    staying = torch.zeros(units, dtype=torch.bool, device=kept.device)
    staying[kept] = True
    return (~staying).nonzero().flatten()


@dataclass(frozen=True)
class Thinned:
    """A map W (O, f) of which only some columns are left.

    Attributes:
        dense: W (O, f).
        kept: (k,) indices of the columns that are left, ascending.
        weight: W' (O, k), what they have become.
        is_refitted: whether they have changed.
    """

    dense: Tensor
    kept: Tensor
    weight: Tensor
    is_refitted: bool

    def lost(self) -> tuple[Tensor, Tensor]:
        """The columns (p,) that are not what they were, and the difference W - W' there, dW (O, p), float64."""
        if self.is_refitted:
            change = self.dense.to(torch.float64, copy=True)
            change[:, self.kept] -= self.weight.double()
            return torch.arange(self.dense.shape[1], device=self.kept.device), change
        gone = others(self.kept, self.dense.shape[1])
        return gone, self.dense[:, gone].double()


def thin(dense: Tensor, kept: Tensor, refit: Callable[[Tensor, Tensor], Tensor] | None = None) -> Thinned:
    """Keep the columns `kept` (k,) of W (O, f), as they are, or as `refit`, given both, makes them (O, k)."""
    weight = dense[:, kept] if refit is None else refit(dense, kept)
    return Thinned(dense, kept, weight, refit is not None)


class Repair(Protocol):
    """What makes up for the columns that a map lost."""

    @property
    def own_form(self) -> str:
        """See `Stage`."""

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """Statistics that it reads."""

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """Bytes that a call takes at its peak, beside the sums of `needs` (fewer where it drops some before)."""

    def __call__(self, thinned: Thinned, layer: Layer, shape: LayerShape) -> Weights:
        """Further weights and biases."""


@dataclass(frozen=True)
class RemovedMean:
    """The bias of a thinned projection takes up the mean of what is gone: b' = b + dW E[x].

    Attributes:
        projection: its name.
        mean: layer -> E[x] (f,) of its input.
    """

    projection: str
    mean: Needing[[Layer], Tensor]

    own_form = "biases"

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Repair`."""
        return self.mean.needs

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Repair`; dW in double precision, of the wider of the two at the most."""
        return DOUBLE * sizes.hidden_size * max(sizes.query_width, sizes.intermediate_size)

    def __call__(self, thinned: Thinned, layer: Layer, shape: LayerShape) -> Weights:
        """See `Repair`."""
        columns, change = thinned.lost()
        mean = change @ self.mean(layer).to(change)[columns]  # (O,)
        bias = getattr(layer.weights, self.projection).bias
        return {f"{self.projection}.bias": mean if bias is None else bias.double() + mean}
