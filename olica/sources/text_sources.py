"""Where text comes from: a table of named sources, local files and folders, and the text inside CPython.

A row is prose (one text) or a prompt (instruction, input, output); its columns tell which.
Splits: "train" is what calibrates, "test" is what measures.
"""

import errno
import glob
import gzip
import hashlib
import json
import logging
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import datasets
from pyarrow import parquet

from ..errors import UsageError
from .model_files import refuse_pointers
from .pydoc_text import pydoc_passages

logger = logging.getLogger(__name__)

PYDOC = "pydoc"

# What no text is to blame for whose file has been opened before.
CACHE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
# All columns that are ever read: of prose, and of prompts.
COLUMNS = ("text", "sentence", "instruction", "input", "output")

_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
# A file named after one split must not match the wildcard of the other.
_OTHER_SPLIT_WORDS = {"train": {"test", "validation", "valid", "eval", "dev"}, "test": {"train"}}
# What to look for in a saved DatasetDict that is given by its path.
_SAVED_SPLITS = {"train": ("train",), "test": ("test", "validation")}


@dataclass(frozen=True)
class Source:
    """A row of `SOURCES`; its mappings are keyed by "train" and "test", and a split they lack is not served.

    `local` has patterns for the name, without suffix, of a file or folder under `data_dir`; they are tried in
    order, before the hub. `hub` is what `datasets.load_dataset` gets besides the split; `splits` and `files`
    are named as there. `row_of_line` makes a row of each line of a local .txt, whose rows are otherwise the
    paragraphs between empty lines.
    """

    local: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hub: dict[str, str] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    row_of_line: Callable[[str], str] | None = None


# datasets runs no loading scripts: where a repository is one, the hub's conversion of it is read.
_CONVERTED = "refs/convert/parquet"

SOURCES = {
    "bookcorpus": Source(
        local={"train": ("bookcorpus", "bookcorpus_*")},
        hub={"path": "bookcorpus/bookcorpus", "revision": _CONVERTED},
        splits={"train": "train"},
    ),
    "alpaca": Source(
        local={"train": ("alpaca", "alpaca_*")},
        hub={"path": "tatsu-lab/alpaca"},
        splits={"train": "train"},
    ),
    "c4": Source(
        local={"train": ("c4", "c4_*train*"), "test": ("c4_validation", "c4_*validation*")},
        hub={"path": "allenai/c4"},
        splits={"train": "train", "test": "validation"},
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "wikitext2": Source(
        local={"train": ("wikitext2", "wikitext2_*train*"), "test": ("wikitext2_test", "wikitext2_raw_test")},
        hub={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        splits={"train": "train", "test": "test"},
        # The plain file writes a blank row as " \n", the data set as ""; other rows keep their newline.
        row_of_line=lambda line: line if line.strip() else "",
    ),
    "ptb": Source(
        local={"train": ("ptb_train", "ptb"), "test": ("ptb_test",)},
        hub={"path": "ptb-text-only/ptb_text_only", "revision": _CONVERTED},
        splits={"train": "train", "test": "test"},
        # The plain file begins and ends every sentence with a space; the data set does not.
        row_of_line=str.strip,
    ),
    PYDOC: Source(splits={"train": "train", "test": "test"}),
}


@dataclass(frozen=True)
class Rows:
    """The rows of one split, a row with an instruction being a prompt and any other prose.

    `text_field` is the column of the prose, if there is one; `has_prompts` tells whether any row is a prompt.

    `origin` is for the record; `fingerprint` follows the content.
    """

    name: str
    origin: str
    fingerprint: str
    table: datasets.Dataset
    text_field: str | None
    has_prompts: bool


def read_rows(source: str, split: str, data_dir: Path | None, *, flag: str = "--datasets") -> Rows:
    """Rows of `split` ("train" or "test") of a source in `SOURCES`, or of the file or folder at that path.

    Raises UsageError, naming `flag` or the file, where the source is unknown, lacks the split, cannot be
    read, or holds neither prose nor prompts.
    """
    if source == PYDOC:
        return _pydoc_rows(split, flag)
    if source in SOURCES:
        return _named_rows(source, split, data_dir, flag)
    path = Path(source)
    if not path.exists():
        known = ", ".join(SOURCES)
        raise UsageError(f"{flag} names {source!r}, which is neither an existing path nor one of {known}")
    return _path_rows(source, path, _SAVED_SPLITS[split], None)


def evaluation_text(source: str, data_dir: Path | None, *, flag: str = "--datasets") -> tuple[str, str]:
    """The test rows of a source, blank ones included, joined with two newlines; and its origin.

    This is the text of the paper's perplexity. Raises UsageError as `read_rows` does, and for prompts.
    """
    rows = read_rows(source, "test", data_dir, flag=flag)
    if rows.has_prompts:
        raise UsageError(f"{flag} names {rows.origin}, which holds prompts: give prose, with a column text")
    return "\n\n".join(text or "" for text in rows.table[rows.text_field]), rows.origin


def _pydoc_rows(split: str, flag: str) -> Rows:
    """The topics and their text differ by version of Python, which the origin therefore names."""
    with _explained(f"{flag} names {PYDOC}, which this Python lacks", "give another source"):
        from pydoc_data.topics import topics
    passages = pydoc_passages(topics, split)
    fingerprint = hashlib.sha256("\0".join(passages).encode()).hexdigest()
    origin = f"CPython {platform.python_version()} pydoc_data.topics"
    return Rows(PYDOC, origin, fingerprint, datasets.Dataset.from_dict({"text": passages}), "text", False)


def _named_rows(name: str, split: str, data_dir: Path | None, flag: str) -> Rows:
    source = SOURCES[name]
    if split not in source.splits:
        served = ", ".join(known for known, row in SOURCES.items() if split in row.splits)
        raise UsageError(f"{flag} names {name}, which has no {split} split: give one of {served}, or a path")
    local = _local_copy(name, split, data_dir, flag) if data_dir else None
    if local:
        return _path_rows(name, local, (source.splits[split],), source.row_of_line)
    hub_split, files = source.splits[split], source.files.get(split)
    remedy = f"put a local copy, {source.local[split][0]}.jsonl, into the folder --data_dir {data_dir or ''}"
    with _explained(f"{flag} {name} cannot be read from the hub", remedy.rstrip()):
        data_files = {hub_split: files} if files else None
        table = datasets.load_dataset(**source.hub, data_files=data_files, split=hub_split)
    place = f"{source.hub['path']}@{source.hub.get('revision', 'main')}"
    origin = " ".join(filter(None, [place, source.hub.get("name"), files, hub_split]))
    return _rows(name, origin, table._fingerprint, table)


def _local_copy(name: str, split: str, data_dir: Path, flag: str) -> Path | None:
    """The file or folder under `data_dir`, which need not exist, that serves the split, if there is one."""
    if not data_dir.is_dir():
        return None
    saved_split = SOURCES[name].splits[split]
    if (data_dir / name / saved_split).is_dir():
        return data_dir / name  # a saved DatasetDict holds all its splits under the bare name
    candidates = [path for path in sorted(data_dir.iterdir()) if _serves(path, split, saved_split)]
    for pattern in SOURCES[name].local[split]:
        found = [path for path in candidates if fnmatchcase(_stem(path), pattern)]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise UsageError(f"{data_dir} holds {names}, which are all {name}: give {flag} the path of one")
        if found:
            return found[0]
    return None


def _serves(path: Path, split: str, saved_split: str) -> bool:
    """Whether a file or saved folder can be read and is not named after the other split."""
    if set(re.split(r"[^a-z0-9]+", _stem(path).lower())) & _OTHER_SPLIT_WORDS[split]:
        return False
    if path.is_dir():
        return (path / "state.json").is_file() or (path / saved_split).is_dir()
    return _format(path) is not None


def _format(path: Path) -> str | None:
    """What datasets calls the kind of a file, None for an unknown one."""
    return _FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem


def _path_rows(name: str, path: Path, saved_splits: tuple[str, ...], row_of_line: Callable | None) -> Rows:
    """Rows of a file, or of the first of `saved_splits` in a saved folder, falling back to its only split."""
    if path.is_dir():
        path, table = _load_folder(path, saved_splits)
        fingerprint = table._fingerprint
    else:
        fingerprint, table = _load_file(path, row_of_line)
    if not len(table):
        raise UsageError(f"{path} holds no rows: give a file or folder with at least one")
    return _rows(name, str(path), fingerprint, table)


def _rows(name: str, origin: str, fingerprint: str, table: datasets.Dataset) -> Rows:
    """The rows of a table, without the columns that are never read, which may hold what cannot be decoded here."""
    prose, has_prompts = _columns(table, origin)
    table = table.select_columns([name for name in table.column_names if name in COLUMNS])
    return Rows(name, origin, fingerprint, table, prose, has_prompts)


def _load_folder(path: Path, saved_splits: tuple[str, ...]) -> tuple[Path, datasets.Dataset]:
    refuse_pointers(path.rglob("*.arrow"))
    with _explained(f"{path} cannot be read as a folder made by save_to_disk", "save it again", cached=False):
        saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        return path, saved
    split = next((split for split in saved_splits if split in saved), None)
    if split is None and len(saved) != 1:
        wanted, has = " or ".join(saved_splits), ", ".join(saved)
        raise UsageError(f"{path} has the splits {has} but not {wanted}: give the folder of one of them")
    split = split or next(iter(saved))
    return path / split, saved[split]


def _load_file(path: Path, row_of_line: Callable | None) -> tuple[str, datasets.Dataset]:
    """The sha256 of a file, which unlike a fingerprint of datasets follows the content alone; its rows."""
    kind = _format(path)
    if kind is None:
        raise UsageError(f"{path} is of an unknown kind: give .jsonl, .json, .txt, .gz of one, or .parquet")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty: give a file with at least one row")
    refuse_pointers([path])
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    # Named by content: the cache of datasets would serve old rows to a new file with the old time stamp.
    cached = {"config_name": fingerprint[:16], "cache_dir": _cache_dir()}
    with _explained(f"{path} cannot be read as {kind}", "give a complete file with some rows"), _quiet():
        # None is load_dataset, which tells the hub of every call and so waits for the network here too.
        if kind == "text":
            return fingerprint, _read_text(path, row_of_line, cached)
        return fingerprint, _read_json(path, cached) if kind == "json" else _read_parquet(path, cached)


def _pattern(path: Path) -> str:
    """The pattern for datasets, which takes every path for one, that only this path fits."""
    return glob.escape(str(path.absolute()))


def _read_text(path: Path, row_of_line: Callable | None, cached: dict) -> datasets.Dataset:
    options = {"sample_by": "line" if row_of_line else "paragraph", "keep_linebreaks": bool(row_of_line)}
    table = datasets.Dataset.from_text(_pattern(path), **options, **cached)
    if not row_of_line:
        return table
    return datasets.Dataset.from_dict({"text": [row_of_line(line) for line in table["text"]]})


def _read_parquet(path: Path, cached: dict) -> datasets.Dataset:
    """The columns that may be needed of a .parquet file; all of them if none is, for the message."""
    schema = parquet.read_schema(path)
    columns = [name for name in schema.names if name in COLUMNS] or schema.names
    if len(columns) < len(schema.names):
        needed = schema.empty_table().select(columns).schema
        cached = cached | {"columns": columns, "features": datasets.Features.from_arrow_schema(needed)}
    return datasets.Dataset.from_parquet(_pattern(path), **cached)


def _read_json(path: Path, cached: dict) -> datasets.Dataset:
    """The rows of a file of JSON, one a line or all in one list.

    datasets takes the kind of every column from the beginning of the file. Where a later row has something else, the
    columns that may be needed are read alone, which takes 20 times as long.
    """
    try:
        return datasets.Dataset.from_json(_pattern(path), **cached)
    except datasets.exceptions.DatasetGenerationError:
        table = datasets.Dataset.from_generator(
            _needed_columns,
            datasets.Features(dict.fromkeys(COLUMNS, datasets.Value("string"))),
            cache_dir=cached["cache_dir"],
            gen_kwargs={"path": path.absolute(), "content": cached["config_name"]},
        )
        held = [name for name in COLUMNS if table.data.column(name).null_count < len(table)]
        if not held:
            raise
        return table.select_columns(held)


def _needed_columns(path: Path, content: str) -> Iterator[dict[str, str | None]]:  # noqa: ARG001
    """The rows of a .jsonl file, gzipped or not, with all of `COLUMNS` and no other; `content` tells files apart."""
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg}") from error
            needed = {name: row.get(name) for name in COLUMNS}
            for name, value in needed.items():
                if not isinstance(value, str | None):
                    raise ValueError(f"line {number} has a {type(value).__name__} in the column {name}")
            yield needed


def _cache_dir() -> str:
    """Where datasets may put its copies of files: its cache, or, where that cannot be, a temporary folder."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _temporary_cache(str(error)).name
    return str(folder)


@cache
def _temporary_cache(reason: str) -> tempfile.TemporaryDirectory:
    """A folder that goes with this process; `reason` says why the cache of datasets cannot be written to."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="olica-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UsageError(
            f"the cache of datasets (HF_DATASETS_CACHE, HF_HOME) cannot be written to ({reason}), nor can a temporary "
            f"folder be made ({error}): name a folder for one of them"
        ) from error
    logger.warning("the cache of datasets (HF_DATASETS_CACHE, HF_HOME) is not used, since it cannot be: %s", reason)
    return folder


def _columns(table: datasets.Dataset, origin: str) -> tuple[str | None, bool]:
    """The column that holds prose, if there is one, and whether any row is a prompt."""
    columns = table.column_names
    prose = next((name for name in ("text", "sentence") if name in columns), None)
    has_prompts = {"instruction", "output"} <= set(columns) and any(table["instruction"])
    if not has_prompts and not prose:
        raise UsageError(
            f"{origin} has the columns {', '.join(columns)}: "
            "prose needs a column text or sentence, prompts need instruction and output"
        )
    for name in filter(None, [*(("instruction", "output") if has_prompts else ()), prose]):
        kind = getattr(table.features[name], "dtype", "list")
        if kind not in ("string", "large_string"):
            raise UsageError(f"{origin} has a column {name} of {kind}: make it one string a row")
    return prose, has_prompts


@contextmanager
def _explained(what: str, remedy: str, cached: bool = True) -> Iterator[None]:
    """Turn any failure inside into a UsageError: datasets, pyarrow, gzip and the hub share no exception.

    `cached` says that a copy is kept in a cache, which may be what is at fault.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # where datasets keeps the telling message
        if cached and getattr(cause, "errno", None) in CACHE_ERRORS:
            remedy = "a cache cannot be written to; name a folder with room for it by HF_HOME or HF_DATASETS_CACHE"
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UsageError(f"{what} ({reason}): {remedy}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no message beside the UsageError, while datasets reads a local file."""
    verbosity = datasets.logging.get_verbosity()
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shows_bars:
            datasets.enable_progress_bars()
