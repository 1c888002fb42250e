"""How much is removed where: a config and a target sparsity become one `LayerShape` per decoder layer.

Pure arithmetic on the dense sizes, done before any weight is read.

    D hidden size, H query heads, K key/value heads, d head width, F intermediate channels, L layers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil, floor

from ..errors import UsageError
from ..model.configuration_olica import LayerShape, head_dim

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
class Sizes:
    """Parameters of the weight matrices of the dense model, from its configuration.

    Attributes:
        total: what a sparsity is a share of: the whole model, tied embeddings once, or its decoder layers.
        query, key, value_output, feed_forward: of one decoder layer.
        layers: L.
    """

    total: int
    query: int
    key: int
    value_output: int
    feed_forward: int
    layers: int

    @classmethod
    def of(cls, config, total: int) -> "Sizes":
        """Sizes of the model of `config`, of whose parameters `total` are what a sparsity is a share of."""
        query = config.hidden_size * head_dim(config) * config.num_attention_heads
        key = config.hidden_size * head_dim(config) * config.num_key_value_heads
        mlp = 3 * config.hidden_size * config.intermediate_size
        return cls(total, query, key, query + key, mlp, config.num_hidden_layers)

    @property
    def layer(self) -> int:
        """Of one decoder layer, norms and biases left out."""
        return self.query + self.key + self.value_output + self.feed_forward


@dataclass(frozen=True)
class Sparsities:
    """Share of their parameters that the parts of a decoder layer lose."""

    query: float
    key: float
    value_output: float
    feed_forward: float


def spend_rest(sizes: Sizes, sparsity: float, query: float, key: float, value_output: float) -> Sparsities:
    """Let the MLPs lose what is missing to `sparsity` of the total."""
    attention = sizes.query * query + sizes.key * key + sizes.value_output * value_output
    rest = sparsity * sizes.total - sizes.layers * attention
    return Sparsities(query, key, value_output, rest / (sizes.layers * sizes.feed_forward))


def released_sparsities(sizes: Sizes, sparsity: float, k: float) -> Sparsities:
    """Allocation of the released code (D13): 2s, 2s/(1+k) and the rest up to s = 0.4, in the ratio k above it."""
    value_output = 2 * sparsity / (1 + k)
    query_key = 2 * sparsity if sparsity <= RELEASED_SPLIT else k * value_output
    return spend_rest(sizes, sparsity, query_key, query_key, value_output)


def grouped_sparsities(sizes: Sizes, sparsity: float, k: float) -> Sparsities:
    """The released allocation; with grouped heads the keys stay dense as long as the queries can lose their part.

    A grouped key is read by H/K query heads: its projection is small, so factors save little, and what they lose is
    lost to all of these heads. So the queries lose as much as both would have lost: no less than LEAST_ALONE, or what
    there is to lose, since factors that save little have lost much rank already, which spares the MLPs; and no more
    than MOST_ALONE, above which the keys take over what is missing until both lose the released share. Where there is
    less to lose than FEWEST_ALONE, the MLPs lose it. `results/choices` has the records by which the limits were chosen.
    """
    released = released_sparsities(sizes, sparsity, k)
    if sizes.key == sizes.query:
        return released
    alone = released.query * (1 + sizes.key / sizes.query)
    # What queries can lose without the MLPs growing for it.
    affordable = spend_rest(sizes, sparsity, 0.0, 0.0, released.value_output).feed_forward * sizes.feed_forward
    query = max(min(LEAST_ALONE, affordable / sizes.query), min(alone, MOST_ALONE), released.query)
    if query < FEWEST_ALONE:
        return spend_rest(sizes, sparsity, 0.0, 0.0, released.value_output)
    key = max(0.0, alone - query) * sizes.query / sizes.key
    shares = spend_rest(sizes, sparsity, query, key, released.value_output)
    return replace(shares, feed_forward=max(0.0, shares.feed_forward))  # nothing, but for rounding


def paper_sparsities(sizes: Sizes, sparsity: float, k: float) -> Sparsities:
    """Allocation of the paper's Appendix A: as up to s = 0.4 in the code, with s M1/M2 in place of s.

    M1 counts the whole model, M2 its decoder layers' matrices; k = 3 gives the paper's half for value/output.
    """
    scaled = sparsity * sizes.total / (sizes.layers * sizes.layer)
    return spend_rest(sizes, sparsity, 2 * scaled, 2 * scaled, 2 * scaled / (1 + k))


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
    config, sparsities: Sparsities, kept: Callable[[int, float], int], is_factorised: bool = False
) -> LayerShape:
    """The sizes that every layer gets, before it is known which are calibrated.

    With `is_factorised` the value and output projections become pairs of factors, instead of losing width.

    Raises:
        ValueError: a projection would vanish or have to grow.
    """
    width = head_dim(config)
    for name, share in vars(sparsities).items():
        if not 0 <= share < 1:
            raise ValueError(f"the {PARTS[name]} would have to lose {share:.1%} of their parameters")
    query, key, hidden = config.num_attention_heads * width, config.num_key_value_heads * width, config.hidden_size
    shape = LayerShape(
        q_rank=factor_rank(query, hidden, sparsities.query),
        k_rank=factor_rank(key, hidden, sparsities.key),
        v_head_dim=width if is_factorised else kept(width, sparsities.value_output),
        intermediate_size=kept(config.intermediate_size, sparsities.feed_forward),
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


def attention_parameters(config, shape: LayerShape) -> int:
    """Weights of the four attention projections of a layer of sizes `shape`, biases left out."""
    hidden, width = config.hidden_size, head_dim(config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    sizes = (  # rank, width beside the hidden size, that width where there are no factors
        (shape.q_rank, heads * width, heads * width),
        (shape.k_rank, groups * width, groups * width),
        (shape.v_rank, groups * width, groups * shape.v_head_dim),
        (shape.o_rank, heads * width, heads * shape.v_head_dim),
    )
    return sum(rank * (whole + hidden) if rank else narrowed * hidden for rank, whole, narrowed in sizes)


def round_shape(shape: LayerShape, config, multiple: int) -> LayerShape:
    """Sizes that are multiples of `multiple` N (or dense), for the same number of parameters as nearly as may be.

    Ranks and the width of value heads go to the nearest multiple. The intermediate channels F take up what the
    attention projections' parameters A change to, A', since a channel has 3 D parameters:

        F' = N round((F + (A - A') / 3 D) / N)

    so that a layer ends within N/2 channels of the size it had, unless F' would be below N or above the dense size.

    Raises:
        ValueError: the attention projections leave the MLP no channel.
    """
    hidden, width = config.hidden_size, head_dim(config)
    rounded = replace(
        shape,
        q_rank=_rounded_rank(shape.q_rank, multiple, config.num_attention_heads * width, hidden),
        k_rank=_rounded_rank(shape.k_rank, multiple, config.num_key_value_heads * width, hidden),
        v_head_dim=_rounded(shape.v_head_dim, multiple, width),
        v_rank=_rounded_rank(shape.v_rank, multiple, config.num_key_value_heads * width, hidden),
        o_rank=_rounded_rank(shape.o_rank, multiple, hidden, config.num_attention_heads * width),
    )
    moved = attention_parameters(config, shape) - attention_parameters(config, rounded)
    channels = shape.intermediate_size + moved / (3 * hidden)
    if channels < 1:
        raise ValueError("an MLP would keep no channel")
    return replace(rounded, intermediate_size=_rounded(channels, multiple, config.intermediate_size))


def allocate(
    recipe, config, total: int, sparsity: float, k: float, round_to: int = 1
) -> tuple[list[LayerShape], Sparsities]:
    """Sizes of every decoder layer for a target sparsity.

    Args:
        recipe: names the functions `sparsities`, `kept` and `value_output` (`olica.recipes.Recipe`).
        config: of the dense model.
        total: the parameters that `sparsity` is a share of: all of the model's, tied ones once, or its decoder layers'.
        sparsity: share of `total` to remove, in [0, 1).
        k: how many times the share of value/output query/key lose.
        round_to: sizes become multiples of it; 1 leaves them as they come.

    Returns:
        One shape per layer, calibration left out, and the shares they come from, before they are rounded.

    Raises:
        UsageError: impossible for this model; names the largest sparsity that is possible.
    """
    width = head_dim(config)
    if not 1 <= round_to <= width:
        raise UsageError(f"--round_to {round_to} is outside 1 to {width}, the width of this model's heads")
    try:
        shape, sparsities = _attempt(recipe, config, total, sparsity, k, round_to)
    except ValueError as error:
        largest = _largest_possible(lambda target: _attempt(recipe, config, total, target, k, round_to), sparsity)
        rounding = f" --round_to {round_to}" if round_to > 1 else ""
        raise UsageError(
            f"--sparsity {sparsity:g} is impossible for this model with --recipe {recipe.name} --k {k:g}{rounding}: "
            f"{error}; the largest possible is {largest:.3f}"
        ) from error
    return [shape] * config.num_hidden_layers, sparsities


def _attempt(recipe, config, total: int, sparsity: float, k: float, round_to: int = 1) -> tuple[LayerShape, Sparsities]:
    """The sizes of every layer and their shares; raises ValueError where they are impossible."""
    sparsities = recipe.sparsities(Sizes.of(config, total), sparsity, k)
    shape = uniform_shape(config, sparsities, recipe.kept, recipe.value_output.is_factorised)
    return round_shape(shape, config, round_to), sparsities


def jumps(recipe, config, total: int, sparsity: float, k: float) -> list[str]:
    """Sizes that are quite others at a neighbouring sparsity, in words; empty where the recipe's rule is smooth.

    Factors that save next to nothing have lost rank already, so that every rule jumps where it begins with them; the
    released one jumps at RELEASED_SPLIT too.
    Arguments as of `allocate`, which does not refuse them.
    """
    sizes, found = _effective_sizes(config, _attempt(recipe, config, total, sparsity, k)[0]), []
    for neighbour in (sparsity - NEIGHBOURS, sparsity + NEIGHBOURS):
        try:
            there = _effective_sizes(config, _attempt(recipe, config, total, neighbour, k)[0])
        except ValueError:  # impossible
            continue
        changed = [
            f"{name} is {there[name]}, here {size}"
            for name, size in sizes.items()
            if max(there[name], size) > JUMP * min(there[name], size)
        ]
        if changed:
            found.append(f"at --sparsity {neighbour:g} {', '.join(changed)}")
    return found


def _effective_sizes(config, shape: LayerShape) -> dict[str, int]:
    """The sizes of a layer by their names in messages; a matrix without factors has its full rank."""
    hidden, width = config.hidden_size, head_dim(config)
    query, key = (min(hidden, heads * width) for heads in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "the rank of q": shape.q_rank or query,
        "the rank of k": shape.k_rank or key,
        "the width of a value head": shape.v_head_dim,
        "the number of channels": shape.intermediate_size,
    }


def _largest_possible(attempt: Callable, below: float) -> float:
    """The largest sparsity under `below`, in steps of a thousandth, for which `attempt` does not fail."""
    for thousandths in range(ceil(below * 1000) - 1, 0, -1):
        try:
            attempt(thousandths / 1000)
        except ValueError:
            continue
        return thousandths / 1000
    return 0.0


def correction_rank(config, ratio: float, round_to: int = 1) -> int:
    """Rank of a linear correction, a share `ratio` in (0, 1] of the hidden size, rounded down (paper, section 4.1).

    With `round_to` above 1 it is then the nearest multiple of it.

    Raises:
        UsageError: the ratio leaves no rank.
    """
    rank = int(ratio * config.hidden_size)
    if rank < 1:
        raise UsageError(
            f"--ratio {ratio:g} of the hidden size {config.hidden_size} leaves no rank: "
            f"give at least {1 / config.hidden_size:.4f}, or --mlp_num 0"
        )
    return _rounded(rank, round_to, config.hidden_size)


def with_corrections(plan: list[LayerShape], calibrated: list[int], rank: int) -> list[LayerShape]:
    """The plan with a correction of that rank beside the MLPs of the layers `calibrated`."""
    chosen = set(calibrated)
    return [replace(s, correction_rank=rank) if i in chosen else s for i, s in enumerate(plan)]


def describe_plan(plan: list[LayerShape]) -> str:
    """A table of the sizes that any layer has, one line for each run of equal layers."""
    names = [name for name in plan[0].to_dict() if any(shape.to_dict()[name] for shape in plan)]
    lines = [f"{'layers':>9}  " + "  ".join(f"{name:>17}" for name in names)]
    start = 0
    for shape, run in groupby(plan):
        stop = start + len(list(run))
        label = f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"
        lines.append(f"{label:>9}  " + "  ".join(f"{shape.to_dict()[name] or '-':>17}" for name in names))
        start = stop
    return "\n".join(lines)
