"""What is finished of a pruning, on disk: a run that was killed goes on where it was.

Until the checkpoint's folder NAME is complete, `.NAME.partial` lies beside it:

    checkpoint/        the checkpoint so far, one shard for every finished layer
    *.safetensors      the survey, and the hidden states that enter the next layer
    progress.json      what is being done, and the checksum of every finished file

and, while a process is at work, the lock `.NAME.lock`.

A file is written under another name, forced to the disk and moved to its place; then progress.json, in the same way,
names it. So whenever the power goes, what progress.json names is there as a whole, and all else is thrown away.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .activations import BatchSize
from .errors import UsageError

JOURNAL = "progress.json"
CHECKPOINT = "checkpoint"


class Progress:
    """What is finished of a pruning. This one keeps nothing: it serves where all happens in memory."""

    def survey(self) -> tuple[dict, dict[str, Tensor], Tensor | None]:
        """What `save_survey` was given last: facts, tensors and hidden states; empty at first."""
        return {}, {}, None

    def save_survey(self, facts: dict, tensors: dict[str, Tensor], hidden: Tensor | None) -> None:
        """Keep what the survey has found so far, and the hidden states (N, T, D) that enter the next layer.

        Args:
            facts: plain values; `layers` is the number of surveyed layers.
            tensors: the rest of it.
            hidden: None when all layers are surveyed.
        """

    def pruned(self) -> tuple[int, Tensor | None]:
        """How many layers are finished, and the hidden states (N, T, D) that enter the next one; None: none or all."""
        return 0, None

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """Keep a finished layer, and the hidden states that enter the next one; neither may change until `wait`."""

    def wait(self) -> None:
        """Return when what was to be kept is kept."""


class RunFolder(Progress):
    """The progress of a run whose result is going to be a checkpoint's folder; made by `locked`, started by `begin`.

    Attributes:
        folder: the checkpoint's.
        checkpoint: the folder that becomes it.
        is_complete: whether `begin` found that the same run had put the checkpoint in its place already.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder.with_name(f".{folder.name}.partial")
        self.checkpoint = self.work / CHECKPOINT
        self._replaced = folder.with_name(f".{folder.name}.old")
        self._journal: dict = {}
        self._batch_size = BatchSize(1)
        self._shards = self._prefix = None
        self.is_complete = False
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: Future | None = None

    @classmethod
    @contextmanager
    def locked(cls, folder: Path) -> Iterator["RunFolder"]:
        """The progress of a run into `folder`; it outlives a failure, unless nothing was finished.

        Raises:
            UsageError: another process is at work on it.
        """
        run = cls(folder)
        made = [path for path in folder.absolute().parents if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UsageError(
                f"--save_dir: another run is at work on {folder}; wait for its end, or give another --save_dir"
            ) from error
        try:
            run._recover()
            run.work.mkdir(exist_ok=True)
            yield run
        finally:
            run._writer.shutdown()
            if not (run.work / JOURNAL).exists():
                shutil.rmtree(run.work, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices; nothing is touched after this
            lock.release()
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()

    def _recover(self) -> None:
        """Bring to an end what `publish` was killed in."""
        if self._replaced.exists() and not self.folder.exists():
            self._replaced.replace(self.folder)
        shutil.rmtree(self._replaced, ignore_errors=True)

    @property
    def is_published(self) -> bool:
        """Whether an earlier run put the checkpoint in its place and was killed before it could tidy up."""
        try:
            journal = self._read_journal()
        except UsageError:
            return False
        return journal.get("publishing", False) and not self.checkpoint.exists() and self.folder.exists()

    def tidy(self) -> None:
        """Remove all but the checkpoint in its place; until the end progress.json says that it is there."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        for path in self.work.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        shutil.rmtree(self.work, ignore_errors=True)

    def begin(self, identity: dict, overwrite: bool, prefix: str, layers: int, batch_size: BatchSize) -> None:
        """Go on with the unfinished run that lies here, or start a new one.

        Args:
            identity: what decides the result: names, in words for messages, and plain values.
            overwrite: start afresh, unless the unfinished run was started so too and is the same.
            prefix: of the names of the decoder layers' weights, their index follows.
            layers: number of decoder layers.
            batch_size: what is left of it when the unfinished run ran out of memory.

        Raises:
            UsageError: the unfinished run is another one, or its files are not as they were written.
        """
        self._prefix, self._shards, self._batch_size = prefix, layers + 2, batch_size
        identity = json.loads(json.dumps(identity))
        if self.is_published:
            journal = self._read_journal()
            self.is_complete = (journal["identity"], journal["overwrite"]) == (identity, overwrite)
            self.tidy()
            if self.is_complete:
                return
            if not overwrite:
                raise UsageError(f"--save_dir: another run finished {self.folder}; give --overwrite to replace it")
            self.work.mkdir()
        try:
            self._journal = self._read_journal()
            if overwrite and not self._journal.get("overwrite"):
                self._journal = {}
            if self._journal:
                self._check_unfinished(identity)
                batch_size.size = self._journal["batch_size"]
                self._journal["went_on_after"].append(self._journal["pruned"])
        except UsageError:
            if not overwrite:
                raise
            self._journal = {}
        if not self._journal:
            self._journal = {
                "identity": identity,
                "overwrite": overwrite,
                "went_on_after": [],
                "pruned": 0,
                "hidden": None,
                "files": {},
            }
            (self.work / JOURNAL).unlink(missing_ok=True)
        self.checkpoint.mkdir(exist_ok=True)
        _force_to_disk(self.work.parent)
        self._remove_unnamed()

    @property
    def interruptions(self) -> list[int]:
        """For every time that the run was interrupted, how many layers were finished."""
        return self._journal["went_on_after"]

    def _read_journal(self) -> dict:
        path = self.work / JOURNAL
        try:
            journal = json.loads(path.read_text()) if path.exists() else {}
            if journal:
                for key in ("identity", "files", "pruned", "hidden", "batch_size", "went_on_after"):
                    journal[key]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--save_dir: {path} is damaged; give --overwrite to start afresh") from error
        return journal

    def _check_unfinished(self, identity: dict) -> None:
        before = self._journal["identity"]
        for name in [*before, *(name for name in identity if name not in before)]:
            if before.get(name) != identity.get(name):
                was, now = before.get(name), identity.get(name)
                raise UsageError(
                    f"--save_dir: the unfinished run for {self.folder} was started with another {name} "
                    f"({was}, now {now}); go on as it was started, or give --overwrite to start afresh"
                )
        for name, checksum in self._journal["files"].items():
            path = self.work / name
            if not path.is_file() or _checksum(path) != checksum:
                raise UsageError(
                    f"--save_dir: {path} of the unfinished run was altered or cut short; "
                    "give --overwrite to start afresh"
                )

    def _remove_unnamed(self) -> None:
        kept = {JOURNAL, CHECKPOINT, *self._journal["files"]}
        for path in [*self.work.iterdir(), *self.checkpoint.iterdir()]:
            if str(path.relative_to(self.work)) not in kept:
                path.unlink() if path.is_file() else shutil.rmtree(path)

    def survey(self) -> tuple[dict, dict[str, Tensor], Tensor | None]:
        """See `Progress`."""
        if "survey" not in self._journal:
            return {}, {}, None
        hidden = None if self._journal["pruned"] else self._hidden()
        return self._journal["facts"], load_file(self.work / self._journal["survey"]), hidden

    def save_survey(self, facts: dict, tensors: dict[str, Tensor], hidden: Tensor | None) -> None:
        """See `Progress`; returns when it is written."""
        survey = f"survey-{facts['layers']}.safetensors"
        self._write(survey, tensors)
        hidden_file = self._write_hidden(f"surveyed-{facts['layers']}", hidden)
        self._commit(survey=survey, facts=facts, hidden=hidden_file, batch_size=self._batch_size.size)

    def pruned(self) -> tuple[int, Tensor | None]:
        """See `Progress`."""
        count = self._journal["pruned"]
        return count, self._hidden() if count else None

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """See `Progress`; writes in the background."""
        self.wait()
        # The batch size as it is now: the next layer may make it smaller before this one is written.
        self._writing = self._writer.submit(
            self._save_layer, index, dict(layer.state_dict()), hidden, self._batch_size.size
        )

    def wait(self) -> None:
        """See `Progress`.

        Raises:
            UsageError: what was to be kept cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _save_layer(self, index: int, weights: dict[str, Tensor], hidden: Tensor | None, batch_size: int) -> None:
        self.save_shard(index + 2, {f"{self._prefix}{index}.{name}": weight for name, weight in weights.items()})
        hidden_file = self._write_hidden(f"pruned-{index + 1}", hidden)
        self._commit(pruned=index + 1, hidden=hidden_file, batch_size=batch_size)

    def save_shard(self, number: int, weights: dict[str, Tensor]) -> None:
        """Write shard `number` of the checkpoint: the decoder layers' begin with 2.

        Raises:
            UsageError: it cannot be written.
        """
        self._write(f"{CHECKPOINT}/model-{number:05}-of-{self._shards:05}.safetensors", weights)

    def _hidden(self) -> Tensor | None:
        name = self._journal["hidden"]
        # Not mapped from the file, which is going to be removed: in memory of its own, aligned as it was.
        return load_file(self.work / name)["hidden"].clone() if name else None

    def _write_hidden(self, step: str, hidden: Tensor | None) -> str | None:
        if hidden is None:
            return None
        name = f"hidden-{step}.safetensors"
        self._write(name, {"hidden": hidden})
        return name

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        path = self.work / name
        with self.explained():
            partial = path.with_suffix(".unfinished")
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, partial, metadata={"format": "pt"})
            _move_durably(partial, path)
            self._journal["files"][name] = _checksum(path)

    def _commit(self, **changes) -> None:
        """Have progress.json say so, and remove the files that it no longer names."""
        before = {self._journal.get("survey"), self._journal["hidden"]}
        self._journal |= changes
        gone = before - {self._journal.get("survey"), self._journal["hidden"], None}
        for name in gone:
            del self._journal["files"][name]
        with self.explained():
            partial = self.work / f"{JOURNAL}.unfinished"
            partial.write_text(json.dumps(self._journal, indent=1))
            _move_durably(partial, self.work / JOURNAL)
            for name in gone:
                (self.work / name).unlink()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell the user of files that cannot be written."""
        try:
            yield
        except (SafetensorError, OSError) as error:  # a full disk is the one or the other, by who writes
            raise UsageError(
                f"--save_dir: {self.work} cannot be written to ({error}); make room and give the same command again, "
                "which goes on from the last finished layer, or give another --save_dir"
            ) from error

    def publish(self) -> None:
        """Put the complete checkpoint in its place.

        What was there is put aside until then, so that there is always a checkpoint that is whole.
        """
        self._commit(publishing=True)
        with self.explained():
            if self.folder.exists():
                self.folder.replace(self._replaced)
            try:
                _move_durably(self.checkpoint, self.folder)
            except BaseException:
                self._recover()
                raise
        self.tidy()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_durably(source: Path, target: Path) -> None:
    """Move a file or a folder such that after a power cut the target is there as a whole, or not at all."""
    for path in [*source.rglob("*"), source]:
        _force_to_disk(path)
    os.replace(source, target)
    _force_to_disk(target.parent)


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
