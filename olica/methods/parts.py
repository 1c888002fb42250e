"""The parts of a layer that one size describes each, and the error of each by size.

Errors are those of what the cut does: queries and keys factorised by the whole second moment of their input, value
heads narrowed in a basis chosen by activations, channels removed; the last two with a refit.

    D hidden size, H query heads, K key/value heads, d head width, F intermediate channels
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP
from .heads import RemovedGroups, rows_of
from .moments import DOUBLE, full
from .query_key import LowRankQueryKey
from .recipe import Layer, Stage
from .refit import refit_errors, with_ridge
from .sizes import Sizes
from .thinning import Choice, Selection
from .units import channel_parameters, group_parameters
from .value_output import NarrowedHeads, head_blocks

# Share of its size that a part keeps at least: where the multiplier would take all, the error curve is least known.
LEAST = 0.1
# What makes second moments definite, in their mean diagonals, where errors are measured and bases chosen. The ridge of
# refits would be far too much there: its pull would count as error.
DEFINITE = 0.01


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
        return size * channel_parameters(layer)

    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """See `Part`."""
        return replace(shape, intermediate_size=size)

    def errors(self, layer: Layer) -> Tensor:
        """See `Part`: down_proj is refitted to the channels with the highest scores."""
        order = by_score(self.stage.importance, layer)
        return refitted_in_order(layer.weights.down_proj.weight, layer.moments[full("intermediate")], order)

    def workspace(self, sizes: Sizes) -> int:
        """See `Part`."""
        return workspace_in_order(sizes.hidden_size, sizes.intermediate_size)


def by_score(choice: Choice, layer: Layer) -> Tensor:
    """Indices of a layer's units, the one that stays longest first."""
    assert not isinstance(choice, Selection), "sizes are compared in the order of scores"
    return choice(layer).argsort(stable=True).flip(0)


def refitted_in_order(weight: Tensor, moment: Tensor, order: Tensor) -> Tensor:
    """Errors (f + 1,), shares of the first, of W (O, f) refitted to the first of its features in an order (f,).

    The features have the second moment C (f, f).
    """
    return shares_of_first(refit_errors(weight[:, order], with_ridge(moment[order[:, None], order], DEFINITE)))


def workspace_in_order(outputs: int, features: int) -> int:
    """Bytes that this takes: C in two orders, or C and its factor; W, and its product with the factor."""
    return DOUBLE * (3 * features**2 + 2 * outputs * features)


@dataclass(frozen=True)
class Heads(Part):
    """The key/value heads, each with the query heads that read it, of a layer whose projections stay whole.

    Attributes:
        counts: how many may stay, ascending, all of them last.
    """

    stage: RemovedGroups
    counts: tuple[int, ...]

    name = "heads"
    tried = 0.75

    def candidates(self, layer: Sizes, round_to: int) -> list[int]:
        """See `Part`."""
        return [count for count in self.counts if count >= LEAST * layer.num_kv_heads]

    def parameters(self, layer: Sizes, size: int) -> int:
        """See `Part`."""
        return size * group_parameters(layer)

    def shape(self, shape: LayerShape, layer: Sizes, size: int) -> LayerShape:
        """See `Part`."""
        return replace(shape, kv_heads=size if size < layer.num_kv_heads else 0)

    def errors(self, layer: Layer) -> Tensor:
        """See `Part`: o_proj is refitted to the heads with the highest scores."""
        width = layer.sizes.groups * layer.sizes.head_dim
        order = rows_of(by_score(self.stage.scores, layer), width)
        return refitted_in_order(layer.weights.o_proj.weight, layer.moments[full("heads")], order)[::width]

    def workspace(self, sizes: Sizes) -> int:
        """See `Part`."""
        return workspace_in_order(sizes.hidden_size, sizes.query_width)
