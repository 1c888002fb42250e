"""A command line that prunes the tiny model in the current folder (fixture `here`), for the tests that disturb it."""

import json
from pathlib import Path

import model_pruning
from olica.command_line import run_command

LAYERS = 6
PLAIN_FLAGS = ["--base_model=tiny", "--datasets=ids.safetensors", "--save_dir=out"]
FLAGS = [*PLAIN_FLAGS, "--mlp_num=2", "--ratio=0.1"]
FOLDER, WORK = Path("out/tiny_sparsity-0.2"), Path("out/.tiny_sparsity-0.2.partial")


def bare(*arguments: str) -> int:
    return run_command(model_pruning.build_parser(), model_pruning.run, [*arguments])


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
