"""One bar for all that a run does to the layers; where nobody watches a terminal, a line now and then."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic

from tqdm import tqdm

from .terminal import time_in_words

# Without a terminal (nohup, a batch system, a file) a line is printed no more often, in seconds.
LINE_EVERY = 30.0


class Bar:
    """How far a run is, in layers of all its stages."""

    def __init__(self, total: int, is_shown: bool = True):
        """Show nothing yet, or never; `total` is the number of layers of all stages."""
        self._total, self._done, self._skipped, self._is_shown = total, 0, 0, is_shown
        self._begun = self._said = monotonic()
        self._tqdm = tqdm(total=total, unit="layer", leave=False) if is_shown and sys.stderr.isatty() else None

    def through(self, stage: str, first: int, count: int) -> Iterator[int]:
        """Yield the indices `first` to `count` - 1 of the layers, and show each as done when the next is asked for."""
        self.skip(first)
        for index in range(first, count):
            if self._tqdm:
                self._tqdm.set_description(f"{stage}, layer {index}")
            yield index
            self._step(1, stage, f"layer {index + 1} of {count}")

    def skip(self, layers: int) -> None:
        """Count the layers of a stage that is done already."""
        self._skipped += layers
        self._step(layers, "", "")

    def close(self) -> None:
        """Remove the bar."""
        if self._tqdm:
            self._tqdm.close()

    def _step(self, layers: int, stage: str, where: str) -> None:
        self._done += layers
        if self._tqdm:
            self._tqdm.update(layers)
        elif where and self._is_shown and monotonic() - self._said > LINE_EVERY:
            self._said = monotonic()
            taken = self._said - self._begun
            left = taken / (self._done - self._skipped) * (self._total - self._done)
            times = f"{time_in_words(taken)} so far, about {time_in_words(left)} left"
            print(f"{stage}: {where}, {self._done / self._total:.0%} of the run, {times}", file=sys.stderr)


_shown: ContextVar[Bar | None] = ContextVar("shown", default=None)
_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


@contextmanager
def no_bars() -> Iterator[None]:
    """Show nothing of what is done inside: another process shows how far all are."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def is_quiet() -> bool:
    """Whether bars are to be left out."""
    return _is_quiet.get()


@contextmanager
def one_bar(total: int, is_shown: bool = True) -> Iterator[Bar]:
    """Show all stages inside as one bar of `total` layers; with `is_shown` False count them only."""
    bar = Bar(total, is_shown and not is_quiet())
    token = _shown.set(bar)
    try:
        yield bar
    finally:
        _shown.reset(token)
        bar.close()


def counted(stage: str, first: int, count: int) -> Iterator[int]:
    """The indices `first` to `count` - 1 of the layers, shown on the bar of the run, or on one of their own."""
    if bar := _shown.get():
        yield from bar.through(stage, first, count)
        return
    with one_bar(count) as bar:
        yield from bar.through(stage, first, count)
