"""Olica-plus: least-squares refits, the statistics of the whole input, and sizes by what they damage.

Attention is cut first, and the MLP behind the pruned attention. All sizes of all layers come from one multiplier. What
a size damages is measured once for each part of a layer, by how far the model's output moves when the part gets a size
that is tried; for other sizes it is taken to grow as the part's own error does, which is known for every size.

    D hidden size, H query heads, K key/value heads, d head width, F intermediate channels
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP, released_importance
from .linalg import ROUNDING
from .moments import DOUBLE, Statistic, full
from .multiplier import Choice, least_damage, merged
from .query_key import LowRankQueryKey
from .recipe import Allocate, Findings, Layer, Method, Stage, TravellingSurvey, Weights, needs_of, workspace_of
from .refit import LeastSquares, refit_errors, with_ridge
from .sizes import Budget, Sizes
from .value_output import NarrowedHeads, activation_directions, head_blocks, in_order

# Share of its size that a part keeps at least: where the multiplier would take all, the error curve is least known.
LEAST = 0.1
# What makes second moments definite, in their mean diagonals, where errors are measured and bases chosen. The ridge of
# refits would be far too much there: its pull would count as error.
DEFINITE = 0.01
# Groups of layers that the survey tries, at the most: in deeper models neighbouring layers are tried together.
MOST_GROUPS = 32
# Outputs are compared at every so many tokens.
STRIDE = 4
# Whose sizes are decided: those of each layer, or those of all layers at once.
SIZES_OF = ("layer", "model")


@dataclass(frozen=True)
class PlusParameters:
    """What Olica-plus leaves open."""

    ridge: float = field(default=1.0, metadata={"help": "how strongly refits are drawn to the old weights, above 0"})
    probes: int = field(default=4, metadata={"help": "samples on which the damage of sizes is measured"})
    sizes_of: str = field(default="layer", metadata={"help": "layer: each has its own sizes; model: all have the same"})

    def __post_init__(self) -> None:
        if not 0 < self.ridge < inf:
            raise UsageError(f"--ridge {self.ridge:g} must be a number above 0")
        if self.probes < 1:
            raise UsageError(f"--probes {self.probes}: give at least 1")
        if self.sizes_of not in SIZES_OF:
            raise UsageError(f"--sizes_of {self.sizes_of}: give {' or '.join(SIZES_OF)}")


class Part(ABC):
    """A part of a layer that one size describes.

    Attributes:
        name: in findings.
        tried: share of its parameters that it keeps when it is tried.
        stage: cuts it.
    """

    name: str
    tried: float
    stage: Stage

    @abstractmethod
    def candidates(self, layer: Sizes, round_to: int) -> list[int]:
        """The sizes that it may get, those with fewer parameters first, the dense one last."""

    @abstractmethod
    def parameters(self, layer: Sizes, size: int) -> int:
        """Weights that it holds."""

    @abstractmethod
    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """The sizes `shape` with this part's."""

    @abstractmethod
    def errors(self, layer: Layer) -> Tensor:
        """Error of its output by size, as a share of the output's own square, float64."""

    @abstractmethod
    def workspace(self, sizes: Sizes) -> int:
        """Bytes that `errors` takes."""

    def tried_size(self, layer: Sizes) -> int:
        """The size that is tried: of those with no more than the share `tried` of the parameters the largest."""
        *smaller, dense = self.candidates(layer, 1)
        most = self.tried * self.parameters(layer, dense)
        return max((size for size in smaller if self.parameters(layer, size) <= most), default=(smaller or [dense])[0])


def multiples(dense: int, below: int, round_to: int) -> list[int]:
    """Multiples of `round_to` from the share LEAST of the dense size on, and below `below`."""
    return [*range(ceil(LEAST * dense / round_to) * round_to, below, round_to)]


def shares_of_first(errors: Tensor) -> Tensor:
    """Errors by size as shares of that of size 0, which is the output's own square; zeros where that is zero."""
    return errors / errors[0] if errors[0] > 0 else torch.zeros_like(errors)


@dataclass(frozen=True)
class QueryKey(Part):
    """Queries and keys: one rank for both where heads are plain; keys that several query heads read stay as they are.

    The size 0 stands for matrices without factors.
    """

    stage: LowRankQueryKey

    name = "query_key"
    tried = 0.6

    def candidates(self, layer: Sizes, round_to: int) -> list[int]:
        """See `Part`."""
        hidden, width = layer.hidden_size, layer.query_width
        no_fewer = ceil(hidden * width / (hidden + width))  # the rank from which on factors hold no fewer weights
        return [*multiples(min(hidden, width), no_fewer, round_to), 0]

    def parameters(self, layer: Sizes, size: int) -> int:
        """See `Part`."""
        matrices = 2 if layer.groups == 1 else 1
        per_matrix = size * (layer.hidden_size + layer.query_width) if size else layer.query
        return matrices * per_matrix

    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """See `Part`."""
        return replace(shape, q_rank=size, k_rank=size if layer.groups == 1 else 0)

    def errors(self, layer: Layer) -> Tensor:
        """See `Part`: sums of the eigenvalues of W C W^T from the rank on, of queries and of keys."""
        moment = layer.moments[full("attention_input")]
        weights = [layer.weights.q_proj.weight, layer.weights.k_proj.weight][: 2 if layer.sizes.groups == 1 else 1]
        errors = torch.stack([shares_of_first(eigenvalue_tails(weight, moment)) for weight in weights]).mean(0)
        errors[0] = 0.0  # no factors
        return errors

    def workspace(self, sizes: Sizes) -> int:
        """See `Part`: C, W and W C; W C W^T and what finding its eigenvalues takes."""
        hidden, width = sizes.hidden_size, sizes.query_width
        return DOUBLE * (hidden**2 + 2 * hidden * width + 3 * width**2)


def eigenvalue_tails(weight: Tensor, moment: Tensor) -> Tensor:
    """Errors (O + 1,) of the best rank-r approximations of W (O, D) in the metric C (D, D), for r = 0 to O."""
    weight = weight.double()
    squares = torch.linalg.eigvalsh(weight @ moment @ weight.T).clamp(min=0)  # ascending
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


@dataclass(frozen=True)
class ValueOutput(Part):
    """The width of all value heads of a layer."""

    stage: NarrowedHeads

    name = "value_output"
    tried = 0.75

    def candidates(self, layer: Sizes, round_to: int) -> list[int]:
        """See `Part`."""
        return [*multiples(layer.head_dim, layer.head_dim, round_to), layer.head_dim]

    def parameters(self, layer: Sizes, size: int) -> int:
        """See `Part`."""
        return size * layer.hidden_size * (layer.num_heads + layer.num_kv_heads)

    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """See `Part`."""
        return replace(shape, v_head_dim=size)

    def errors(self, layer: Layer) -> Tensor:
        """See `Part`: every query head's map is refitted to its group's leading directions; errors are added up."""
        directions = self.stage.directions(layer)
        basis = directions.features[:, None]
        blocks = with_ridge(basis.mT @ head_blocks(layer.moments[full("heads")], layer.sizes) @ basis, DEFINITE)
        return shares_of_first(refit_errors(directions.output, blocks).sum((0, 1)))

    def workspace(self, sizes: Sizes) -> int:
        """See `Part`: the heads in another basis, their products with factors, and the moment."""
        return DOUBLE * (3 * sizes.value_output + sizes.query_width**2 + 4 * sizes.query_width * sizes.head_dim)


@dataclass(frozen=True)
class FeedForward(Part):
    """The channels of an MLP."""

    stage: ThinnedMLP

    name = "mlp"
    tried = 0.7

    def candidates(self, layer: Sizes, round_to: int) -> list[int]:
        """See `Part`."""
        dense = layer.intermediate_size
        return [*multiples(dense, dense, round_to), dense]

    def parameters(self, layer: Sizes, size: int) -> int:
        """See `Part`."""
        return size * 3 * layer.hidden_size

    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """See `Part`."""
        return replace(shape, intermediate_size=size)

    def errors(self, layer: Layer) -> Tensor:
        """See `Part`: down_proj is refitted to the channels with the highest scores."""
        order = self.stage.importance(layer).argsort(stable=True).flip(0)
        moment = with_ridge(layer.moments[full("intermediate")][order[:, None], order], DEFINITE)
        return shares_of_first(refit_errors(layer.weights.down_proj.weight[:, order], moment))

    def workspace(self, sizes: Sizes) -> int:
        """See `Part`: C in two orders, or C and its factor; W, and its product with the factor."""
        return DOUBLE * (3 * sizes.intermediate_size**2 + 2 * sizes.hidden_size * sizes.intermediate_size)


def divergence(dense: Tensor, changed: Tensor) -> float:
    """Mean over the tokens of KL(dense || changed), in nats, of logits (tokens, V)."""
    expected, found = (logits.double().log_softmax(-1) for logits in (dense, changed))
    return kl_div(found, expected, reduction="batchmean", log_target=True).item()


@dataclass(frozen=True)
class DamageSurvey(TravellingSurvey):
    """Findings: what every size of every part damages, in nats of KL(dense || pruned), by the part's name.

    Attributes:
        parts: of every layer.
        samples: on which the sizes that are tried are measured.
    """

    parts: tuple[Part, ...]
    samples: int

    stride = STRIDE

    @property
    def most_variants(self) -> int:  # type: ignore[override]
        """See `TravellingSurvey`."""
        return len(self.parts)

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`."""
        return {"ridge": parameters.ridge, "probes": parameters.probes}

    def group_size(self, layers: int) -> int:
        """See `TravellingSurvey`."""
        return ceil(layers / MOST_GROUPS)

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

    def variants(self, layer: Layer, shape: LayerShape | None) -> list[tuple[LayerShape, Weights]]:
        """See `TravellingSurvey`: one for each part."""
        tried = [shape for shape, _ in self._tried(layer.sizes)]
        return [(shape, part.stage(layer, shape)) for part, shape in zip(self.parts, tried, strict=True)]

    def compare(self, dense: Tensor, changed: Tensor) -> float:
        """See `TravellingSurvey`."""
        return divergence(dense, changed)

    def complete(self, findings: list[Findings], compared: dict[tuple[int, int], float]) -> list[Findings]:
        """See `TravellingSurvey`: an error of e does the damage KL e / e', e' the group's at the sizes tried."""
        layers = len(findings)
        size = self.group_size(layers)
        completed: list[Findings] = [{} for _ in findings]
        for number, part in enumerate(self.parts):
            for first in range(0, layers, size):
                group = range(first, min(first + size, layers))
                tried = sum(findings[index][f"{part.name}_tried"].item() for index in group)
                # Where nothing was lost nothing was measured: a part that loses all counts as one nat then.
                per_error = max(compared[first, number], 0.0) / tried if tried > ROUNDING else 1.0
                for index in group:
                    completed[index][part.name] = per_error * findings[index][part.name]
        return completed

    def _tried(self, layer: Sizes) -> list[tuple[LayerShape, int]]:
        """For each part the shape of the layer in which it alone is pruned, and its size."""
        dense = LayerShape(0, 0, layer.head_dim, layer.intermediate_size)
        sizes = [part.tried_size(layer) for part in self.parts]
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
        shapes = [LayerShape(0, 0, layer.head_dim, layer.intermediate_size) for layer in sizes]
        for number, size in enumerate(chosen):
            part, index = self.parts[number // layers], number % layers
            shapes[index] = part.shape(shapes[index], sizes[index], size)
        return shapes

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
