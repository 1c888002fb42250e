"""A command line that prunes the tiny model in the current folder (fixture `here`), for the tests that disturb it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from called import call

import model_pruning
from olica.methods.recipes import RECIPES
from olica.outputs.run_progress import RunProgress

LAYERS = 6
PLAIN_FLAGS = ["--base_model=tiny", "--datasets=ids.safetensors", "--save_dir=out"]
FLAGS = [*PLAIN_FLAGS, "--mlp_num=2", "--ratio=0.1"]
FOLDER, WORK = Path("out/tiny_sparsity-0.2"), Path("out/.tiny_sparsity-0.2.partial")


class Killed(BaseException):
    """Stands for a signal that no code handles."""


@contextmanager
def killed_at(layer: int, of: str = "") -> Iterator[None]:
    """What is run within dies before it keeps this layer; of several checkpoints, that whose name ends in `of`."""
    save = RunProgress._save_layer

    def dying(self, index, *arguments):
        if index == layer and self._journal.path.parent.name.endswith(f"{of}.partial"):
            raise Killed
        save(self, index, *arguments)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(RunProgress, "_save_layer", dying)
        yield


def bare(*arguments: str) -> int:
    return call(model_pruning, *arguments)


def prune(*arguments: str) -> int:
    return bare(*FLAGS, *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the record, which has the time in it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "olica_run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def journal(part: str = "facts") -> dict:
    """The facts in the journal of the unfinished run, whatever its recipe, or its files."""
    (path,) = Path("out").glob(".*.partial/progress.json")
    return json.loads(path.read_text())[part]


@cache
def checkpoint_of(recipe: str) -> dict[str, bytes]:
    """What the checkpoint of a run of `here` that nobody disturbs holds: the same in every test."""
    assert bare(*flags_of(recipe)) == 0
    expected = contents(folder_of(recipe))
    for folder in ("out", "data"):  # the one of surveys, which not every recipe makes
        shutil.rmtree(folder, ignore_errors=True)
    return expected


def folder_of(recipe: str) -> Path:
    return FOLDER if recipe == "olica" else FOLDER.with_name(f"{FOLDER.name}_{recipe}")


def flags_of(recipe: str) -> list[str]:
    has_corrections = "mlp_num" in RECIPES[recipe].parameter_names
    return [*(FLAGS if has_corrections else PLAIN_FLAGS), f"--recipe={recipe}"]


SPARSER = FOLDER.with_name("tiny_sparsity-0.3")
BOTH = "--sparsity=0.2,0.3"


@cache
def sparser_checkpoint() -> dict[str, bytes]:
    """What the checkpoint of a run of `here` to a sparsity of 0.3 holds."""
    prune("--sparsity=0.3")
    expected = contents(SPARSER)
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    return expected
