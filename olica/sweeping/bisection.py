"""Sparsities as a user writes them, a target that one of them is to meet, and which to try next.

Every trial is a multiple of the tolerance: so the answer has a short number, and a search that was stopped tries the
same ones again.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..checks import as_kind
from ..errors import UsageError

# Steps and tolerances that are finer tell nothing: sizes are whole numbers, and perplexities have an error.
FINEST = 0.001
# Sparsities are compared, and printed, to so many digits behind the point.
DIGITS = 6
PARAMETER_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
# Beside `UsageError`s of values, what a range has to look like.
FORM = "give a range START:END:STEP such as 0.1:0.5:0.05, or sparsities joined by commas"


def as_sparsities(given: str | float | Sequence[float]) -> list[float]:
    """Sparsities, ascending, of START:END:STEP (END included), of a list joined by commas, or of numbers.

    Raises:
        UsageError: it is none of these, or one of them is outside [0, 1) or there twice.
    """
    if isinstance(given, str) and ":" in given:
        found = _range(given)
    else:
        parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
        try:
            found = [round(float(part), DIGITS) for part in parts]
        except (TypeError, ValueError) as error:
            raise UsageError(f"--sparsity {given}: {FORM}") from error
    if not found:
        raise UsageError(f"--sparsity {given}: {FORM}")
    for sparsity in found:
        if not 0 <= sparsity < 1:
            raise UsageError(f"--sparsity {given}: {sparsity:g} is outside [0, 1), the shares that can be removed")
    if len(set(found)) < len(found):
        raise UsageError(f"--sparsity {given}: a sparsity is there twice")
    return sorted(found)


def _range(given: str) -> list[float]:
    try:
        start, end, step = (float(part) for part in given.split(":"))
    except ValueError as error:
        raise UsageError(f"--sparsity {given}: {FORM}") from error
    if not all(map(math.isfinite, (start, end, step))) or end < start or step < FINEST:
        raise UsageError(f"--sparsity {given}: END must be no less than START, and STEP at least {FINEST:g}; {FORM}")
    # A step that ends within rounding of END has reached it.
    count = math.floor((end - start) / step + 1e-9) + 1
    return [round(start + index * step, DIGITS) for index in range(count)]


def as_parameters(flag: str, given: str | int | float) -> int:
    """A number of parameters, plain or with one of `PARAMETER_UNITS`: 900000000, 900M, 0.9B.

    Raises:
        UsageError: it is none, or less than one; names the flag.
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\d+)?)\s*([KMB]?)", str(given).strip().replace(",", "").upper())
    count = round(float(number[1]) * PARAMETER_UNITS[number[2]]) if number else 0
    if count < 1:
        raise UsageError(f"--{flag} {given}: give a number of parameters such as 900000000, 900M or 1.0B")
    return count


def as_ratio(flag: str, given: str | float) -> float:
    """A ratio to the dense model's perplexity, above 1.

    Raises:
        UsageError: it is none; names the flag.
    """
    ratio = as_kind(flag, given, float)
    if not 1 < ratio < math.inf:
        raise UsageError(f"--{flag} {ratio:g}: give a ratio above 1, which is the dense model's")
    return ratio


@dataclass(frozen=True)
class Target:
    """What a sparsity is to meet.

    Attributes:
        flag: "target_ppl_ratio": the largest sparsity whose perplexity is at most `value` times the dense model's;
            "max_params": the smallest that leaves at most `value` parameters.
        value: the limit.
    """

    flag: str
    value: float

    @property
    def text(self) -> str:
        """The flag and its value."""
        return f"--{self.flag} {self.value:,}" if self.flag == "max_params" else f"--{self.flag} {self.value:g}"

    def is_beyond(self, ratio: float, parameters: int) -> bool:
        """Whether a model of this perplexity ratio and size is on the far side: too bad, or small enough."""
        return ratio > self.value if self.flag == "target_ppl_ratio" else parameters <= self.value


def next_trial(beyond: Mapping[float, bool], tolerance: float, guess: float | None = None) -> float | None:
    """The sparsity to try next; None where none is left that could change the answer, or there is no far side yet.

    It is the middle, in multiples of the tolerance, of the largest sparsity on the near side, of which the dense model
    is one, and the smallest on the far side.

    Args:
        beyond: whether a sparsity is on the far side, for all that were tried.
        tolerance: of the answer.
        guess: where the far side should begin: it, and the multiple before it, are tried first.
    """
    near, far = bracket(beyond)
    if far is None:
        return None
    low, high = near / tolerance, far / tolerance
    inside = range(math.floor(low + 1e-6) + 1, math.ceil(high - 1e-6))
    if not inside:
        return None
    first = math.ceil(guess / tolerance - 1e-6) if guess is not None else None
    guessed = [] if first is None else [index for index in (first, first - 1) if index in inside]
    return round([*guessed, inside[len(inside) // 2]][0] * tolerance, DIGITS)


def bracket(beyond: Mapping[float, bool]) -> tuple[float, float | None]:
    """The largest sparsity on the near side, 0 if there is none, and the smallest on the far side, if there is one.

    Where a measured curve goes up and down, what counts is where it first reaches the far side.
    """
    far = min((sparsity for sparsity, is_beyond in beyond.items() if is_beyond), default=None)
    near = [sparsity for sparsity, is_beyond in beyond.items() if not is_beyond and (far is None or sparsity < far)]
    return max(near, default=0.0), far
