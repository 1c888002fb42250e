"""Folders that one process at a time works in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, when_held: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, whose folder is made, and goes again, with those above it, where nothing came into it.

    Args:
        path: a file, which is there while the lock is held.
        when_held: called if another process holds it, whose end is waited for unless this raises.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        when_held()
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # who waits for it notices; nothing is touched after this
        lock.release()
        with suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
