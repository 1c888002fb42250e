"""Ratios by similarity: layers that keep the direction of what enters them lose most (SlimLLM, MoDeGPT).

L layers, N of them that lose anything, c (L,) the cosines of what enters and what leaves a layer
"""

from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from .moments import Statistic, cosine
from .ratios import LayerRatios, WholeUnits
from .recipe import Findings, Layer, Survey
from .sizes import Budget, Sizes
from .units import most_removable, to_remove

# Of the paper's LLaMA-7B: sparsity, share of the 32 layers that lose anything, alpha.
PAPERS = ((0.2, 26 / 32, 10.0), (0.5, 30 / 32, 7.0))
# In place of a number of layers, or of alpha: the one that the paper's values give for the sparsity.
BY_SPARSITY = -1
# What a chosen layer loses at the least, relative to the one that loses most, so that each can where that one is full.
LEAST_RATIO = 1e-12

COSINE = cosine("layer_input", "layer_output")


def papers_selection(sparsity: float, layers: int) -> tuple[int, float]:
    """How many of the layers lose anything, and alpha: on the line through the paper's values at 20 and 50 %."""
    (low, *at_low), (high, *at_high) = PAPERS
    way = (sparsity - low) / (high - low)
    share, alpha = (first + way * (last - first) for first, last in zip(at_low, at_high, strict=True))
    return min(max(floor(share * layers + 0.5), 1), layers), alpha


def softmax_ratios(cosines: Tensor, chosen: int, alpha: float) -> Tensor:
    """N softmax(alpha c) (L,) over the N layers of the highest c, which have a mean of 1; zero elsewhere.

    Args:
        cosines: c (L,), of a layer's input and output, mean over the tokens.
        chosen: N.
        alpha: at least 0.
    """
    most = cosines.double().argsort(descending=True, stable=True)[:chosen]
    share = (alpha * (cosines[most].double() - cosines[most[0]])).exp().clamp(min=LEAST_RATIO)
    return torch.zeros(len(cosines), dtype=torch.float64).index_copy(0, most, chosen * share / share.sum())


@dataclass(frozen=True)
class CosineRatios(WholeUnits):
    """Heads and channels of a layer lose the same ratio, R N softmax(alpha c) in N layers and nothing in the others.

    The initial ratio R is the factor for which the whole meets the budget.

    Attributes:
        pruned_layers: N, or BY_SPARSITY.
        alpha: how fast ratios grow with the cosine, or BY_SPARSITY.
    """

    pruned_layers: int
    alpha: float

    def selection(self, layers: int, budget: Budget) -> tuple[int, float]:
        """N and alpha of a model of so many layers."""
        chosen, alpha = papers_selection(budget.sparsity, layers)
        return (
            chosen if self.pruned_layers == BY_SPARSITY else self.pruned_layers,
            alpha if self.alpha == BY_SPARSITY else self.alpha,
        )

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> None:
        """See `Allocate`.

        Raises:
            UsageError: the model has fewer layers than are to lose something.
        """
        chosen, _ = self.selection(len(sizes), budget)
        if chosen > len(sizes):
            raise UsageError(f"--pruned_layers {chosen}: the model has {len(sizes)} layers")
        if to_remove(sizes, budget, self.biases) > sum(sorted(map(most_removable, sizes))[:chosen]):
            raise ValueError(f"the {chosen} layers that lose something would keep one head and one channel, or less")

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        ratios = softmax_ratios(cosines_of(findings), *self.selection(len(sizes), budget))
        both = torch.stack([ratios, ratios], dim=1)
        of_cosines = LayerRatios(lambda _findings, _layers: both, reads_findings=True, biases=self.biases)
        return of_cosines(sizes, budget, findings)

    def notes(self, sizes: list[Sizes], budget: Budget) -> list[str]:
        """See `Allocate`."""
        if not budget.sparsity:
            return []
        chosen, alpha = self.selection(len(sizes), budget)
        return [f"{chosen} of the {len(sizes)} layers lose something, alpha {alpha:g}"]


def cosines_of(findings: list[Findings]) -> Tensor:
    """What `CosineSurvey` found (L,).

    Raises:
        UsageError: a cosine is NaN.
    """
    cosines = torch.stack([found["cosine"] for found in findings])
    if unknown := cosines.isnan().nonzero().flatten().tolist():
        raise UsageError(
            f"in layer {unknown[0]} the cosine of input and output is NaN: they are NaN, infinite or too large for "
            "single precision; look at the weights of --base_model"
        )
    return cosines


class CosineSurvey(Survey):
    """How far each dense layer keeps the direction of what enters it."""

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`: nothing."""
        return {}

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`."""
        return frozenset({COSINE})

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`."""
        return {"cosine": (layer.moments[COSINE] / layer.moments.count).cpu()}
