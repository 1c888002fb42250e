"""Olica-plus: least-squares refits, the statistics of the whole input, and sizes by what they damage.

Attention is cut first, and the MLP behind the pruned attention. All sizes of all layers come from one multiplier.
"""

from dataclasses import dataclass, field

from ..checks import check_above_zero
from ..errors import UsageError
from .damage import DamageSurvey, LeastDamage
from .feed_forward import ThinnedMLP, balanced_importance
from .heads import RemovedGroups, output_energy
from .moments import full
from .parts import DEFINITE, FeedForward, Heads, Part, QueryKey, ValueOutput
from .query_key import LowRankQueryKey
from .recipe import Method, Stage
from .refit import LeastSquares
from .value_output import NarrowedHeads, activation_directions, in_order

# Whose sizes are decided: those of each layer, or those of all layers at once.
SIZES_OF = ("layer", "model")


@dataclass(frozen=True)
class PlusParameters:
    """What Olica-plus leaves open."""

    ridge: float = field(default=1.0, metadata={"help": "how strongly refits are drawn to the old weights, above 0"})
    probes: int = field(
        default=0,
        metadata={"help": "samples on which the damage of sizes is measured; 0: one of 32, but at least 8"},
    )
    sizes_of: str = field(default="layer", metadata={"help": "layer: each has its own sizes; model: all have the same"})

    def __post_init__(self) -> None:
        check_above_zero("ridge", self.ridge)
        if self.probes < 0:
            raise UsageError(f"--probes {self.probes}: give at least 1, or 0 for as many as suit the text")
        if self.sizes_of not in SIZES_OF:
            raise UsageError(f"--sizes_of {self.sizes_of}: give {' or '.join(SIZES_OF)}")


def plus(parameters: PlusParameters) -> Method:
    """The method."""
    refit = LeastSquares(parameters.ridge)
    parts = (
        QueryKey(LowRankQueryKey(full)),
        ValueOutput(NarrowedHeads(activation_directions(DEFINITE), in_order, refit, rotates_whole=False)),
        FeedForward(ThinnedMLP(balanced_importance, refit=refit)),
    )
    query_key, value_output, mlp = (part.stage for part in parts)
    return _by_damage(parameters, parts, ((query_key, value_output), (mlp,)))


def plus_of_units(parameters: PlusParameters, kv_heads: tuple[int, ...]) -> Method:
    """The method where whole channels and key/value heads go, of which a layer may keep so many."""
    refit = LeastSquares(parameters.ridge)
    mlp = FeedForward(ThinnedMLP(balanced_importance, refit=refit))
    heads = Heads(RemovedGroups(output_energy, refit=refit), kv_heads)
    parts = (heads, mlp) if len(kv_heads) > 1 else (mlp,)
    return _by_damage(parameters, parts, tuple((part.stage,) for part in parts))


def _by_damage(parameters: PlusParameters, parts: tuple[Part, ...], passes: tuple[tuple[Stage, ...], ...]) -> Method:
    return Method(
        stream="pruned",
        survey=DamageSurvey(parts, parameters.probes),
        allocate=LeastDamage(parts, is_uniform=parameters.sizes_of == "model"),
        passes=passes,
    )
