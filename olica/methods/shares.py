"""Allocation by shares that a rule fixes: every layer loses the same, whatever the survey finds.

D hidden size, H query heads, K key/value heads, d head width, F intermediate channels, L layers
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import floor

from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from .recipe import Allocate, Findings
from .rounding import factor_rank, round_shape, rounded
from .sizes import Budget, Sizes
from .units import channel_parameters

# The released code splits here without a comment: up to it query/key lose twice the sparsity whatever `k` is.
RELEASED_SPLIT = 0.4
# How many MLPs get a correction unless the user says: as in the released code, whatever the number of layers.
DEFAULT_CORRECTIONS = 6
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

    With p the released share of both, |Q| and |K| the sizes of the projections, and all = p (|Q| + |K|) / |Q|, these
    are q = max(min(LEAST_ALONE, affordable / |Q|), min(all, MOST_ALONE), p) and k = max(0, all - q) |Q| / |K|.
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
            default = " (the default)" if self.number == DEFAULT_CORRECTIONS else ""
            reason = "" if self.last_is_eligible else ", since it never corrects the last one"
            raise UsageError(
                f"--mlp_num {self.number}{default} does not fit: of the model's {len(sizes)} layers this recipe can "
                f"correct 0 to {candidates}{reason}; give --mlp_num {max(0, min(self.number, candidates))}"
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
        return rank if round_to == 1 else rounded(rank, round_to, layer.hidden_size)


@dataclass(frozen=True)
class FixedShares(Allocate):
    """An allocation that gives every layer the same sizes, by shares that a rule fixes.

    Attributes:
        rule: of the shares.
        kept: (size, share lost) -> size that stays.
        k: how many times the share of value/output query/key lose.
        is_factorised: whether value and output projections become factors.
        corrections: which MLPs get one.
        as_channels: whether the parameters of the corrections are channels of all MLPs instead.
    """

    rule: Shares
    kept: Callable[[int, float], int]
    k: float
    is_factorised: bool
    corrections: Corrections
    as_channels: bool = False

    sizes_are = "alike"

    @property
    def reads_survey(self) -> bool:  # type: ignore[override]
        """See `Allocate`: which layers get a correction is asked, if any do."""
        return self.corrections.number > 0 and not self.as_channels

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> list[LayerShape]:
        """See `Allocate`."""
        self.corrections.check(sizes)
        shapes = [self._shape(sizes, budget)] * len(sizes)
        return self._corrected(shapes, sizes, budget, self.corrections.eligible(sizes, shapes))

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        shapes = [self._shape(sizes, budget)] * len(sizes)
        eligible = self.corrections.eligible(sizes, shapes) if self.corrections.number else []
        if self.reads_survey:
            eligible.sort(key=lambda index: findings[index]["correlation"].item(), reverse=True)
        return self._corrected(shapes, sizes, budget, eligible)

    def without_repairs(self) -> "FixedShares":
        """See `Allocate`."""
        return replace(self, as_channels=True)

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
        if self.as_channels:
            layer, layers = sizes[0], len(sizes)
            added = len(chosen) * 2 * layer.hidden_size * self.corrections.rank(layer, budget.round_to)
            more = round(added / (layers * channel_parameters(layer) * budget.round_to)) * budget.round_to
            return [
                replace(shape, intermediate_size=min(shape.intermediate_size + more, layer.intermediate_size))
                for shape in shapes
            ]
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
