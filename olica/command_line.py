"""What all command lines share: how they begin and how they end."""

import argparse
import errno
import logging
import os
from collections.abc import Callable

from transformers.utils import logging as transformers_logging

from .errors import UsageError, memory_in_words
from .machine import full_precision
from .terminal import forgiving_output

# What a path that a user gave can be at fault for.
PATH_ERRORS = {
    errno.ENOENT,
    errno.EACCES,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EROFS,
    errno.ENOSPC,
}


@forgiving_output()
def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], arguments: list[str] | None = None
) -> int:
    """Parse `arguments` (those of the process by default) and run; returns the exit status.

    Wrong input, and memory that runs out, end in one sentence on standard error and exit status 2, or in a traceback
    to what is behind it where the variable OLICA_DEBUG is set.
    """
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if getattr(args, "verbose", False):
        logging.getLogger("olica").setLevel(logging.INFO)
    for library in ("lm_eval", "huggingface_hub"):  # what they retry, and find missing, is said by us
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with full_precision(), memory_in_words(memory_advice):
            run(args)
    except UsageError as error:
        if os.environ.get("OLICA_DEBUG"):
            raise
        parser.exit(2, only_once(f"{parser.prog}: error: {error}\n", error))
    except OSError as error:
        if error.filename is None or error.errno not in PATH_ERRORS:
            raise
        reason = f"{error.filename}: {error.strerror}; give another file or folder"
        parser.exit(2, only_once(f"{parser.prog}: error: {reason}\n", error))
    return 0


def memory_advice(of_host: bool) -> str:
    """What to do when memory runs out, where a command knows no better."""
    return "lower --batch_size, or give a --dtype of half the width" + ("" if of_host else " or --device cpu")


def only_once(message: str, error: BaseException) -> str | None:
    """The message, in one of the processes that `accelerate launch` started; the others say nothing.

    Those that were at work together have settled which (`working_together`), else it is the first.
    """
    is_said = getattr(error, "is_said_by_another", os.environ.get("RANK", "0") != "0")
    return None if is_said else message
