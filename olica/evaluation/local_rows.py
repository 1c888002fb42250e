"""Rows of the paper's tasks in local files, and the lm-eval tasks that read them in place of the hub."""

import glob
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LocalRows:
    """Where the rows of a task may lie in a data folder, and which lm-eval task file they are put through."""

    stock: str  # task file, relative to lm-eval's own folder of tasks
    stem: str  # file name without .jsonl or .jsonl.gz
    split: str  # the split that is scored, the only one in the file


LOCAL_ROWS = {
    "openbookqa": LocalRows("openbookqa/openbookqa.yaml", "openbookqa_main_test", "test"),
    "arc_easy": LocalRows("arc/arc_easy.yaml", "arc_easy_test", "test"),
    "arc_challenge": LocalRows("arc/arc_challenge.yaml", "arc_challenge_test", "test"),
    "winogrande": LocalRows("winogrande/default.yaml", "winogrande_xl_validation", "validation"),
    "hellaswag": LocalRows("hellaswag/hellaswag.yaml", "hellaswag_validation", "validation"),
    "piqa": LocalRows("piqa/piqa.yaml", "piqa_validation", "validation"),
    "boolq": LocalRows("super_glue/boolq/default.yaml", "boolq_validation", "validation"),
}


def local_rows(tasks: list[str], data_dir: str | Path) -> dict[str, str]:
    """sha256 of the local files of rows that `tasks` may read, by the names of the tasks."""
    if not tasks:
        return {}
    found = {name: find_rows(Path(data_dir), rows.stem) for name, rows in LOCAL_ROWS.items()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path}


def local_tasks(data_dir: str | Path, folder: str | Path) -> list[str]:
    """Write into `folder` a task file for each of the paper's tasks whose rows lie under `data_dir`.

    Looked for in `data_dir` and `data_dir`/eval: the stems of `LOCAL_ROWS` as .jsonl or .jsonl.gz. With
    `folder` as lm-eval's include path the files take the place of the stock tasks of the same names: they
    include the stock file, its prompts and metrics, and change only where the rows come from.
    Returns the names of the tasks.
    """
    found = {name: find_rows(Path(data_dir), local.stem) for name, local in LOCAL_ROWS.items()}
    names = [name for name, rows in found.items() if rows is not None]
    for name in names:
        task = _local_task(name, found[name], Path(folder) / "rows")
        # JSON is YAML.
        (Path(folder) / f"{name}.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")
    return names


def find_rows(data_dir: Path, stem: str) -> Path | None:
    """The first file of this stem in `data_dir` or its folder eval, plain before gzipped; None without."""
    candidates = (
        folder / f"{stem}{suffix}" for folder in (data_dir, data_dir / "eval") for suffix in (".jsonl", ".jsonl.gz")
    )
    return next((path for path in candidates if path.is_file()), None)


def _local_task(name: str, rows: Path, cache: Path) -> dict:
    """The task file that puts the local `rows` through lm-eval's stock task `name`."""
    from lm_eval import tasks

    local = LOCAL_ROWS[name]
    return {
        "include": str(Path(tasks.__file__).parent / local.stock),
        "task": name,
        # A tag named here would stand for the local tasks alone, and hide the stock tag's other tasks.
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        # The cache goes with the temporary folder, and no edited file is answered from an old one.
        "dataset_kwargs": {"data_files": {local.split: glob.escape(str(rows.resolve()))}, "cache_dir": str(cache)},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{local.split}_split": local.split,
    }
