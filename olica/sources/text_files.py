"""Text files and folders as rows: what is read of .jsonl, .json, .txt and .parquet, and of what save_to_disk made.

A row is prose (one text), a prompt (instruction, input, output) or a chat (messages); its columns say which.
"""

import errno
import glob
import gzip
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
from pyarrow import parquet, types

from ..checks import refuse_pointers
from ..errors import UsageError, in_words, reason
from .chats import CHAT_COLUMNS, chat_column

logger = logging.getLogger(__name__)

# What no text is to blame for whose file has been opened before.
CACHE_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
CACHE_REMEDY = "a cache cannot be written to; name a folder with room for it by HF_HOME or HF_DATASETS_CACHE"
# All columns of text that are ever read: of prose, and of prompts. Those of chats are `CHAT_COLUMNS`.
COLUMNS = ("text", "sentence", "instruction", "input", "output")

_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class Rows:
    """The rows of one split: one with messages is a chat, another with an instruction a prompt, and any other prose.

    `text_field` is the column of the prose, if there is one, and `chat_field` that of the chats; `has_prompts` says
    whether any row is a prompt.

    `origin` is for the record; `fingerprint` follows the content.
    """

    name: str
    origin: str
    fingerprint: str
    table: datasets.Dataset
    text_field: str | None
    has_prompts: bool
    chat_field: str | None = None


def rows_at(name: str, path: Path, saved_splits: tuple[str, ...], row_of_line: Callable | None) -> Rows:
    """Rows of a file, or of the first of `saved_splits` in a saved folder, falling back to its only split."""
    if path.is_dir():
        path, table = _load_folder(path, saved_splits)
        fingerprint = table._fingerprint
    else:
        fingerprint, table = _load_file(path, row_of_line)
    if not len(table):
        raise UsageError(f"{path} holds no rows: give a file or folder with at least one")
    return rows_of(name, str(path), fingerprint, table)


def rows_of(name: str, origin: str, fingerprint: str, table: datasets.Dataset) -> Rows:
    """The rows of a table, without the columns that are never read, which may hold what cannot be decoded here."""
    chats = chat_column(table)
    prose, has_prompts = _columns(table, origin, chats)
    table = table.select_columns([name for name in table.column_names if name in (*COLUMNS, chats)])
    return Rows(name, origin, fingerprint, table, prose, has_prompts, chats)


def _load_folder(path: Path, saved_splits: tuple[str, ...]) -> tuple[Path, datasets.Dataset]:
    refuse_pointers(path.rglob("*.arrow"))
    with reading(f"{path} cannot be read as a folder made by save_to_disk", "save it again", cached=False):
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
    kind = format_of(path)
    if kind is None:
        raise UsageError(f"{path} is of an unknown kind: give .jsonl, .json, .txt, .gz of one, or .parquet")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty: give a file with at least one row")
    refuse_pointers([path])
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    # Named by content: the cache of datasets would serve old rows to a new file with the old time stamp.
    cached = {"config_name": fingerprint[:16], "cache_dir": _cache_dir()}
    with reading(f"{path} cannot be read as {kind}", "give a complete file with some rows"), _quiet():
        # None is load_dataset, which reports every call to the hub and so waits for the network here too.
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
    lists = {field.name for field in schema if types.is_list(field.type) or types.is_large_list(field.type)}
    needed = {*COLUMNS, *(lists & {*CHAT_COLUMNS})}
    columns = [name for name in schema.names if name in needed] or schema.names
    if len(columns) < len(schema.names):
        features = datasets.Features.from_arrow_schema(schema.empty_table().select(columns).schema)
        cached = cached | {"columns": columns, "features": features}
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
            datasets.Features(
                dict.fromkeys(COLUMNS, datasets.Value("string"))
                | dict.fromkeys(CHAT_COLUMNS, datasets.List(datasets.Json()))
            ),
            cache_dir=cached["cache_dir"],
            gen_kwargs={"path": path.absolute(), "content": cached["config_name"]},
        )
        held = [name for name in table.column_names if table.data.column(name).null_count < len(table)]
        if not held:
            raise
        return table.select_columns(held)


def _needed_columns(path: Path, content: str) -> Iterator[dict[str, str | list | None]]:  # noqa: ARG001
    """The rows of a .jsonl file, gzipped or not, of `COLUMNS` and `CHAT_COLUMNS` alone; `content` keeps files apart."""
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
            chats = {name: row.get(name) for name in CHAT_COLUMNS}
            yield needed | {name: value if isinstance(value, list) else None for name, value in chats.items()}


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


def _columns(table: datasets.Dataset, origin: str, chats: str | None) -> tuple[str | None, bool]:
    """The column that holds prose, if there is one, and whether any row is a prompt; `chats` is the column of those."""
    columns = table.column_names
    prose = next((name for name in ("text", "sentence") if name in columns), None)
    has_prompts = {"instruction", "output"} <= set(columns) and any(table["instruction"])
    if not has_prompts and not prose and not chats:
        raise UsageError(
            f"{origin} has the columns {', '.join(columns)}: prose needs a column text or sentence, prompts need "
            "instruction and output, chats need messages or conversations, each a list of role and content"
        )
    for name in filter(None, [*(("instruction", "output") if has_prompts else ()), prose]):
        kind = getattr(table.features[name], "dtype", "list")
        if kind not in ("string", "large_string"):
            raise UsageError(f"{origin} has a column {name} of {kind}: make it one string a row")
    return prose, has_prompts


def reading(what: str, remedy: str, cached: bool = True) -> AbstractContextManager[None]:
    """Turn any failure to read text into a UsageError: datasets, pyarrow, gzip and the hub share no exception.

    `cached` says that a copy is kept in a cache, which may be what is at fault.
    """

    def sentence(error: Exception) -> str:
        cause = error.__cause__ or error  # where datasets keeps the message that says most
        is_of_cache = cached and getattr(cause, "errno", None) in CACHE_ERRORS
        return f"{what} ({reason(cause)}): {CACHE_REMEDY if is_of_cache else remedy}"

    return in_words(sentence)


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


def format_of(path: Path) -> str | None:
    """What datasets calls the kind of a file, None for an unknown one."""
    return _FORMATS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
