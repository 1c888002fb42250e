"""Allocation by one multiplier: sizes of all parts of all layers, each as large as its damage is worth.

A part is what one size decides: the ranks of queries and keys, the width of value heads, the channels of an MLP. With
what every size damages and holds, the plan minimises sum_p damage_p(size_p) + mu sum_p parameters_p(size_p), so that no
plan with as few parameters does less damage; mu is the smallest that meets the budget.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Halvings of the interval, on a logarithmic scale, in which the multiplier is sought.
HALVINGS = 100


@dataclass(frozen=True)
class Choice:
    """The sizes of which a part gets one.

    Attributes:
        sizes: (m,), those with fewer parameters first.
        parameters: (m,) that it holds at each, not descending, float64.
        damage: (m,) that each does, not negative, float64.
    """

    sizes: list[int]
    parameters: Tensor
    damage: Tensor


def merged(parts: list[Choice]) -> Choice:
    """One part whose size is that of all; they have equal sizes to choose from."""
    parameters, damage = (torch.stack([getattr(p, name) for p in parts]).sum(0) for name in ("parameters", "damage"))
    return Choice(parts[0].sizes, parameters, damage)


def least_damage(parts: list[Choice], parameters: float) -> list[int]:
    """The sizes of all parts that hold at most so many parameters together and do least damage, or all but least.

    What the multiplier leaves of the budget, since sizes come in steps, goes to where it spares most.

    Raises:
        ValueError: even the smallest sizes hold more.
    """
    if sum(part.parameters[0].item() for part in parts) > parameters:
        raise ValueError("the smallest sizes hold more than is to be left")

    def chosen(multiplier: float) -> list[int]:
        # Of equal ones the smallest.
        return [int((part.damage + multiplier * part.parameters).argmin()) for part in parts]

    def held(indices: list[int]) -> float:
        return sum(part.parameters[index].item() for part, index in zip(parts, indices, strict=True))

    # The logarithms of damage per parameter lie far within this.
    low, high = -60.0, 60.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if held(chosen(10**middle)) <= parameters else (middle, high)
    indices = chosen(10**high)
    left = parameters - held(indices)
    while True:
        spared = [_most_spared(part, index, left) for part, index in zip(parts, indices, strict=True)]
        best = max(range(len(parts)), key=lambda number: spared[number][0])
        if spared[best][0] < 0:  # nothing larger fits
            return [part.sizes[index] for part, index in zip(parts, indices, strict=True)]
        left -= (parts[best].parameters[spared[best][1]] - parts[best].parameters[indices[best]]).item()
        indices[best] = spared[best][1]


def _most_spared(part: Choice, index: int, left: float) -> tuple[float, int]:
    """The most damage per parameter that a larger size spares with no more than `left` parameters, and its index.

    Of equal ones it is the largest, so that what does no damage is kept as long as the budget has room; -1 where no
    larger size fits.
    """
    more = part.parameters[index + 1 :] - part.parameters[index]
    fits = (more > 0) & (more <= left)
    if not fits.any():
        return -1.0, index
    spared = torch.where(fits, (part.damage[index] - part.damage[index + 1 :]) / more, -1.0)
    best = int((spared == spared.max()).nonzero()[-1])
    return spared[best].item(), index + 1 + best
