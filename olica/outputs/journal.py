"""What a folder holds for good: facts, and files of tensors with their checksums.

A file is written under another name, forced to the disk and moved to its place; then the journal, in the same way,
names it. So whenever the power goes, what the journal names is there as a whole, and all else can be thrown away.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..errors import UsageError, in_words
from ..tensor_files import OF_WEIGHTS, save_tensors


class Journal:
    """The journal of a folder.

    Attributes:
        path: its file.
        flag: what names the folder, for messages.
        facts: plain values, as they are on the disk or the next `commit` is going to write them.
        files: SHA-256 of every file written, by its path within the folder; those since the last `commit` too.
    """

    def __init__(self, path: Path, flag: str = "--save_dir"):
        self.path, self.flag = path, flag
        self.forget()

    def forget(self) -> None:
        """Start anew: nothing is there."""
        self.facts: dict = {}
        self.files: dict[str, str] = {}

    def read(self) -> dict:
        """The facts on the disk; none where there is no journal.

        Raises:
            UsageError: the journal is not as it was written.
        """
        self.forget()
        try:
            stored = json.loads(self.path.read_text())
            if stored["sha256"] != _text_checksum(stored["facts"], stored["files"]):
                raise ValueError("its checksum is another one")
        except FileNotFoundError:
            return self.facts
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.flag}: {self.path} is damaged; give --overwrite to start afresh") from error
        self.facts, self.files = stored["facts"], stored["files"]
        return self.facts

    def check_files(self) -> None:
        """Raise UsageError if a file is not as it was written."""
        for name, checksum in self.files.items():
            path = self.path.parent / name
            if not path.is_file() or _checksum(path) != checksum:
                raise UsageError(
                    f"{self.flag}: {path} of the unfinished run was altered or cut short; "
                    "give --overwrite to start afresh"
                )

    def remove_others(self, kept: Iterable[Path]) -> None:
        """Remove what lies in the folder, and in the folders `kept` in it, without being named."""
        named = {self.path, *kept, *(self.path.parent / name for name in self.files)}
        for folder in (self.path.parent, *kept):
            for path in folder.iterdir():
                if path not in named:
                    path.unlink() if path.is_file() else shutil.rmtree(path)

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file of safetensors, which the next `commit` is going to name."""
        held = {key: t.cpu().contiguous() for key, t in tensors.items()}
        self.add(name, lambda path: save_tensors(held, path, OF_WEIGHTS))

    def add(self, name: str, write: Callable[[Path], None]) -> None:
        """Have a file written under another name and moved to its place; the next `commit` is going to name it."""
        path = self.path.parent / name
        with writing_in_words(self.path.parent, self.flag):
            partial = path.with_suffix(".unfinished")
            write(partial)
            move_durably(partial, path)
            self.files[name] = _checksum(path)

    def commit(self, facts: dict, without: Iterable[str] = ()) -> None:
        """Have the journal say `facts` too, name what has been written, and remove the files `without`."""
        self.facts = self.facts | facts
        self.files = {name: checksum for name, checksum in self.files.items() if name not in without}
        stored = {"sha256": _text_checksum(self.facts, self.files), "facts": self.facts, "files": self.files}
        with writing_in_words(self.path.parent, self.flag):
            partial = self.path.with_suffix(".unfinished")
            partial.write_text(json.dumps(stored, indent=1))
            move_durably(partial, self.path)
            for name in without:
                (self.path.parent / name).unlink()


def writing_in_words(folder: Path, flag: str = "--save_dir") -> AbstractContextManager[None]:
    """Have a disk that is full or fails under `folder`, which `flag` names, end in a UsageError."""
    return in_words(
        lambda error: (
            f"{flag}: {folder} cannot be written to ({error}); make room and give the same command again, "
            f"which goes on from the last finished layer, or give another {flag}"
        ),
        kinds=(OSError, SafetensorError),
    )


def move_durably(source: Path, target: Path) -> None:
    """Move a file or a folder such that after a power cut the target is there as a whole, or not at all."""
    for path in [*source.rglob("*"), source]:
        force_to_disk(path)
    os.replace(source, target)
    force_to_disk(target.parent)


def force_to_disk(path: Path) -> None:
    """Return when a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_checksum(facts: dict, files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([facts, files], sort_keys=True).encode()).hexdigest()
