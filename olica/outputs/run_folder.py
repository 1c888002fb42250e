"""The folder of a run: made, locked, gone on with, and put in its place.

Until the checkpoint's folder NAME is complete, `.NAME.partial` lies beside it:

    shard-*            the weights so far, one shard for every finished layer, until they are in the checkpoint
    hidden-*           hidden states that enter one of the next layers
    checkpoint/        the checkpoint, made when all layers are finished
    progress.json      the journal: what is being done, how far it is, and the checksum of every finished file

and, while a process is at work, the lock `.NAME.lock`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..errors import UsageError
from ..machine import BatchSize
from .journal import Journal, force_to_disk, move_durably, writing_in_words
from .locks import locked
from .run_progress import CHECKPOINT, RunProgress, Shards


class RunFolder:
    """The folder of a run whose result is going to be a checkpoint; made by `locked`, started by `begin`.

    Attributes:
        folder: the checkpoint's.
        work: what lies beside it meanwhile.
        checkpoint: the folder that becomes it.
        is_complete: whether `begin` found that the same run had put the checkpoint in its place already.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder.with_name(f".{folder.name}.partial")
        self.checkpoint = self.work / CHECKPOINT
        self.is_complete = False
        self._replaced = folder.with_name(f".{folder.name}.old")
        self._journal = Journal(self.work / "progress.json")
        self._progress: RunProgress | None = None

    @classmethod
    @contextmanager
    def locked(cls, folder: Path) -> Iterator["RunFolder"]:
        """The progress of a run into `folder`; it outlives a failure, unless nothing was finished.

        Raises:
            UsageError: another process is at work on it.
        """

        def refuse() -> None:
            raise UsageError(
                f"--save_dir: another run is at work on {folder}; wait for its end, or give another --save_dir"
            )

        run = cls(folder)
        with locked(folder.with_name(f".{folder.name}.lock"), refuse):
            try:
                run._recover()
                run.work.mkdir(exist_ok=True)
                try:
                    yield run
                finally:
                    if run._progress:
                        run._progress.close()
            except KeyboardInterrupt as stopped:
                if finished := run._finished():
                    stopped.add_note(f"the same command goes on after {finished}")
                raise
            finally:
                if not run._journal.path.exists():
                    shutil.rmtree(run.work, ignore_errors=True)

    def _finished(self) -> str:
        """How far the run is, in words; empty while there is nothing to go on with."""
        number = self._journal.facts.get("pruned", 0)
        of = f" of {self._progress.shards.layers}" if self._progress else ""  # not known before `begin`
        return f"{number}{of} layers" if number else ""

    def _recover(self) -> None:
        """Bring to an end what `publish` was killed in."""
        if self._replaced.exists() and not self.folder.exists():
            self._replaced.replace(self.folder)
        shutil.rmtree(self._replaced, ignore_errors=True)

    @property
    def written_bytes(self) -> int:
        """What the unfinished run has written already."""
        return sum(path.stat().st_size for path in self.work.rglob("*.safetensors"))

    @property
    def is_published(self) -> bool:
        """Whether an earlier run put the checkpoint in its place and was killed before it could tidy up."""
        try:
            facts = self._journal.read()
        except UsageError:
            return False
        return facts.get("publishing", False) and not self.checkpoint.exists() and self.folder.exists()

    def begin(
        self,
        identity: dict,
        overwrite: bool,
        shards: Shards,
        batch_size: BatchSize,
        in_background: bool = False,
    ) -> RunProgress:
        """Go on with the unfinished run that lies here, or start a new one; returns the progress in it.

        Args:
            identity: what decides the result: names, in words for messages, and plain values.
            overwrite: start afresh, unless the unfinished run was started so too and is the same.
            shards: in which files the weights are kept meanwhile.
            batch_size: what is left of it when the unfinished run ran out of memory.
            in_background: write a layer while the next is worked on.

        Raises:
            UsageError: the unfinished run is another one, or its files are not as they were written.
        """
        self._progress = RunProgress(self._journal, shards, batch_size, in_background)
        identity = json.loads(json.dumps(identity))
        if self.is_published and self._ends_here(identity, overwrite):
            return self._progress
        if not self._goes_on(identity, overwrite, batch_size):
            self._journal.path.unlink(missing_ok=True)
            self._journal.forget()
            self._journal.facts = {
                "identity": identity,
                "overwrite": overwrite,
                "went_on_after": [],
                "batch_size": batch_size.size,
                "began_with": batch_size.size,
                "pruned": 0,
                "hidden": None,
                "entered": 0,
            }
        self.checkpoint.mkdir(exist_ok=True)
        force_to_disk(self.work.parent)
        self._journal.remove_others([self.checkpoint])
        return self._progress

    def _ends_here(self, identity: dict, overwrite: bool) -> bool:
        """Whether the run that is published is this one; otherwise it is out of the way."""
        published = self._journal.facts
        self.is_complete = (published["identity"], published["overwrite"]) == (identity, overwrite)
        self.tidy()
        if not (self.is_complete or overwrite):
            raise UsageError(f"--save_dir: another run finished {self.folder}; give --overwrite to replace it")
        if not self.is_complete:
            self.work.mkdir()
        return self.is_complete

    def _goes_on(self, identity: dict, overwrite: bool, batch_size: BatchSize) -> bool:
        """Whether there is an unfinished run to go on with; then the journal and the batch size are those of it."""
        try:
            facts = self._journal.read()
            if not facts.get("pruned") or (overwrite and not facts["overwrite"]):
                return False
            self._check_identity(facts["identity"], identity)
            self._journal.check_files()
        except UsageError:
            if not overwrite:
                raise
            return False
        batch_size.size = facts["batch_size"]
        facts["went_on_after"].append(facts["pruned"])
        return True

    def _check_identity(self, before: dict, now: dict) -> None:
        for name in before | now:
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"--save_dir: the unfinished run for {self.folder} was started with another {name} "
                    f"({before.get(name)}, now {now.get(name)}); go on as it was started, or give --overwrite to start "
                    "afresh"
                )

    @property
    def began_with(self) -> int:
        """The batch size that the run began with."""
        return self._journal.facts["began_with"]

    def bind(self, plan: str) -> None:
        """Have the journal say of which plan, a digest, the layers are cut that are kept from now on.

        Raises:
            UsageError: the layers that are finished were cut by another one: the survey was made anew, and differently.
        """
        before = self._journal.facts.setdefault("plan", plan)
        if before != plan:
            raise UsageError(
                f"--save_dir: the survey by which the unfinished run for {self.folder} began is gone, and another one "
                "gives other sizes or bases; give --overwrite to start afresh"
            )

    @property
    def interruptions(self) -> list[int]:
        """How many layers were finished when the run went on, for every time that it then finished something."""
        return self._journal.facts["went_on_after"]

    def in_words(self) -> AbstractContextManager:
        """Have files that cannot be written end in a UsageError."""
        return writing_in_words(self.work)

    def publish(self) -> None:
        """Put the complete checkpoint in its place.

        What was there is put aside until then, so that there is always a checkpoint that is whole.
        """
        self._journal.commit({"publishing": True})
        with self.in_words():
            if self.folder.exists():
                self.folder.replace(self._replaced)
            try:
                move_durably(self.checkpoint, self.folder)
            except BaseException:
                self._recover()
                raise
        self.tidy()

    def tidy(self) -> None:
        """Remove all but the checkpoint in its place; until the end the journal says that it is there."""
        shutil.rmtree(self._replaced, ignore_errors=True)
        for path in self.work.iterdir():
            if path != self._journal.path:
                path.unlink()
        shutil.rmtree(self.work, ignore_errors=True)
