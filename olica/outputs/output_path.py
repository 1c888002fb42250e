"""What a command writes to `--output_path`: it is there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from ..errors import in_words
from .journal import move_durably


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Give a name beside `path` for a file or a folder that is to stand there once it is whole, in place of another.

    Raises:
        UsageError: the disk is full or fails.
    """
    partial, replaced = (path.with_name(f".{path.name}.{uuid4().hex}.{end}") for end in ("partial", "old"))
    with output_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            if path.is_dir():  # whose place no other folder takes
                path.replace(replaced)
            try:
                move_durably(partial, path)
            except BaseException:
                if replaced.exists():
                    replaced.replace(path)
                raise
        finally:
            for left in (partial, replaced):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def output_in_words(path: Path) -> AbstractContextManager[None]:
    """Have a disk that is full or fails on the way to `path` end in a UsageError."""
    return in_words(
        lambda error: f"--output_path: {path.parent} cannot be written to ({error}); make room or give another folder",
        kinds=(OSError, SafetensorError),
    )
