"""Sizes by what they damage: a survey that measures it, and the plan that does least.

How far the model's output moves is measured for each part of a layer alone, at a size that is tried; and for each part
of all layers at once, at that size and at a smaller one. For other sizes the damage follows the part's own error, which
is known for every size: in proportion to it up to the size that is tried, and as a power of it beyond, which the two
sizes of all layers decide.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..model.configuration_olica import LayerShape
from .linalg import ROUNDING
from .moments import Statistic
from .multiplier import Choice, least_damage, merged
from .parts import LEAST, Part
from .recipe import Allocate, Cut, Findings, Layer, TravellingSurvey, Trial, needs_of, workspace_of
from .sizes import Budget, Sizes

# Groups of layers that the survey tries, at the most: in deeper models neighbouring layers are tried together.
MOST_GROUPS = 32
# Outputs are compared at every so many tokens.
STRIDE = 4
# Unless the user says, one of so many samples sees the variants, and at least so many do: what they take is then the
# same share of the time whatever the text, and small texts still tell the sizes apart.
SAMPLES_PER_PROBE = 48
FEWEST_PROBES = 4
# Between these lies the power of its error with which the damage of a part may grow.
POWERS = (0.1, 4.0)
HALVINGS = 50


def divergence(dense: Tensor, changed: Tensor) -> float:
    """Mean over the tokens of KL(dense || changed), in nats, of log-probabilities (tokens, V)."""
    return kl_div(changed, dense, reduction="batchmean", log_target=True).item()


@dataclass(frozen=True)
class DamageSurvey(TravellingSurvey):
    """Findings: what every size of every part damages, in nats of KL(dense || pruned), by the part's name.

    Attributes:
        parts: of every layer.
        probes: how many samples the sizes that are tried are measured on; 0: as many as suit the calibration set.
    """

    parts: tuple[Part, ...]
    probes: int

    stride = STRIDE

    def samples(self, calibration: int) -> int:
        """See `TravellingSurvey`."""
        return min(self.probes or max(calibration // SAMPLES_PER_PROBE, FEWEST_PROBES), calibration)

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`."""
        names = [part.name for part in self.parts]
        return {"ridge": parameters.ridge, "probes": parameters.probes, "parts": names}

    def trials(self, layers: int) -> list[Trial]:
        """See `TravellingSurvey`: of every part the larger size, of layer after layer; then both sizes, of all."""
        variants, alone = range(2 * len(self.parts)), self._alone(layers)
        return [Trial(variant, alone) for variant in variants[::2]] + [Trial(variant, layers) for variant in variants]

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`; the stages read the same whatever the sizes."""
        return needs_of((part.stage for part in self.parts), LayerShape(1, 1, 1, 1))

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Survey`."""
        cutting = max(workspace_of([stage], sizes, tried) for tried, stage in self.variants(sizes))
        return max(cutting, *(part.workspace(sizes) for part in self.parts))

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`: errors by size, and those of the sizes that are tried."""
        found: Findings = {}
        for part in self.parts:
            errors = part.errors(layer).cpu()
            found |= {part.name: errors, f"{part.name}_tried": errors[part.tried_sizes(layer.sizes)]}
        return found

    def variants(self, sizes: Sizes) -> list[tuple[LayerShape, Cut]]:
        """See `TravellingSurvey`: two sizes of each part, all else dense."""
        dense = LayerShape(0, 0, sizes.head_dim, sizes.intermediate_size)
        return [(part.shape(dense, sizes, size), part.stage) for part in self.parts for size in part.tried_sizes(sizes)]

    def read(self, logits: Tensor) -> Tensor:
        """See `TravellingSurvey`: log-probabilities, float64."""
        return logits.double().log_softmax(-1)

    def compare(self, dense: Tensor, changed: Tensor) -> float:
        """See `TravellingSurvey`."""
        return divergence(dense, changed)

    def complete(self, findings: list[Findings], compared: dict[tuple[int, int], float]) -> list[Findings]:
        """See `TravellingSurvey`.

        With KL_g of a group of layers that was tried by itself and J, J' of all layers, at the larger and at the
        smaller size, and a layer's errors e, of which e_1 at the larger size, a layer damages

            d(e) = s KL_g / e_g min(e, e_1) max(e / e_1, 1)^p,    s = J / sum KL_g,

        e_g the sum of the group's e_1. The power p is that at which the sum over the layers is J' at the smaller size.
        """
        completed: list[Findings] = [{} for _ in findings]
        for number, part in enumerate(self.parts):
            of_all = len(self.parts) + 2 * number
            alone = {first: max(damage, 0.0) for (first, trial), damage in compared.items() if trial == number}
            larger, smaller = (max(compared[0, trial], 0.0) for trial in (of_all, of_all + 1))
            together = larger / sum(alone.values()) if larger and any(alone.values()) else 1.0
            tried = torch.stack([found[f"{part.name}_tried"] for found in findings])
            curves = []
            for group, damage in zip(tried[:, 0].split(self._alone(len(findings))), alone.values(), strict=True):
                error = group.sum().item()
                # Where nothing was lost nothing was measured: a part that loses all counts as one nat then.
                slope = together * damage / error if error > ROUNDING else 1.0
                curves += [Curve(slope, own) for own in group.tolist()]
            power = power_of(curves, tried[:, 1], smaller)
            for kept, found, curve in zip(completed, findings, curves, strict=True):
                kept[part.name] = curve.damage(found[part.name], power)
        return completed

    @staticmethod
    def _alone(layers: int) -> int:
        """How many neighbouring layers, of so many in all, are tried by themselves."""
        return ceil(layers / MOST_GROUPS)


@dataclass(frozen=True)
class Curve:
    """How the damage of a part grows with its error.

    Attributes:
        slope: nats for each unit of the error, up to the error that was tried.
        tried: that error.
    """

    slope: float
    tried: float

    def damage(self, errors: Tensor, power: float) -> Tensor:
        """In nats, of errors of any shape; beyond the one that was tried it grows as a power of the error."""
        if self.tried <= ROUNDING:
            return self.slope * errors
        return self.slope * errors.clamp(max=self.tried) * (errors / self.tried).clamp(min=1) ** power


def power_of(curves: list[Curve], errors: Tensor, damage: float) -> float:
    """The power, within POWERS, at which layers with such curves and `errors` (L,) do so much damage together.

    It is 1 where the errors are none that a curve has beyond what was tried, or nothing was measured.
    """

    def together(power: float) -> float:
        return sum(curve.damage(error, power).item() for curve, error in zip(curves, errors, strict=True))

    low, high = POWERS
    if not damage or together(low) == together(high):
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if together(middle) >= damage else (middle, high)
    return high


@dataclass(frozen=True)
class LeastDamage(Allocate):
    """The sizes that do least damage together for the parameters that they hold.

    Attributes:
        parts: of every layer.
        is_uniform: whether all layers get the same sizes.
    """

    parts: tuple[Part, ...]
    is_uniform: bool

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> None:
        """See `Allocate`."""
        fewest = [
            part.parameters(layer, part.candidates(layer, budget.round_to)[0]) for layer, part in self._all(sizes)
        ]
        if sum(fewest) > self._left(sizes, budget):
            raise ValueError(f"with {LEAST:.0%} of every part, in steps of --round_to, more is left than is to be")

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        choices = [
            self._choice(part, layer, budget, found[part.name])
            for part in self.parts
            for layer, found in zip(sizes, findings, strict=True)
        ]
        layers = len(sizes)
        if self.is_uniform:
            alike = [merged(choices[start : start + layers]) for start in range(0, len(choices), layers)]
            chosen = [size for size in least_damage(alike, self._left(sizes, budget)) for _ in range(layers)]
        else:
            chosen = least_damage(choices, self._left(sizes, budget))
        shapes = [LayerShape(0, 0, layer.head_dim, layer.intermediate_size) for layer in sizes]
        for number, size in enumerate(chosen):
            part, index = self.parts[number // layers], number % layers
            shapes[index] = part.shape(shapes[index], sizes[index], size)
        return shapes

    def damage(self, sizes: list[Sizes], plan: list[LayerShape], findings: list[Findings]) -> list[float]:
        """See `Allocate`: the sum over the parts."""
        return [
            sum(found[part.name][self._size(part, layer, shape)].item() for part in self.parts)
            for layer, shape, found in zip(sizes, plan, findings, strict=True)
        ]

    @staticmethod
    def _size(part: Part, layer: Sizes, shape: LayerShape) -> int:
        """The size of a part in a layer of sizes `shape`."""
        return next(size for size in part.candidates(layer, 1) if part.shape(shape, layer, size) == shape)

    def alike(self, kv_heads: tuple[int, ...]) -> "LeastDamage":
        """See `Allocate`; how many heads stay is a matter of the parts."""
        return replace(self, is_uniform=True)

    def of_channels(self) -> "LeastDamage":
        """See `Allocate`; what goes is a matter of the parts."""
        return self

    def _all(self, sizes: list[Sizes]) -> list[tuple[Sizes, Part]]:
        return [(layer, part) for part in self.parts for layer in sizes]

    def _left(self, sizes: list[Sizes], budget: Budget) -> float:
        """Parameters that the parts may hold."""
        dense = sum(part.parameters(layer, part.candidates(layer, 1)[-1]) for layer, part in self._all(sizes))
        return dense - budget.to_remove

    @staticmethod
    def _choice(part: Part, layer: Sizes, budget: Budget, damage: Tensor) -> Choice:
        sizes = part.candidates(layer, budget.round_to)
        parameters = torch.tensor([part.parameters(layer, size) for size in sizes], dtype=torch.float64)
        return Choice(sizes, parameters, damage[sizes])
