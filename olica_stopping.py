"""How a command line ends when Ctrl-C or SIGTERM stops it: in one line, and by the signal.

It imports nothing that takes time: the command lines import it before all else, and call `at_once` before they go on.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GO_ON = "give the same command again"


# The signals that came while a command ran.
_seen: list[int] = []


class Stopped(KeyboardInterrupt):
    """A signal; what a note (`add_note`) says is how to go on."""

    def __init__(self, number: int):
        self.number = number


def at_once() -> None:
    """From now on a signal ends the process at once: nothing has been done yet."""
    _handle(lambda number, _: _end(number, GO_ON))


def end_with(command: Callable[[], int]) -> NoReturn:
    """Exit with the status that `command` returns; a signal is raised in it, so that it leaves what it holds.

    A library may take what is raised for an error of its own, or drop it: then the end is by the signal all the same.
    """
    _handle(_raise)
    try:
        sys.exit(command())
    except (KeyboardInterrupt, SystemExit) as ended:
        _handle(signal.SIG_IGN)
        number = getattr(ended, "number", _seen[0] if _seen else None)
        if number is None and isinstance(ended, SystemExit):
            raise
        is_said = getattr(ended, "is_said_by_another", False)
        _end(number or signal.SIGINT, None if is_said else "; ".join(getattr(ended, "__notes__", [GO_ON])))


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set what the signals do, but for those that are ignored: a shell has commands in the background ignore Ctrl-C."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    _seen.append(number)
    raise Stopped(number)


def _end(number: int, how: str | None) -> NoReturn:
    """Print one line, if this is the first of the processes that `accelerate launch` started, and die of the signal.

    With `how` None nothing is printed: another of them has said why all end.

    A shell that sees its command die of Ctrl-C stops the script too; that a command exited with 130 says nothing to it.
    """
    with suppress(OSError, ValueError):  # whoever read it has got the signal too
        if how is not None and os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}; {how}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container is spared by its own signals
