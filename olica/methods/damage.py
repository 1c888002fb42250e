"""Sizes by what they damage: a survey that measures it, and the plan that does least.

What a size damages is measured once for each part of a layer, by how far the model's output moves when the part gets a
size that is tried; for other sizes it is taken to grow as the part's own error does, which is known for every size.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from ..model.configuration_olica import LayerShape
from .linalg import ROUNDING
from .moments import Statistic
from .multiplier import Choice, least_damage, merged
from .parts import LEAST, Part
from .recipe import Allocate, Cut, Findings, Layer, TravellingSurvey, needs_of, workspace_of
from .sizes import Budget, Sizes

# So many layers at each end are tried alone: what they damage is least like what their neighbours do.
ALONE = 2
# Groups that the layers between them form at the most, of neighbours that are tried together.
MOST_GROUPS = 14
# Outputs are compared at every so many tokens.
STRIDE = 4
# Unless the user says, one of so many samples sees the variants, and at least so many do: what they take is then the
# same share of the time whatever the text, and small texts still tell the sizes apart.
SAMPLES_PER_PROBE = 32
FEWEST_PROBES = 8
# Half of the samples are read, but at least so many: how errors grow as sizes shrink takes less text than what is cut.
ENOUGH_READ = 128
# Of a token whose logit grows by more, so much counts: the sum of exponentials fits into single precision.
LARGEST_EXPONENT = 80


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

    @property
    def most_variants(self) -> int:  # type: ignore[override]
        """See `TravellingSurvey`."""
        return len(self.parts)

    def reads(self, calibration: int) -> int:
        """See `Survey`."""
        return min(max(ceil(calibration / 2), ENOUGH_READ, self.probes), calibration)

    def samples(self, calibration: int) -> int:
        """See `TravellingSurvey`."""
        return min(self.probes or max(calibration // SAMPLES_PER_PROBE, FEWEST_PROBES), calibration)

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`."""
        names = [part.name for part in self.parts]
        return {"ridge": parameters.ridge, "probes": parameters.probes, "parts": names}

    def groups(self, layers: int) -> list[range]:
        """See `TravellingSurvey`."""
        first = min(ALONE, layers)
        last = max(layers - ALONE, first)
        size = max(ceil((last - first) / MOST_GROUPS), 1)
        starts = [*range(first), *range(first, last, size), *range(last, layers)]
        return [range(*pair) for pair in pairwise([*starts, layers])]

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`; the stages read the same whatever the sizes."""
        return needs_of((part.stage for part in self.parts), LayerShape(1, 1, 1, 1))

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Survey`."""
        tried = [(part.stage, shape) for part, (shape, _) in zip(self.parts, self._tried(sizes), strict=True)]
        cutting = max(workspace_of([stage], sizes, shape) for stage, shape in tried)
        return max(cutting, *(part.workspace(sizes) for part in self.parts))

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`: errors by size, and the one of the size that is tried."""
        found: Findings = {}
        for part, (_, size) in zip(self.parts, self._tried(layer.sizes), strict=True):
            errors = part.errors(layer).cpu()
            found |= {part.name: errors, f"{part.name}_tried": errors[size]}
        return found

    def variants(self, sizes: Sizes) -> list[tuple[LayerShape, Cut]]:
        """See `TravellingSurvey`: one for each part."""
        return [(shape, part.stage) for part, (shape, _) in zip(self.parts, self._tried(sizes), strict=True)]

    def compare(self, dense: Tensor, changed: Tensor) -> list[float]:
        """See `TravellingSurvey`: means over the tokens of KL(dense || changed), in nats.

        With p = softmax(z) and d = z' - z about its mean under p, KL = log(1 + sum p (exp d - 1)): in single precision
        small divergences do not sink in the rounding of large logits.
        """
        chances = dense.softmax(-1)
        chances /= chances.sum(-1, keepdim=True)  # what they are off by would count as often as all logits move alike
        found = []
        for logits in changed:
            moved = logits - dense
            moved -= vecdot(chances, moved)[:, None]
            moved.clamp_(max=LARGEST_EXPONENT).expm1_()
            found.append(vecdot(chances, moved).log1p())
        return torch.stack(found).double().mean(-1).tolist()

    def complete(self, findings: list[Findings], compared: dict[tuple[int, int], float]) -> list[Findings]:
        """See `TravellingSurvey`: an error of e does the damage KL e / e', e' that at the size tried.

        The layers of a group share its KL alike, whatever their errors are: where a few huge activations make up most
        of an output, as in some layers, errors are a hundredth of the neighbours', and the damage is not.
        """
        completed: list[Findings] = [{} for _ in findings]
        for number, part in enumerate(self.parts):
            for group in self.groups(len(findings)):
                tried = {index: findings[index][f"{part.name}_tried"].item() for index in group}
                lossy = [index for index in group if tried[index] > ROUNDING]
                shared = max(compared[group.start, number], 0.0) / max(len(lossy), 1)
                for index in group:
                    # Where nothing was lost nothing was measured: a part that loses all counts as one nat then.
                    per_error = shared / tried[index] if index in lossy else 1.0
                    completed[index][part.name] = per_error * findings[index][part.name]
        return completed

    def _tried(self, layer: Sizes) -> list[tuple[LayerShape, int]]:
        """For each part the shape of the layer in which it alone is pruned, and its size."""
        dense, sizes = layer.dense_shape, [part.tried_size(layer) for part in self.parts]
        return [(part.shape(dense, layer, size), size) for part, size in zip(self.parts, sizes, strict=True)]


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
        shapes = [layer.dense_shape for layer in sizes]
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
