"""What is finished of a pruning, on disk: a run that was killed goes on where it was.

Until the checkpoint's folder NAME is complete, `.NAME.partial` lies beside it:

    checkpoint/        the checkpoint so far, one shard for every finished layer
    *.safetensors      the survey, and hidden states that enter one of the next layers
    progress.json      the journal: what is being done, how far it is, and the checksum of every finished file

and, while a process is at work, the lock `.NAME.lock`.

Hidden states are the bulk of what is written, and the finished layers tell them: they are kept every SAVED_EVERY
seconds only, and a run that goes on sends them through the layers that were finished since.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from time import monotonic

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UsageError
from ..machine import BatchSize
from ..pruning.progress import Progress
from .journal import Journal, force_to_disk, move_durably, writing_in_words

CHECKPOINT = "checkpoint"
SAVED_EVERY = 20.0


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
        self.is_complete = False
        self._replaced = folder.with_name(f".{folder.name}.old")
        self._journal = Journal(self.work / "progress.json")
        self._batch_size = BatchSize(1)
        self._shards = self._prefix = None
        self._in_background = False
        self._saved_at = 0.0
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
            try:
                yield run
            finally:
                run._writer.shutdown()
        except KeyboardInterrupt as stopped:
            if finished := run._finished():
                stopped.add_note(f"the same command goes on after {finished}")
            raise
        finally:
            if not run._journal.path.exists():
                shutil.rmtree(run.work, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices; nothing is touched after this
            lock.release()
            with suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()

    def _finished(self) -> str:
        """How far the run is, in words; empty while there is nothing to go on with."""
        facts = self._journal.facts
        surveyed, pruned = facts.get("surveyed", {}).get("layers", 0), facts.get("pruned", 0)
        number, what = (pruned, "") if pruned else (surveyed, " of the survey")
        of = f" of {self._shards - 2}" if self._shards else ""  # not known before `begin`
        return f"{number}{of} layers{what}" if number else ""

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
        prefix: str,
        layers: int,
        batch_size: BatchSize,
        in_background: bool = False,
    ) -> None:
        """Go on with the unfinished run that lies here, or start a new one.

        Args:
            identity: what decides the result: names, in words for messages, and plain values.
            overwrite: start afresh, unless the unfinished run was started so too and is the same.
            prefix: of the names of the decoder layers' weights, their index follows.
            layers: number of decoder layers.
            batch_size: what is left of it when the unfinished run ran out of memory.
            in_background: write a layer while the next is worked on.

        Raises:
            UsageError: the unfinished run is another one, or its files are not as they were written.
        """
        self._prefix, self._shards, self._batch_size = prefix, layers + 2, batch_size
        self._in_background = in_background
        self._saved_at = monotonic()
        identity = json.loads(json.dumps(identity))
        if self.is_published and self._ends_here(identity, overwrite):
            return
        if not self._goes_on(identity, overwrite):
            self._journal.path.unlink(missing_ok=True)
            self._journal.forget()
            self._journal.facts = {
                "identity": identity,
                "overwrite": overwrite,
                "went_on_after": [],
                "batch_size": batch_size.size,
                "pruned": 0,
                "hidden": None,
                "entered": 0,
            }
        self.checkpoint.mkdir(exist_ok=True)
        force_to_disk(self.work.parent)
        self._journal.remove_others([self.checkpoint])

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

    def _goes_on(self, identity: dict, overwrite: bool) -> bool:
        """Whether there is an unfinished run to go on with, now told so."""
        try:
            facts = self._journal.read()
            nothing_finished = "survey" not in facts and not facts.get("pruned")
            if nothing_finished or (overwrite and not facts["overwrite"]):
                return False
            self._check_identity(facts["identity"], identity)
            self._journal.check_files()
        except UsageError:
            if not overwrite:
                raise
            return False
        self._batch_size.size = facts["batch_size"]
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
    def interruptions(self) -> list[int]:
        """How many layers were finished when the run went on, for every time that it then finished something."""
        return self._journal.facts["went_on_after"]

    def survey(self) -> tuple[dict, dict[str, Tensor], Tensor | None]:
        """See `Progress`."""
        facts = self._journal.facts
        if "survey" not in facts:
            return {}, {}, None
        hidden = None if facts["pruned"] else self._hidden()
        return facts["surveyed"], load_file(self.work / facts["survey"]), hidden

    def save_survey(self, facts: dict, tensors: dict[str, Tensor], hidden: Tensor | None) -> None:
        """See `Progress`."""
        if hidden is not None and not self._is_time():
            return
        survey = f"survey-{facts['layers']}.safetensors"
        self._journal.write(survey, tensors)
        states = self._kept("surveyed", facts["layers"], hidden)
        self._commit(survey=survey, surveyed=facts, batch_size=self._batch_size.size, **states)

    def pruned(self) -> tuple[int, int, Tensor | None]:
        """See `Progress`."""
        facts = self._journal.facts
        return facts["pruned"], facts["entered"], self._hidden()

    def weights(self, index: int) -> dict[str, Tensor]:
        """See `Progress`."""
        prefix = f"{self._prefix}{index}."
        return {name.removeprefix(prefix): weight for name, weight in _read(self.work / self._shard(index + 2)).items()}

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """See `Progress`; hidden states are written when it returns, the layer may be written later."""
        self.wait()
        # Copies of what is on a device, whose memory the next layer needs.
        weights = {f"{self._prefix}{index}.{name}": weight.cpu() for name, weight in layer.state_dict().items()}
        size, states = self._batch_size.size, {}
        # A batch that became smaller on the way to them changes the rounding: then they cannot be told any more.
        if hidden is None or size != self._journal.facts["batch_size"] or self._is_time():
            states = self._kept("pruned", index + 1, hidden)
        self._writing = self._writer.submit(self._save_layer, index, weights, {"batch_size": size} | states)
        if states or not self._in_background:
            self.wait()

    def _save_layer(self, index: int, weights: dict[str, Tensor], facts: dict) -> None:
        self.save_shard(index + 2, weights)
        self._commit(pruned=index + 1, **facts)

    def wait(self) -> None:
        """See `Progress`.

        Raises:
            UsageError: what was to be kept cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _is_time(self) -> bool:
        """Whether hidden states were kept so long ago that they should be again."""
        return monotonic() - self._saved_at > SAVED_EVERY

    def save_shard(self, number: int, weights: dict[str, Tensor]) -> None:
        """Write shard `number` of the checkpoint: the decoder layers' begin with 2.

        Raises:
            UsageError: it cannot be written.
        """
        self._journal.write(self._shard(number), weights)

    def _shard(self, number: int) -> str:
        return f"{CHECKPOINT}/model-{number:05}-of-{self._shards:05}.safetensors"

    def _hidden(self) -> Tensor | None:
        name = self._journal.facts["hidden"]
        return _read(self.work / name)["hidden"] if name else None

    def _kept(self, done: str, layers: int, hidden: Tensor | None) -> dict:
        """Write the hidden states that enter the layer behind so many; returns what the journal is to say of them."""
        if hidden is None:
            return {"hidden": None, "entered": 0}
        name = f"hidden-{done}-{layers}.safetensors"
        self._journal.write(name, {"hidden": hidden})
        self._saved_at = monotonic()
        return {"hidden": name, "entered": layers}

    def _commit(self, **facts) -> None:
        """Keep `facts`, and of the surveys and hidden states only the last ones."""
        before = self._journal.facts
        replaced = {before.get(name) for name in ("survey", "hidden") if name in facts and before.get(name)}
        self._journal.commit(facts, without=replaced - {facts.get("survey"), facts.get("hidden")})

    def explained(self) -> AbstractContextManager:
        """Tell the user of files that cannot be written."""
        return writing_in_words(self.work)

    def publish(self) -> None:
        """Put the complete checkpoint in its place.

        What was there is put aside until then, so that there is always a checkpoint that is whole.
        """
        self._journal.commit({"publishing": True})
        with self.explained():
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


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file: not mapped from it, since it may be removed, but in memory of their own, aligned as before."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
