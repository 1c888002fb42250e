"""Streaming first and second moments of what flows through a decoder layer.

A method never sees activations: it names the statistics that it needs, they are summed while calibration text streams
through the layer, and memory does not grow with the amount of text.

    n tokens, f features, H heads, d head width
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checks import all_finite
from .linalg import about_zero
from .sizes import Sizes

# Where statistics can be taken: (projection of the decoder layer, or the layer itself; its "input" or its "output").
TAPS = {
    "layer_input": ("layer", "input"),
    "attention_input": ("q_proj", "input"),  # also the input of k_proj and v_proj
    "heads": ("o_proj", "input"),  # the attention-weighted values of all heads, side by side
    "attention_output": ("o_proj", "output"),
    "mlp_input": ("gate_proj", "input"),  # also the input of up_proj
    "intermediate": ("down_proj", "input"),
    "mlp_output": ("down_proj", "output"),
    "layer_output": ("layer", "output"),
}
SINGLE, DOUBLE = 4, 8  # bytes
# Width of the blocks in which the lower half of a symmetric sum is accumulated: half the products, and faster ones.
BLOCK = 256


@dataclass(frozen=True)
class Statistic:
    """A sum over tokens: of x, of x^2, of x x^T, of its blocks per head, of x y^T, or of the cosine of x and y.

    Attributes:
        kind: "sum", "diagonal", "full", "per_head", "cross" or "cosine".
        tap: where x is taken, a key of TAPS.
        other: where y is taken, for "cross" and "cosine".
    """

    kind: str
    tap: str
    other: str | None = None

    @property
    def taps(self) -> list[str]:
        """Names of the places that it is taken of."""
        return [self.tap] if self.other is None else [self.tap, self.other]

    def bytes(self, sizes: Sizes) -> int:
        """What its sum takes, of a layer of these sizes."""
        width, other = (tap_width(tap, sizes) for tap in (self.tap, self.other or self.tap))
        match self.kind:
            case "full" | "cross":
                return SINGLE * width * other
            case "per_head":
                return SINGLE * width * sizes.head_dim
            case "cosine":
                return DOUBLE
            case _:
                return DOUBLE * width


def tap_width(tap: str, sizes: Sizes) -> int:
    """Features f at a tap of a layer of these sizes."""
    widths = {"heads": sizes.num_heads * sizes.head_dim, "intermediate": sizes.intermediate_size}
    return widths.get(tap, sizes.hidden_size)


def total(tap: str) -> Statistic:
    """Sum of x (f,)."""
    return Statistic("sum", tap)


def diagonal(tap: str) -> Statistic:
    """Sum of x^2 (f,): the squared column norms of Wanda."""
    return Statistic("diagonal", tap)


def full(tap: str) -> Statistic:
    """Sum of x x^T (f, f)."""
    return Statistic("full", tap)


def per_head(tap: str) -> Statistic:
    """Sum of z z^T for every head's slice z of x (H, d, d)."""
    return Statistic("per_head", tap)


def cross(tap: str, other: str) -> Statistic:
    """Sum of x y^T (f, g)."""
    return Statistic("cross", tap, other)


def cosine(tap: str, other: str) -> Statistic:
    """Sum of x^T y / (|x| |y|) (): how far the second place keeps the direction of the first, token by token."""
    return Statistic("cosine", tap, other)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _not_worth_counting(_sizes: Sizes) -> int:
    return 0


class Needing(Generic[Arguments, Result]):
    """A function and the statistics that it reads, so that nothing else is summed.

    Attributes:
        needs: the statistics.
        workspace: sizes of a layer -> bytes that a call takes beside their sums.
    """

    def __init__(
        self,
        function: Callable[Arguments, Result],
        statistics: Iterable[Statistic],
        workspace: Callable[[Sizes], int] = _not_worth_counting,
    ):
        self.needs = frozenset(statistics)
        self.workspace = workspace
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """What the function returns."""
        return self._function(*args, **kwargs)


def needs(
    *statistics: Statistic, workspace: Callable[[Sizes], int] = _not_worth_counting
) -> Callable[[Callable[Arguments, Result]], Needing[Arguments, Result]]:
    """Decorator that states which statistics a function reads, and what memory it takes if that is worth counting."""
    return lambda function: Needing(function, statistics, workspace)


class Moments:
    """Sums over all tokens seen so far, looked up by statistic: `moments[full("mlp_input")]`.

    Sums, and products of all features with all, are taken about the mean c of the first batch: of a feature that is
    large and nearly constant, single precision would keep the size and lose what varies.
    """

    def __init__(self, statistics: Iterable[Statistic], num_heads: int):
        """Prepare the sums of `statistics`; `num_heads` is H, which `per_head` cuts its features into."""
        wanted = set(statistics)
        # Products about a centre need the sums about it to be taken about zero.
        wanted |= {total(tap) for s in wanted if s.kind in ("full", "cross") for tap in s.taps}
        # The diagonal of a matrix that is summed anyway is read off it.
        self.statistics = {s for s in wanted if s.kind != "diagonal" or full(s.tap) not in wanted}
        self.num_heads = num_heads
        self.count = 0
        self._sums: dict[Statistic, Tensor] = {}
        self._centres: dict[str, Tensor] = {}

    @property
    def taps(self) -> set[str]:
        """Names of the places that `update` wants activations of."""
        return {tap for s in self.statistics for tap in s.taps}

    def cover(self, statistics: Iterable[Statistic]) -> bool:
        """Whether all of these were summed."""
        return {s for s in statistics if s.kind != "diagonal" or full(s.tap) not in self.statistics} <= self.statistics

    def update(self, activations: dict[str, Tensor]) -> None:
        """Add a batch: for every name in `taps` its activations (..., f), the same tokens in each.

        All that takes memory is done before the first sum is touched: a batch that does not fit is not half added.
        """
        flat = {tap: activations[tap].flatten(0, -2).float() for tap in self.taps}  # (n, f)
        centred_taps = {s.tap for s in self.statistics if s.kind == "sum"}
        centres = {tap: self._centres[tap] if self.count else flat[tap].mean(0) for tap in centred_taps}
        centred = {tap: flat[tap] - centre for tap, centre in centres.items()}
        vectors = {total(tap): x.sum(0) for tap, x in centred.items()}
        diagonals = (s for s in self.statistics if s.kind == "diagonal")
        vectors |= {s: centred.get(s.tap, flat[s.tap]).square().sum(0) for s in diagonals}
        cosines = (s for s in self.statistics if s.kind == "cosine")
        vectors |= {s: cosine_similarity(flat[s.tap], flat[s.other or s.tap]).double().sum() for s in cosines}
        for statistic in self.statistics - self._sums.keys():
            self._sums[statistic] = self._empty_sum(
                statistic, flat[statistic.tap], flat[statistic.other or statistic.tap]
            )
        self._centres = centres
        for statistic, vector in vectors.items():
            self._sums[statistic] += vector
        for statistic in self.statistics - vectors.keys():
            if statistic.kind == "per_head":
                self._add_products(statistic, flat[statistic.tap], flat[statistic.tap])
            else:
                self._add_products(statistic, centred[statistic.tap], centred[statistic.other or statistic.tap])
        if flat:
            self.count += len(next(iter(flat.values())))

    def _empty_sum(self, statistic: Statistic, x: Tensor, y: Tensor) -> Tensor:
        width = x.shape[-1]
        head = width // self.num_heads
        shapes = {
            "full": (width, width),
            "per_head": (self.num_heads, head, head),
            "cross": (width, y.shape[-1]),
        }
        if statistic.kind in shapes:
            return x.new_zeros(shapes[statistic.kind])
        if statistic.kind == "cosine":
            return x.new_zeros((), dtype=torch.float64)
        return x.new_zeros(width, dtype=torch.float64)  # vectors are cheap to sum in double precision

    def _add_products(self, statistic: Statistic, x: Tensor, y: Tensor) -> None:
        summed = self._sums[statistic]
        match statistic.kind:
            case "full":
                for start in range(0, len(summed), BLOCK):
                    columns = slice(start, start + BLOCK)
                    summed[start:, columns].addmm_(x[:, start:].T, x[:, columns])
            case "per_head":
                heads = x.unflatten(-1, (self.num_heads, -1)).transpose(0, 1)  # (H, n, d)
                summed.baddbmm_(heads.mT, heads)
            case "cross":
                summed.addmm_(x.T, y)

    @property
    def centres(self) -> dict[str, Tensor]:
        """c (f,) of every place whose sums are taken about one."""
        return self._centres

    @property
    def sums(self) -> list[Tensor]:
        """All sums, in an order that the statistics alone decide; to be changed in place, with `count`."""
        names = sorted(self._sums, key=lambda statistic: (statistic.kind, statistic.tap, statistic.other or ""))
        return [self._sums[statistic] for statistic in names]

    def move_to(self, centres: dict[str, Tensor]) -> None:
        """Take all sums about other centres (f,), so that those of another part of the text can be added.

        Where x was taken about a and y about b, and now about a - p and b - q, with sums s and t over n tokens, the sum
        of their products grows by s q^T + p t^T + n p q^T.
        """
        shifts = {
            tap: self._centres[tap].double() - centre.double()
            for tap, centre in centres.items()
            if not torch.equal(self._centres[tap], centre)
        }
        for statistic, summed in self._sums.items():
            if statistic.kind in ("full", "cross", "diagonal") and not shifts.keys().isdisjoint(statistic.taps):
                x, y = statistic.tap, statistic.other or statistic.tap
                s, t = self._sums[total(x)], self._sums[total(y)]
                p, q = shifts.get(x, torch.zeros_like(s)), shifts.get(y, torch.zeros_like(t))
                if statistic.kind == "diagonal":
                    summed += 2 * p * s + self.count * p.square()
                else:
                    s, t, p, q = (vector.to(summed.dtype) for vector in (s + self.count * p, t, p, q))
                    summed.addr_(s, q).addr_(p, t)
        for tap, shift in shifts.items():
            self._sums[total(tap)] += self.count * shift
        self._centres = dict(centres)

    def mean(self, tap: str) -> Tensor:
        """Mean over the tokens (f,), where the sum is taken, in double precision."""
        return self[total(tap)] / self.count

    def centre(self, tap: str) -> Tensor:
        """c (f,), in double precision."""
        return self._centres[tap].double()

    def about_centre(self, statistic: Statistic) -> Tensor:
        """Sum of x - c, of its squares, of (x - c)(x - c)^T or of (x - c)(y - c')^T.

        A tap has a centre c where its `total` is summed, as with every statistic of two indices; elsewhere it is zero.
        """
        if statistic.kind == "diagonal" and statistic not in self._sums:
            return self._sums[full(statistic.tap)].diagonal().double()
        summed = self._sums[statistic]
        if statistic.kind == "full":
            for start in range(0, len(summed), BLOCK):  # the upper half is the lower one
                stop = start + BLOCK
                summed[start:stop, stop:] = summed[stop:, start:stop].T
        return summed

    def about_mean(self, tap: str) -> Tensor:
        """Sum of (x - m)(x - m)^T (f, f), m the mean of x: n times the covariance, in double precision."""
        summed = self._sums[total(tap)]
        return torch.outer(summed, summed).div_(-self.count).add_(self.about_centre(full(tap)))

    def __getitem__(self, statistic: Statistic) -> Tensor:
        tap, other = statistic.tap, statistic.other or statistic.tap
        match statistic.kind:
            case "sum":
                return self._sums[statistic] + self.count * self.centre(tap)
            case "full" | "cross":
                sums = self._sums[total(tap)], self._sums[total(other)]
                return about_zero(self.about_centre(statistic), *sums, self.centre(tap), self.centre(other), self.count)
            case "diagonal" if tap in self._centres:
                squares, centre = self.about_centre(statistic), self.centre(tap)
                return squares + 2 * centre * self._sums[total(tap)] + self.count * centre.square()
            case _:
                return self._sums[statistic]

    def drop(self, statistics: Iterable[Statistic], later: Iterable[Statistic] = ()) -> None:
        """Forget the sums of `statistics`, but for what the statistics `later` are read off."""
        gone, later = set(statistics) - set(later), set(later)
        for statistic in later:
            if statistic.kind == "diagonal" and statistic not in self._sums and full(statistic.tap) in gone:
                self._sums[statistic] = self.about_centre(statistic)  # a copy, which does not hold the matrix
        centring = {total(tap) for s in later if s.kind in ("full", "cross", "diagonal") for tap in s.taps}
        for statistic in gone - centring:
            self._sums.pop(statistic, None)

    def not_finite(self) -> list[str]:
        """Names of the taps whose sums hold a NaN or an infinity; a product of two taps does not say which it was."""
        own = {s: summed for s, summed in self._sums.items() if s.other is None}
        return sorted({s.tap for s, summed in own.items() if not all_finite(summed)})
