"""Surveys on disk: one that was stopped goes on, one that is finished serves every later run that would make the same.

A folder `surveys/DIGEST` holds one, whose name is a digest of all that decides it:

    findings-*.safetensors   what was found of so many layers
    states-*.safetensors     hidden states that enter the next layer, while it is unfinished
    survey.json              the journal

While a process is at work on it others wait for the lock `DIGEST.lock` beside it.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError
from ..machine import BatchSize
from ..pruning.progress import Surveyed, SurveyProgress
from . import run_progress
from .identity import CODE, digest_of
from .journal import Journal
from .locks import locked
from .run_progress import read_tensors

logger = logging.getLogger(__name__)

FOLDER, FLAG = "surveys", "--data_dir"


class StoredSurvey(SurveyProgress):
    """A survey in a folder; made by `locked`.

    Attributes:
        digest: the folder's name.
        code: the version of the code that makes it.
    """

    def __init__(self, folder: Path, code: str | None, batch_size: BatchSize):
        """See `locked`."""
        self.digest, self.code = folder.name, code
        self._batch_size, self._saved_at, self._begun = batch_size, monotonic(), monotonic()
        self._is_kept = True
        self._journal = Journal(folder / "survey.json", FLAG)
        try:
            self._journal.read()
            self._journal.check_files()
        except UsageError as error:
            logger.warning("the survey is made anew: %s", error)
            self._journal.forget()
        facts = self._journal.facts
        self.layers_before, self.is_complete = facts.get("layers", 0), facts.get("is_complete", False)
        self._seconds_before = facts.get("seconds", 0.0)
        if facts:
            batch_size.size = min(batch_size.size, facts["batch_size"])
        self._journal.remove_others([])

    @classmethod
    @contextmanager
    def locked(cls, data_dir: Path, identity: dict, batch_size: BatchSize) -> Iterator["StoredSurvey"]:
        """The survey that `identity` decides, alone.

        Args:
            data_dir: where surveys are kept.
            identity: what decides it, plain values by name.
            batch_size: becomes what was left of it, where a run that made it ran out of memory.

        Raises:
            OSError: nothing can be written there.
        """
        folder = data_dir / FOLDER / digest_of(identity)[:24]
        folder.mkdir(parents=True, exist_ok=True)
        survey = None
        with locked(
            folder.with_suffix(".lock"),
            lambda: logger.warning("another run is making the same survey: waiting for its end"),
        ):
            try:
                survey = cls(folder, identity.get(CODE), batch_size)
                _remove_unfinished(folder, survey.code)
                yield survey
            except KeyboardInterrupt as stopped:
                if survey and (layers := survey._journal.facts.get("layers")) and not survey.is_complete:
                    stopped.add_note(f"the same command goes on after {layers} layers of the survey")
                raise

    def described(self) -> dict:
        """See `SurveyProgress`."""
        return {
            "digest": self.digest,
            "layers_taken_up": self.layers_before,
            "seconds": self._journal.facts.get("seconds"),  # of all runs that had a part in it
        }

    def surveyed(self) -> Surveyed:
        """See `SurveyProgress`."""
        facts = self._journal.facts
        if not facts:
            return Surveyed()
        findings: list[dict[str, Tensor]] = [{} for _ in range(facts["layers"])]
        for name, tensor in load_file(self._path(facts["findings"])).items():
            index, _, finding = name.partition(".")
            findings[int(index)][finding] = tensor.clone()
        states = read_tensors(self._path(facts["states"])) if facts["states"] else {}
        hidden = states.pop("hidden", None)
        travelling = {tuple(map(int, name.split("."))): state for name, state in states.items()}
        return Surveyed(findings, hidden, travelling)

    def is_due(self) -> bool:
        """See `SurveyProgress`."""
        return monotonic() - self._saved_at > run_progress.SAVED_EVERY

    def save(self, surveyed: Surveyed) -> None:
        """See `SurveyProgress`."""
        self._keep(surveyed, is_complete=False)
        self._saved_at = monotonic()

    def finish(self, findings: list[dict[str, Tensor]]) -> None:
        """See `SurveyProgress`."""
        self._keep(Surveyed(findings), is_complete=True)
        self.is_complete = True

    def _keep(self, surveyed: Surveyed, is_complete: bool) -> None:
        """Write how far the survey is; a disk that is full is no reason to end a run, which has it in memory."""
        if not self._is_kept:
            return
        try:
            self._write(surveyed, is_complete)
        except UsageError as error:
            self._is_kept = False
            logger.warning("the survey is kept no further: %s", error)

    def _write(self, surveyed: Surveyed, is_complete: bool) -> None:
        layers, before = len(surveyed.findings), self._journal.facts
        states: dict[str, Tensor] = {} if surveyed.hidden is None else {"hidden": surveyed.hidden}
        states |= {f"{layer}.{number}": state for (layer, number), state in surveyed.travelling.items()}
        names = {"findings": f"findings-{layers}{'-all' if is_complete else ''}.safetensors", "states": None}
        # Copies: a file holds no tensor twice, and layers may share what was found.
        layers_found = enumerate(surveyed.findings)
        found = {f"{i}.{name}": tensor.clone() for i, found in layers_found for name, tensor in found.items()}
        self._journal.write(names["findings"], found)
        if states:
            names["states"] = f"states-{layers}.safetensors"
            self._journal.write(names["states"], states)
        replaced = {before.get("findings"), before.get("states")} - {None, *names.values()}
        facts = {"layers": layers, "batch_size": self._batch_size.size, "is_complete": is_complete, **names}
        facts |= {"code": self.code, "seconds": self._seconds_before + monotonic() - self._begun}
        self._journal.commit(facts, without=replaced)

    def _path(self, name: str) -> Path:
        return self._journal.path.parent / name


def _remove_unfinished(folder: Path, code: str | None) -> None:
    """Remove the other surveys that nobody can go on with: unfinished ones of another version of the code."""
    for other in folder.parent.iterdir():
        journal = Journal(other / "survey.json", FLAG)
        if other == folder or not other.is_dir():
            continue
        lock = FileLock(other.with_suffix(".lock"))
        with suppress(Timeout, UsageError), lock.acquire(blocking=False):
            facts = journal.read()
            # Without facts it may be one that another process is just beginning.
            if facts and not facts.get("is_complete") and facts.get("code") != code:
                shutil.rmtree(other)
            Path(lock.lock_file).unlink(missing_ok=True)
