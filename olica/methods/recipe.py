"""What a method is: it measures, decides and cuts (see docs/architecture.md).

The survey turns every dense layer into findings, the allocation turns all findings into sizes, and the stages turn a
layer's weights and moments into the weights of those sizes. None of them sees an activation or runs a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, Protocol

from torch import Tensor

from ..checks import as_kind
from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import Projections
from .moments import Moments, Statistic
from .refit import Refit
from .sizes import Budget, Sizes

# What the survey keeps of a layer: small tensors, O(F) numbers, by names that the survey chooses. They are journalled.
Findings = dict[str, Tensor]
# Computed weights and biases, by the names of projections: "down_proj.weight", "q_proj.reduce.weight", ...
Weights = dict[str, Tensor]
# What computes those of a part of a layer for a shape, as stages do.
Cut = Callable[["Layer", LayerShape], Weights]


@dataclass(frozen=True)
class Layer:
    """A decoder layer, as methods see it.

    Attributes:
        weights: its projections.
        moments: of the calibration set that streams through it.
        findings: what the survey kept of it; empty in the survey.
        sizes: of the dense layer.
        norms: weights of the norms of all queries and of all keys, where they span all heads; else none.
        later: statistics that the stages to come read.
    """

    weights: Projections
    moments: Moments
    findings: Findings
    sizes: Sizes
    norms: dict[str, Tensor] = field(default_factory=dict)
    later: frozenset[Statistic] = frozenset()

    def drop(self, statistics: Iterable[Statistic]) -> None:
        """Free the memory of sums, but of those that stages to come read."""
        self.moments.drop(statistics, self.later)


class Survey(ABC):
    """What is measured of the dense layers before sizes are decided.

    Attributes:
        reads_plan: whether the findings depend on the sizes planned so far, so that another sparsity has others.
        serves_stages: whether stages read the findings, not the allocation alone.
    """

    reads_plan = False
    serves_stages = False

    def reads(self, calibration: int) -> int:
        """How many of so many samples of the calibration set it reads, spread evenly: all, if nothing else is said."""
        return calibration

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """Plain values that decide the findings, by name: all parameters, unless a survey knows better."""
        return asdict(parameters)

    @abstractmethod
    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """Statistics of layer `index` of so many."""

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """Bytes that a call takes beside the sums; nothing worth counting, unless a survey says so."""
        return 0

    @abstractmethod
    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """Findings of a layer; `shape` are its sizes planned so far, None where the findings decide them."""


class TravellingSurvey(Survey):
    """A survey that measures what a change of a layer does to the model's output.

    Variants of every layer are run on a few samples of the calibration set; their outputs travel through the dense
    layers that follow, and the findings are completed when all have reached the end. Layers may form groups, of which
    all are replaced at once, so that deep models have no more variants than others.

    Attributes:
        stride: the logits of every so many tokens of a sample are compared.
        most_variants: how many variants a layer has at the most, from which memory is foreseen.
        compared_together: how many variants' logits are made in one product, for which the head is read once.
    """

    stride: int
    most_variants: int
    compared_together = 4

    @abstractmethod
    def samples(self, calibration: int) -> int:
        """n, how many samples the variants see, of a calibration set of so many; at most `reads` of it."""

    def groups(self, layers: int) -> list[range]:
        """The groups of neighbours that so many layers form, in their order."""
        return [range(index, index + 1) for index in range(layers)]

    @abstractmethod
    def variants(self, sizes: Sizes) -> list[tuple[LayerShape, Cut]]:
        """Forms of a layer to be tried in its place, and what cuts it to each; as many for every layer."""

    @abstractmethod
    def compare(self, dense: Tensor, changed: Tensor) -> list[float]:
        """How far changed models are from the dense one, by its logits (tokens, V) and theirs (k, tokens, V)."""

    @abstractmethod
    def complete(self, findings: list[Findings], compared: dict[tuple[int, int], float]) -> list[Findings]:
        """The findings of all layers.

        `compared` are the means over the samples of `compare`, by the index of the first layer of a group and the
        number of the variant that all of its layers had.
        """


class Allocate(ABC):
    """What decides the sizes.

    Attributes:
        sizes_are: whether they are "alike" in all layers, or of each layer its "own", for the list of recipes.
        reads_survey: whether a survey, if the method has one, is made for them.
    """

    sizes_are = "own"
    reads_survey = True

    @abstractmethod
    def before_survey(self, sizes: list[Sizes], budget: Budget) -> list[LayerShape] | None:
        """Sizes of all layers as far as the findings have no part in them; None where the findings decide.

        Corrections stand in the first layers that may get one; which layers do is decided after the survey.

        Raises:
            ValueError: the budget cannot be met.
        """

    @abstractmethod
    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """Sizes of all layers."""

    def without_repairs(self) -> "Allocate":
        """The same sizes for a cut without corrections and biases, whose parameters units that would go keep."""
        return self

    def alike(self, kv_heads: tuple[int, ...]) -> "Allocate":
        """An allocation of the same sizes for all layers: whole channels, and one of some numbers of key/value heads.

        Args:
            kv_heads: how many a layer may keep, ascending, all of them last.

        Raises:
            ValueError: there is none.
        """
        raise ValueError("its sizes are not those of whole heads and channels")

    def of_channels(self) -> "Allocate":
        """An allocation of sizes of each layer's own, of which whole channels alone go.

        Raises:
            ValueError: there is none.
        """
        raise ValueError("it has no allocation of channels alone, of each layer its own")

    def shares(self, sizes: list[Sizes], budget: Budget) -> dict[str, float]:
        """Shares that parts of every layer are to lose, by name, for records; none where there is no such rule."""
        return {}

    def damage(self, sizes: list[Sizes], plan: list[LayerShape], findings: list[Findings]) -> list[float] | None:
        """What its sizes damage in each layer, in nats of KL(dense || pruned); None where the survey does not say.

        Each layer's is as if it alone were pruned.
        """
        return None

    def notes(self, sizes: list[Sizes], budget: Budget) -> list[str]:
        """What a user should know of the plan, in sentences."""
        return []


class Stage(Protocol):
    """A part of the cut.

    Attributes:
        about: what it decomposes, for messages.
        makes: what becomes of it, for the list of recipes.
    """

    about: str
    makes: str

    @property
    def own_form(self) -> str:
        """What of that no family's own architecture can hold, in words; empty where it holds all."""

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """Statistics that a layer's cut to `shape` reads."""

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """Bytes that a call takes at its peak, beside the sums of `needs` (fewer where it drops some before)."""

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Weights and biases of what the stage replaces; empty where it leaves the layer as it is."""

    def refitted(self, refit: Refit | None) -> "Stage":
        """The stage with the same choice of what stays, then this refit, or none, in place of all that it does else."""


def needs_of(parts: Iterable[Any], shape: LayerShape) -> frozenset[Statistic]:
    """Statistics that any of some stages, or repairs, reads for a layer that gets the sizes `shape`."""
    return frozenset().union(*(part.needs(shape) for part in parts))


def workspace_of(parts: Iterable[Any], sizes: Sizes, shape: LayerShape) -> int:
    """Bytes that the one that takes most of some stages, or repairs, takes; they come one after the other."""
    return max((part.workspace(sizes, shape) for part in parts), default=0)


def own_forms(parts: Iterable[Any]) -> str:
    """What some stages, or repairs, make that no family's own architecture can hold, in words."""
    return ", ".join(dict.fromkeys(part.own_form for part in parts if part.own_form))


def together(parts: Iterable[Weights]) -> Weights:
    """The weights of all parts.

    Raises:
        RuntimeError: two of them have one of the same name, of which one would be lost.
    """
    weights: Weights = {}
    for part in parts:
        if twice := weights.keys() & part.keys():
            raise RuntimeError(f"{', '.join(sorted(twice))} was computed twice")
        weights |= part
    return weights


@dataclass(frozen=True)
class Method:
    """A recipe with its parameters.

    Attributes:
        stream: whether a layer is calibrated on what the "dense" layers before it produce, or the "pruned" ones.
        survey: None where nothing is asked of the dense layers.
        allocate: what decides the sizes.
        passes: the stages; statistics are taken anew before each tuple of them.
    """

    stream: Literal["dense", "pruned"]
    survey: Survey | None
    allocate: Allocate
    passes: tuple[tuple[Stage, ...], ...]

    def needs(self, shape: LayerShape) -> list[frozenset[Statistic]]:
        """Statistics of every pass over a layer that gets the sizes `shape`."""
        return [needs_of(stages, shape) for stages in self.passes]

    def of_units(self, kv_heads: tuple[int, ...], is_alike: bool) -> "Method":
        """The method with sizes that a family's own projections hold: whole heads and channels.

        Args:
            kv_heads: how many key/value heads a layer may keep, ascending, all of them last.
            is_alike: whether all layers get the same sizes.

        Raises:
            ValueError: it makes something else.
        """
        if others := own_forms(stage for stages in self.passes for stage in stages):
            raise ValueError(f"it makes {others}")
        return self._allocating(self.allocate.alike(kv_heads) if is_alike else self.allocate.of_channels())

    def refitted(self, refit: Refit | None) -> "Method":
        """The method with its own measures, choice and number of parameters, and this refit, or none, for all repair.

        What is told apart so are the parts of a method: what it removes, how much where, and what it makes of the rest.
        """
        passes = tuple(tuple(stage.refitted(refit) for stage in stages) for stages in self.passes)
        return replace(self, passes=passes)._allocating(self.allocate.without_repairs())

    def _allocating(self, allocate: Allocate) -> "Method":
        """The method with another allocation, and without a survey that nothing reads any more."""
        is_read = allocate.reads_survey or (self.survey is not None and self.survey.serves_stages)
        return replace(self, survey=self.survey if is_read else None, allocate=allocate)


@dataclass(frozen=True)
class NoParameters:
    """Of a recipe that leaves nothing open."""


@dataclass(frozen=True)
class Text:
    """Calibration texts: names joined by +, and how many samples are taken of each, of so many times as many."""

    datasets: str
    num_samples: int
    candidates: int = 1


PAPERS_TEXT = Text("bookcorpus+alpaca", 128)


@dataclass(frozen=True)
class Recipe:
    """A row of the table of methods.

    Attributes:
        name: value of the flag `--recipe`.
        about: one line for readers.
        parameters: frozen dataclass whose fields, with `metadata["help"]`, are the recipe's flags; it raises UsageError
            for values that no model can have.
        method: makes the method of an instance of `parameters`.
        units: makes one of whole heads, of which its second argument says how many a layer may keep, and channels; None
            where `method` does.
        text: what it is calibrated on unless the user says.
    """

    name: str
    about: str
    parameters: type
    method: Callable[[Any], Method]
    units: Callable[[Any, tuple[int, ...]], Method] | None = None
    text: Text = PAPERS_TEXT

    @property
    def parameter_names(self) -> list[str]:
        """The recipe's flags."""
        return [field.name for field in fields(self.parameters)]

    def traits(self) -> tuple[str, str, str]:
        """Whether it makes a survey, whether all layers get the same sizes, and what becomes of them, in words."""
        method = self.method(self.parameters())
        made = dict.fromkeys(stage.makes for stages in method.passes for stage in stages)
        return "yes" if method.survey else "no", method.allocate.sizes_are, ", ".join(made)

    def with_parameters(self, given: dict[str, Any]) -> Any:
        """The parameters, those that are not given at their defaults.

        Raises:
            UsageError: the recipe has no parameter of that name, or it cannot have that value.
        """
        if unknown := [name for name in given if name not in self.parameter_names]:
            flags = ", ".join(f"--{name}" for name in self.parameter_names)
            raise UsageError(
                f"--{unknown[0]} is no parameter of --recipe {self.name}, which has {flags or 'none'}; leave it out"
            )
        kinds = {field.name: type(field.default) for field in fields(self.parameters)}
        return self.parameters(**{name: as_kind(name, value, kinds[name]) for name, value in given.items()})
