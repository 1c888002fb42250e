"""SlimGPT (Ling et al., NeurIPS 2024): Optimal Brain Surgeon on heads and channels, more of them in later layers.

What goes is what costs least once the rest is updated (obs.py). Layer i of L loses the ratio
r_0 + (r_{L-1} - r_0) log(i + 1) / log L. The paper removes single query heads; here they go with their key/value head.
"""

from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor

from ..checks import check_above_zero
from ..errors import UsageError
from .obs import passes
from .ratios import LayerRatios
from .recipe import Findings, Method


@dataclass(frozen=True)
class SlimGPTParameters:
    """What SlimGPT leaves open."""

    damping: float = field(
        default=0.01, metadata={"help": "added to the second moments in their mean diagonals, above 0"}
    )
    first_ratio: float = field(
        default=0.25, metadata={"help": "what the first layer loses, a share in [0, 1] of what the last one loses"}
    )

    def __post_init__(self) -> None:
        check_above_zero("damping", self.damping)
        if not 0 <= self.first_ratio <= 1:
            raise UsageError(f"--first_ratio {self.first_ratio:g} is outside [0, 1]")


@dataclass(frozen=True)
class LogarithmicRatios:
    """`Ratios`: from `first` in the first layer they grow to 1 in the last, with the logarithm of the depth."""

    first: float

    def __call__(self, _findings: list[Findings], layers: int) -> Tensor:
        """See `Ratios`; of heads and of channels alike."""
        depth = [log(index + 1) / log(layers) if layers > 1 else 1.0 for index in range(layers)]
        ratios = self.first + (1 - self.first) * torch.tensor(depth, dtype=torch.float64)
        return ratios[:, None].expand(-1, 2)


def slimgpt(parameters: SlimGPTParameters) -> Method:
    """The method."""
    allocate = LayerRatios(LogarithmicRatios(parameters.first_ratio), reads_findings=False, biases=False)
    return Method("pruned", None, allocate, passes(parameters.damping))
