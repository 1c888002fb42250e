"""How much is removed where: sizes and a budget become one `LayerShape` per decoder layer.

Pure arithmetic on the dense sizes and on what the survey found.

    D hidden size, H query heads, K key/value heads, d head width, F intermediate channels, L layers
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from .recipe import Allocate, Findings
from .sizes import Budget, Sizes

# The released code splits here without a comment: up to it query/key lose twice the sparsity whatever `k` is.
RELEASED_SPLIT = 0.4
# The fields of `Sparsities` in the words of messages.
PARTS = {"query": "queries", "key": "keys", "value_output": "value and output projections", "feed_forward": "MLPs"}
# Where heads are grouped, what the query projections lose while the key projections stay dense: no less, no more; and
# the share below which nobody has looked whether factors lose more than they save.
LEAST_ALONE, MOST_ALONE, FEWEST_ALONE = 0.6, 0.7, 0.15
# Two sparsities so far apart should give much the same sizes: none so many times as large at one as at the other.
NEIGHBOURS, JUMP = 0.01, 1.25


@dataclass(frozen=True)
class Sparsities:
    """Share of their parameters that the parts of a decoder layer lose."""

    query: float
    key: float
    value_output: float
    feed_forward: float


# (sizes of all layers, budget, k) -> shares.
Shares = Callable[[list[Sizes], Budget, float], Sparsities]


def spend_rest(sizes: list[Sizes], budget: Budget, query: float, key: float, value_output: float) -> Sparsities:
    """Let the MLPs lose what is missing to the budget; the layers are alike."""
    layer, layers = sizes[0], len(sizes)
    attention = layer.query * query + layer.key * key + layer.value_output * value_output
    rest = budget.to_remove - layers * attention
    return Sparsities(query, key, value_output, rest / (layers * layer.feed_forward))


def released_sparsities(sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
    """Allocation of the released code (D13): 2s, 2s/(1+k) and the rest up to s = 0.4, in the ratio k above it."""
    sparsity = budget.sparsity
    value_output = 2 * sparsity / (1 + k)
    query_key = 2 * sparsity if sparsity <= RELEASED_SPLIT else k * value_output
    return spend_rest(sizes, budget, query_key, query_key, value_output)


def grouped_sparsities(sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
    """The released allocation; with grouped heads the keys stay dense as long as the queries can lose their part.

    A grouped key is read by H/K query heads: its projection is small, so factors save little, and what they lose is
    lost to all of these heads. So the queries lose as much as both would have lost: no less than LEAST_ALONE, or what
    there is to lose, since factors that save little have lost much rank already, which spares the MLPs; and no more
    than MOST_ALONE, above which the keys take over what is missing until both lose the released share. Where there is
    less to lose than FEWEST_ALONE, the MLPs lose it. `results/choices` has the records by which the limits were chosen.
    """
    released, layer = released_sparsities(sizes, budget, k), sizes[0]
    if layer.key == layer.query:
        return released
    alone = released.query * (1 + layer.key / layer.query)
    # What queries can lose without the MLPs growing for it.
    affordable = spend_rest(sizes, budget, 0.0, 0.0, released.value_output).feed_forward * layer.feed_forward
    query = max(min(LEAST_ALONE, affordable / layer.query), min(alone, MOST_ALONE), released.query)
    if query < FEWEST_ALONE:
        return spend_rest(sizes, budget, 0.0, 0.0, released.value_output)
    key = max(0.0, alone - query) * layer.query / layer.key
    shares = spend_rest(sizes, budget, query, key, released.value_output)
    return replace(shares, feed_forward=max(0.0, shares.feed_forward))  # nothing, but for rounding


def paper_sparsities(sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
    """Allocation of the paper's Appendix A: as up to s = 0.4 in the code, with s M1/M2 in place of s.

    M1 counts the whole model, M2 its decoder layers' matrices; k = 3 gives the paper's half for value/output.
    """
    scaled = budget.sparsity * budget.whole / (len(sizes) * sizes[0].layer)
    return spend_rest(sizes, budget, 2 * scaled, 2 * scaled, 2 * scaled / (1 + k))


def kept_by_code(size: int, sparsity: float) -> int:
    """Of `size` channels those that the released code leaves: what goes is rounded down."""
    return size - int(sparsity * size)


def kept_by_paper(size: int, sparsity: float) -> int:
    """Of `size` channels those that the paper leaves: what stays is rounded down (section 3.3)."""
    return floor((1 - sparsity) * size)


def factor_rank(out_features: int, in_features: int, sparsity: float) -> int:
    """Rank at which two factors have (1 - sparsity) of the parameters of an (out, in) matrix, rounded up.

    A rank-r pair holds r (in + out) numbers. 0, "leave it dense", where the pair would hold no fewer than the matrix.
    """
    size = out_features * in_features
    rank = ceil((1 - sparsity) * size / (out_features + in_features))
    return rank if rank * (out_features + in_features) < size else 0


def uniform_shape(
    layer: Sizes, sparsities: Sparsities, kept: Callable[[int, float], int], is_factorised: bool = False
) -> LayerShape:
    """The sizes that every layer gets, corrections left out.

    With `is_factorised` the value and output projections become pairs of factors, instead of losing width.

    Raises:
        ValueError: a projection would vanish or have to grow.
    """
    for name, share in vars(sparsities).items():
        if not 0 <= share < 1:
            raise ValueError(f"the {PARTS[name]} would have to lose {share:.1%} of their parameters")
    query, key, hidden = layer.query_width, layer.key_width, layer.hidden_size
    shape = LayerShape(
        q_rank=factor_rank(query, hidden, sparsities.query),
        k_rank=factor_rank(key, hidden, sparsities.key),
        v_head_dim=layer.head_dim if is_factorised else kept(layer.head_dim, sparsities.value_output),
        intermediate_size=kept(layer.intermediate_size, sparsities.feed_forward),
        v_rank=factor_rank(key, hidden, sparsities.value_output) if is_factorised else 0,
        o_rank=factor_rank(hidden, query, sparsities.value_output) if is_factorised else 0,
    )
    if shape.v_head_dim < 1 or shape.intermediate_size < 1:
        raise ValueError("a value head or an MLP would keep no channel")
    return shape


def _nearest_multiple(size: float, multiple: int) -> int:
    """The multiple nearest to `size`, the larger of two, and at least one."""
    return multiple * max(1, floor(size / multiple + 0.5))


def _rounded(size: float, multiple: int, dense: int) -> int:
    """The nearest multiple of `multiple` if that is smaller than the dense size; the dense size stays."""
    return dense if size >= dense else min(_nearest_multiple(size, multiple), dense)


def _rounded_rank(rank: int, multiple: int, out_features: int, in_features: int) -> int:
    """The nearest multiple for a pair of factors; 0, "leave it dense", as `factor_rank` does."""
    rounded = rank and _nearest_multiple(rank, multiple)
    return rounded if rounded * (out_features + in_features) < out_features * in_features else 0


def attention_parameters(layer: Sizes, shape: LayerShape) -> int:
    """Weights of the four attention projections of a layer of sizes `shape`, biases left out."""
    hidden, query, key = layer.hidden_size, layer.query_width, layer.key_width
    sizes = (  # rank, width beside the hidden size, that width where there are no factors
        (shape.q_rank, query, query),
        (shape.k_rank, key, key),
        (shape.v_rank, key, layer.num_kv_heads * shape.v_head_dim),
        (shape.o_rank, query, layer.num_heads * shape.v_head_dim),
    )
    return sum(rank * (whole + hidden) if rank else left * hidden for rank, whole, left in sizes)


def round_shape(shape: LayerShape, layer: Sizes, multiple: int) -> LayerShape:
    """Sizes that are multiples of `multiple` N (or dense), for the same number of parameters as nearly as may be.

    Ranks and the width of value heads go to the nearest multiple. The intermediate channels F take up what the
    attention projections' parameters A change to, A', since a channel has 3 D parameters:

        F' = N round((F + (A - A') / 3 D) / N)

    so that a layer ends within N/2 channels of the size it had, unless F' would be below N or above the dense size.

    Raises:
        ValueError: the attention projections leave the MLP no channel.
    """
    hidden, query, key = layer.hidden_size, layer.query_width, layer.key_width
    rounded = replace(
        shape,
        q_rank=_rounded_rank(shape.q_rank, multiple, query, hidden),
        k_rank=_rounded_rank(shape.k_rank, multiple, key, hidden),
        v_head_dim=_rounded(shape.v_head_dim, multiple, layer.head_dim),
        v_rank=_rounded_rank(shape.v_rank, multiple, key, hidden),
        o_rank=_rounded_rank(shape.o_rank, multiple, hidden, query),
    )
    moved = attention_parameters(layer, shape) - attention_parameters(layer, rounded)
    channels = shape.intermediate_size + moved / (3 * hidden)
    if channels < 1:
        raise ValueError("an MLP would keep no channel")
    return replace(rounded, intermediate_size=_rounded(channels, multiple, layer.intermediate_size))


@dataclass(frozen=True)
class Corrections:
    """Which MLPs get a correction, and of which size.

    Attributes:
        number: how many, those that the survey's finding `correlation` says are explained best.
        ratio: rank of a correction, a share of the hidden size.
        last_is_eligible: whether the last layer may get one.
    """

    number: int
    ratio: float
    last_is_eligible: bool

    def candidates(self, layers: int) -> int:
        """How many of so many layers, from the first on, may get one if their MLPs lose channels."""
        return layers if self.last_is_eligible else layers - 1

    def check(self, sizes: list[Sizes]) -> None:
        """Raise UsageError unless so many layers can get a correction of that rank."""
        candidates = self.candidates(len(sizes))
        if not 0 <= self.number <= candidates:
            reason = "" if self.last_is_eligible else ", since it never corrects the last one"
            raise UsageError(
                f"--mlp_num {self.number} does not fit: of the model's {len(sizes)} layers this recipe can correct 0 "
                f"to {candidates}{reason}"
            )
        hidden = sizes[0].hidden_size
        if self.number and int(self.ratio * hidden) < 1:
            raise UsageError(
                f"--ratio {self.ratio:g} of the hidden size {hidden} leaves no rank: give at least {1 / hidden:.4f}, "
                "or --mlp_num 0"
            )

    def eligible(self, sizes: list[Sizes], shapes: list[LayerShape]) -> list[int]:
        """Indices of the layers that may get one: with every channel left there is no residual to restore."""
        layers = range(self.candidates(len(sizes)))
        return [i for i in layers if shapes[i].intermediate_size < sizes[i].intermediate_size]

    def rank(self, layer: Sizes, round_to: int) -> int:
        """Rank of a correction, rounded down (paper, section 4.1), then to the nearest multiple of `round_to`."""
        rank = int(self.ratio * layer.hidden_size)
        return rank if round_to == 1 else _rounded(rank, round_to, layer.hidden_size)


@dataclass(frozen=True)
class FixedShares(Allocate):
    """An allocation that gives every layer the same sizes, by shares that a rule fixes.

    Attributes:
        rule: of the shares.
        kept: (size, share lost) -> size that stays.
        k: how many times the share of value/output query/key lose.
        is_factorised: whether value and output projections become factors.
        corrections: which MLPs get one.
    """

    rule: Shares
    kept: Callable[[int, float], int]
    k: float
    is_factorised: bool
    corrections: Corrections

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> list[LayerShape]:
        """See `Allocate`."""
        self.corrections.check(sizes)
        shapes = [self._shape(sizes, budget)] * len(sizes)
        return self._corrected(shapes, sizes, budget, self.corrections.eligible(sizes, shapes))

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        shapes = [self._shape(sizes, budget)] * len(sizes)
        eligible = self.corrections.eligible(sizes, shapes) if self.corrections.number else []
        order = sorted(eligible, key=lambda index: findings[index]["correlation"].item(), reverse=True)
        return self._corrected(shapes, sizes, budget, order)

    def shares(self, sizes: list[Sizes], budget: Budget) -> dict[str, float]:
        """See `Allocate`."""
        return asdict(self.rule(sizes, budget, self.k))

    def notes(self, sizes: list[Sizes], budget: Budget) -> list[str]:
        """See `Allocate`: where sizes jump, and that corrections find no MLP."""
        notes = [f"{jump}: between the two the shares of this recipe jump" for jump in self.jumps(sizes, budget)]
        shapes = [self._shape(sizes, budget)] * len(sizes)
        if self.corrections.number and not self.corrections.eligible(sizes, shapes):
            notes.append(f"no MLP loses a channel, so --mlp_num {self.corrections.number} has no effect")
        return notes

    def jumps(self, sizes: list[Sizes], budget: Budget) -> list[str]:
        """Sizes that are quite others at a neighbouring sparsity, in words; empty where the rule is smooth.

        Factors that save next to nothing have lost rank already, so that every rule jumps where it begins with them;
        the released one jumps at RELEASED_SPLIT too.
        """
        exact, found = replace(budget, round_to=1), []
        here = _effective_sizes(sizes[0], self._shape(sizes, exact))
        for sparsity in (budget.sparsity - NEIGHBOURS, budget.sparsity + NEIGHBOURS):
            try:
                there = _effective_sizes(sizes[0], self._shape(sizes, replace(exact, sparsity=sparsity)))
            except ValueError:  # impossible
                continue
            changed = [
                f"{name} is {there[name]}, here {size}"
                for name, size in here.items()
                if max(there[name], size) > JUMP * min(there[name], size)
            ]
            if changed:
                found.append(f"at --sparsity {sparsity:g} {', '.join(changed)}")
        return found

    def _shape(self, sizes: list[Sizes], budget: Budget) -> LayerShape:
        shape = uniform_shape(sizes[0], self.rule(sizes, budget, self.k), self.kept, self.is_factorised)
        return round_shape(shape, sizes[0], budget.round_to)

    def _corrected(
        self, shapes: list[LayerShape], sizes: list[Sizes], budget: Budget, order: list[int]
    ) -> list[LayerShape]:
        """The shapes with corrections in the first layers of `order`."""
        chosen = set(order[: self.corrections.number])
        return [
            replace(shape, correction_rank=self.corrections.rank(layer, budget.round_to)) if i in chosen else shape
            for i, (shape, layer) in enumerate(zip(shapes, sizes, strict=True))
        ]


def _effective_sizes(layer: Sizes, shape: LayerShape) -> dict[str, int]:
    """The sizes of a layer by their names in messages; a matrix without factors has its full rank."""
    return {
        "the rank of q": shape.q_rank or min(layer.hidden_size, layer.query_width),
        "the rank of k": shape.k_rank or min(layer.hidden_size, layer.key_width),
        "the width of a value head": shape.v_head_dim,
        "the number of channels": shape.intermediate_size,
    }


# Names of the findings that a global threshold cuts: scores of the groups of heads (K,), and of the channels (F,).
GROUP_SCORES, CHANNEL_SCORES = "group_scores", "channel_scores"


@dataclass(frozen=True)
class GlobalThreshold(Allocate):
    """An allocation by one threshold for all layers: units go in the order of their scores until the budget is met.

    A unit is a key/value head with its query heads, or a channel of an MLP. Of each kind a layer keeps at least one.

    Attributes:
        scored: (layer's findings) -> scores of its groups (K,) and of its channels (F,), comparable over all layers.
        biases: whether what is thinned gets a bias, which takes D parameters each.
    """

    scored: Callable[[Findings], tuple[Tensor, Tensor]]
    biases: bool

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> None:
        """See `Allocate`."""
        most = sum(
            (layer.num_kv_heads - 1) * group_parameters(layer)
            + (layer.intermediate_size - 1) * channel_parameters(layer)
            for layer in sizes
        )
        if self._to_remove(sizes, budget) > most:
            raise ValueError("every layer would be left with one head and one channel, or less")

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        scores: list[Tensor] = []
        costs: list[int] = []
        for layer, found in zip(sizes, findings, strict=True):
            scores += [self._without_best(part.double()) for part in self.scored(found)]
            costs += [group_parameters(layer), channel_parameters(layer)]
        owners = torch.cat([torch.full((len(part),), number) for number, part in enumerate(scores)])
        order = owners[torch.cat(scores).argsort(stable=True)].tolist()
        counts = self._taken(order, costs, self._to_remove(sizes, budget))
        # What rounding adds to a layer, the next ones have less of.
        shapes, owed = [], 0.0
        for layer, groups, channels in zip(sizes, counts[::2], counts[1::2], strict=True):
            wanted = layer.intermediate_size - channels + owed
            kept = _rounded(wanted, budget.round_to, layer.intermediate_size)
            owed = wanted - kept
            shapes.append(self._shape(layer, groups, kept))
        return shapes

    @staticmethod
    def _taken(order: list[int], costs: list[int], left: float) -> list[int]:
        """How many units of each part go: those first in `order` that fit into what is `left` to remove.

        A head that would be too much stays, and channels take its place.
        """
        counts, smallest = [0] * len(costs), min(costs)
        for part in order:
            if left < smallest / 2:
                break
            if costs[part] <= max(left, smallest):
                counts[part] += 1
                left -= costs[part]
        return counts

    def _to_remove(self, sizes: list[Sizes], budget: Budget) -> float:
        added = sum(2 * layer.hidden_size for layer in sizes) if self.biases else 0
        return budget.to_remove + (added if budget.sparsity else 0)

    @staticmethod
    def _without_best(scores: Tensor) -> Tensor:
        """Scores (n - 1,) of the units that may go: all but the highest."""
        return scores.sort().values[:-1]

    def _shape(self, layer: Sizes, groups: int, kept: int) -> LayerShape:
        """Sizes of a layer that loses so many groups of heads and keeps so many channels."""
        return LayerShape(
            q_rank=0,
            k_rank=0,
            v_head_dim=layer.head_dim,
            intermediate_size=kept,
            kv_heads=layer.num_kv_heads - groups if groups else 0,
            o_bias=self.biases and groups > 0,
            down_bias=self.biases and kept < layer.intermediate_size,
        )


def group_parameters(layer: Sizes) -> int:
    """Weights that go with a key/value head and its query heads."""
    features = layer.head_dim * (1 + layer.groups)  # of its value, and of its query heads as the output reads them
    return layer.hidden_size * features * (1 if layer.norm_spans_heads else 2)


def channel_parameters(layer: Sizes) -> int:
    """Weights that go with a channel of an MLP."""
    return 3 * layer.hidden_size


def largest_possible(attempt: Callable[[float], object], below: float) -> float:
    """The largest sparsity under `below`, in steps of a thousandth, for which `attempt` raises no ValueError."""
    for thousandths in range(ceil(below * 1000) - 1, 0, -1):
        try:
            attempt(thousandths / 1000)
        except ValueError:
            continue
        return thousandths / 1000
    return 0.0


def describe_plan(plan: list[LayerShape], without: Collection[str] = ()) -> str:
    """A table of the sizes that any layer has, one line for each run of equal layers; some may be left out."""
    left_out: dict[str, Any] = dict.fromkeys(without, 0)
    plan = [replace(shape, **left_out) for shape in plan]
    names = [name for name in plan[0].to_dict() if any(shape.to_dict()[name] for shape in plan)]
    lines = [f"{'layers':>9}  " + "  ".join(f"{name:>17}" for name in names)]
    start = 0
    for shape, run in groupby(plan):
        stop = start + len(list(run))
        label = f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"
        lines.append(f"{label:>9}  " + "  ".join(f"{shape.to_dict()[name] or '-':>17}" for name in names))
        start = stop
    return "\n".join(lines)
