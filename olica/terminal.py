"""What is printed may not stop what is done: text is shown as well as the terminal can, and a reader may go.

And words for what is shown in many places: figures with their errors, times, devices.
"""

import codecs
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

# How characters are spelt where the encoding of the output lacks them; all others become a question mark.
SPELT = {"±": "+-"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SPELT.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("olica.spell", _spell)


class _Output:
    """A text stream to which all can be written: what it cannot encode is spelt, what nobody reads any more is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="olica.spell")

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As that of a text stream."""
        with self._without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As that of a text stream."""
        with self._without_reader():
            self._stream.flush()

    @contextmanager
    def _without_reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # for what the stream holds still, too
            os.close(nowhere)


def with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """A figure as text and, where it has one, its standard error; `sign` "+" writes that of positive figures too."""
    shown = f"{value:{sign},.{digits}f}"
    return shown if error is None else f"{shown} ± {error:,.{digits}f}"


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Have standard output and error take all that is written meanwhile.

    A pipe whose reader has gone (`| head -1`) is no reason to lose a record, nor is a terminal without a ± sign.
    """
    streams = [_Output(stream) if stream else stream for stream in (sys.stdout, sys.stderr)]  # None: it was closed
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                stream.flush()


def time_in_words(seconds: float) -> str:
    """A time to two digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{two_digits(seconds / size)} {unit}"
    return f"{two_digits(seconds)} s"


def two_digits(number: float) -> str:
    """A number below a million, rounded to two digits."""
    return f"{float(f'{number:.2g}'):g}"


def named_device(device: str, threads: int) -> str:
    """The name of a device, as records have it; a CPU's with its threads."""
    return f"{threads} thread{'s' * (threads > 1)} of a CPU" if device == "cpu" else device
