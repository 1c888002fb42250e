"""Olica-plus: least-squares refits, the statistics of the whole input, and sizes by what they damage.

Attention is cut first, and the MLP behind the pruned attention. All sizes of all layers come from one multiplier.
"""

from dataclasses import dataclass, field
from math import inf

from ..errors import UsageError
from .damage import DamageSurvey, LeastDamage
from .feed_forward import ThinnedMLP, released_importance
from .moments import full
from .parts import DEFINITE, FeedForward, QueryKey, ValueOutput
from .query_key import LowRankQueryKey
from .recipe import Method
from .refit import LeastSquares
from .value_output import NarrowedHeads, activation_directions, in_order

# Whose sizes are decided: those of each layer, or those of all layers at once.
SIZES_OF = ("layer", "model")


@dataclass(frozen=True)
class PlusParameters:
    """What Olica-plus leaves open."""

    ridge: float = field(default=1.0, metadata={"help": "how strongly refits are drawn to the old weights, above 0"})
    probes: int = field(default=16, metadata={"help": "samples on which the damage of sizes is measured"})
    sizes_of: str = field(default="layer", metadata={"help": "layer: each has its own sizes; model: all have the same"})

    def __post_init__(self) -> None:
        if not 0 < self.ridge < inf:
            raise UsageError(f"--ridge {self.ridge:g} must be a number above 0")
        if self.probes < 1:
            raise UsageError(f"--probes {self.probes}: give at least 1")
        if self.sizes_of not in SIZES_OF:
            raise UsageError(f"--sizes_of {self.sizes_of}: give {' or '.join(SIZES_OF)}")


def plus(parameters: PlusParameters) -> Method:
    """The method."""
    refit = LeastSquares(parameters.ridge)
    parts = (
        QueryKey(LowRankQueryKey(full)),
        ValueOutput(NarrowedHeads(activation_directions(DEFINITE), in_order, refit, rotates_whole=False)),
        FeedForward(ThinnedMLP(released_importance, refit=refit)),
    )
    query_key, value_output, mlp = (part.stage for part in parts)
    return Method(
        stream="pruned",
        survey=DamageSurvey(parts, parameters.probes),
        allocate=LeastDamage(parts, is_uniform=parameters.sizes_of == "model"),
        passes=((query_key, value_output), (mlp,)),
    )
