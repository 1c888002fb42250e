"""Checks of tensors, of files and of places to write to, before work is done in vain."""

import errno
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

# Sizes of files as people write them: in powers of a thousand, as disks are sold.
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Flags by which a command prints something else, or more, and whose they are: a call from Python has none of them.
COMMANDS_OWN = {
    "dry_run": "model_pruning.py and model_sweep.py",
    "list_recipes": "model_pruning.py and model_sweep.py",
    "verbose": "the commands",
}
# How a file begins that git-lfs has not fetched, and what such a file has at most (the format's own limit).
POINTER_START, POINTER_BYTES = b"version https://git-lfs", 1024


def all_finite(tensor: Tensor) -> bool:
    """Whether nothing in `tensor` is NaN or infinite; takes no memory of its size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def as_kind(flag: str, value: Any, kind: type) -> Any:
    """A value of an int, a float or a str, which may come as text.

    Raises:
        UsageError: it is none; names the flag.
    """
    words = {int: "a whole number", float: "a number", str: "a text"}[kind]
    fits = isinstance(value, str | int | float) and not isinstance(value, bool)
    if kind is str:
        fits = isinstance(value, str | os.PathLike)
    elif kind is int and isinstance(value, float):
        fits = value.is_integer()
    try:
        if not fits:
            raise ValueError
        return kind(value)
    except ValueError as error:
        raise UsageError(f"--{flag} {value}: give {words}") from error


def check_choice(flag: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise UsageError, naming the flag, unless a value is one of a few; 1 is not True."""
    choices = list(choices)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise UsageError(f"--{flag} {value} is none of {', '.join(map(str, choices))}")


def check_above_zero(flag: str, value: float, why: str = "") -> None:
    """Raise UsageError, naming the flag, unless a value is a number above 0; may say why it must be."""
    if not 0 < value < math.inf:
        raise UsageError(f"--{flag} {value:g} must be a number above 0{why and f': {why}'}")


def refuse_unknown(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise UsageError for an argument that a call from Python has not; names those like it, or else all there are."""
    for name in names:
        if name in known:
            continue
        if name in COMMANDS_OWN:
            raise UsageError(f"there is no argument {name}: it is a flag of {COMMANDS_OWN[name]} alone")
        near = get_close_matches(name, known)
        others = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"there is no argument {name}; {others}")


def refuse_twice(name: str, function: str, given: Mapping[str, Any]) -> None:
    """Raise UsageError if `given` names the first argument of a function, which is given by its place."""
    if name in given:
        raise UsageError(f"{name} is the first argument of {function}, and is given without a name")


def as_bytes(flag: str, value: str) -> int:
    """Bytes of a size that is written as a number and a unit of UNITS.

    Raises:
        UsageError: it is none, or less than a byte; names the flag.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", value.strip().upper())
    size = int(float(found[1]) * UNITS[found[2] or "B"]) if found else 0
    if size < 1:
        raise UsageError(f"--{flag} {value}: give a size such as 500MB or 5GB")
    return size


def check_no_file(path: Path, flag: str) -> None:
    """Raise UsageError, naming `flag`, if `path`, which need not exist, is a file or would lie in one."""
    nearest = _nearest(path.absolute(), flag)
    if not nearest.is_dir():
        raise UsageError(f"{flag} {path}: {nearest} is a file; give a folder, which need not exist")


def _nearest(path: Path, flag: str) -> Path:
    """The path, or the first above it that exists; raises UsageError, naming `flag`, if it can be no path."""
    try:
        return next(p for p in (path, *path.parents) if p.exists())
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise UsageError(f"{flag} {path}: {error.strerror}; give another") from error


def check_writable(path: Path, flag: str) -> Path:
    """The nearest folder above `path` that exists; raises UsageError, naming `flag`, unless it can be written to."""
    parent = _nearest(path.absolute().parent, flag)
    try:
        with TemporaryDirectory(dir=parent):  # tried out: of /proc, for one, the permissions say nothing
            return parent
    except OSError as error:
        if error.errno == errno.ENOSPC:  # `check_room` says how much is missing
            return parent
        raise UsageError(f"{flag}: {parent} is not a folder that can be written to") from error


def check_room(path: Path, needed: int, flag: str, what: str) -> None:
    """Raise UsageError, naming `flag`, unless there is room at `path` for so many bytes of `what`."""
    free = shutil.disk_usage(check_writable(path, flag)).free
    if free < needed:
        raise UsageError(
            f"{flag}: {what} takes {needed / 1e9:.2f} GB more, and {path.absolute().parent} has {free / 1e9:.2f} GB "
            f"free; make room or give another {flag}"
        )


def check_record_path(path: Path, flag: str) -> None:
    """Raise UsageError unless a record can be written to `path`, in place of a file at the most."""
    _nearest(path.absolute(), flag)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{flag} {path} is a folder, a link or a device; give the name of a file")
    check_writable(path, flag)


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raise UsageError if one of the files, which need not be there, is a pointer that git-lfs has left."""
    for path in paths:
        if not path.is_file() or path.stat().st_size > POINTER_BYTES:
            continue
        with path.open("rb") as file:
            if file.read(len(POINTER_START)) == POINTER_START:
                raise UsageError(f"{path} is a pointer of git-lfs in place of the file; run git lfs pull in its folder")
