"""OSSCAR (Meng et al., ICML 2024): heads and channels as a combinatorial least-squares problem, by local search.

In every layer as many go: first greedily what costs least with a refit, then units that went are exchanged for units
that stayed while the error falls (obs.py).
"""

from dataclasses import dataclass, field

from ..checks import check_above_zero
from ..errors import UsageError
from .obs import passes
from .ratios import LayerRatios, uniform
from .recipe import Method


@dataclass(frozen=True)
class OsscarParameters:
    """What OSSCAR leaves open."""

    damping: float = field(
        default=0.01, metadata={"help": "added to the second moments in their mean diagonals, above 0"}
    )
    swaps: int = field(default=50, metadata={"help": "most rounds of exchanges in a part of a layer; 0: none"})

    def __post_init__(self) -> None:
        check_above_zero("damping", self.damping)
        if self.swaps < 0:
            raise UsageError(f"--swaps {self.swaps}: give 0 or more")


def osscar(parameters: OsscarParameters) -> Method:
    """The method."""
    allocate = LayerRatios(uniform, reads_findings=False, biases=False)
    return Method("pruned", None, allocate, passes(parameters.damping, parameters.swaps))
