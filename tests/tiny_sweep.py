"""Sweeps of a tiny model in the current folder."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

from called import call
from conftest import save_tiny

import model_sweep

ROWS_OF_TEXT, SAMPLES, HELD, TOKENS = 40, 6, 8, 24
TEXT_FLAGS = [f"--num_samples={SAMPLES}", f"--seqlen={TOKENS}"]
PLAIN_FLAGS = ["--base_model=tiny", "--datasets=text.jsonl", *TEXT_FLAGS, f"--held_back={HELD}", "--save_dir=out"]
FLAGS = [*PLAIN_FLAGS, "--mlp_num=1", "--ratio=0.1"]
FOLDER = Path("out/tiny_sweep")
SPARSITIES = "--sparsity=0.1:0.3:0.1"


def write_text(name: str, mark: str) -> None:
    """Rows that are known by any 24 of their characters, as tokens are bytes: `mark` and a number, again and again."""
    rows = [json.dumps({"text": f"{mark}{number:03d} " * 12}) for number in range(ROWS_OF_TEXT)]
    Path(name).write_text("\n".join(rows))


def fill_with_sweep() -> None:
    """Put a tiny model and a text into the current folder."""
    save_tiny("tiny", num_key_value_heads=2, initializer_range=0.1)
    write_text("text.jsonl", "a")


def bare(*arguments: str) -> int:
    return call(model_sweep, *arguments)


def sweep(*arguments: str) -> dict:
    """The record of a sweep that has to succeed."""
    assert bare(*FLAGS, *arguments) == 0
    return json.loads((FOLDER / "sweep.json").read_text())


def without_times(value):
    """A record without what says when, and how long."""
    if isinstance(value, dict):
        return {name: without_times(held) for name, held in value.items() if not re.search("date|seconds", name)}
    return [without_times(held) for held in value] if isinstance(value, list) else value


@cache
def swept() -> dict:
    """The record of a sweep that nobody disturbs, but for times: the same in every test."""
    record = without_times(sweep(SPARSITIES))
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    return record
