"""Where text comes from: a table of named sources, local files and folders, and the text and code inside CPython.

A row is prose (one text), a prompt (instruction, input, output) or a chat (messages); its columns say which.
Splits: "train" is what calibrates, "test" is what measures.
"""

import hashlib
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import datasets

from ..errors import UsageError
from .text_files import Rows, format_of, reading, rows_at, rows_of

PYDOC, PYSOURCE = "pydoc", "pysource"
# Passages of CPython's help have so many characters or more. One in so many help topics, and one in as many modules of
# its library, is held back to measure on.
PASSAGE_CHARACTERS = 1000
HELD_BACK_EVERY = 5

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
    PYSOURCE: Source(splits={"train": "train", "test": "test"}),
}


def read_rows(source: str, split: str, data_dir: Path | None, *, flag: str = "--datasets") -> Rows:
    """Rows of `split` ("train" or "test") of a source in `SOURCES`, or of the file or folder at that path.

    Raises UsageError, naming `flag` or the file, where the source is unknown, lacks the split, cannot be
    read, or holds neither prose nor prompts nor chats.
    """
    if source == PYDOC:
        return _pydoc_rows(split, flag)
    if source == PYSOURCE:
        return _pysource_rows(split, flag)
    if source in SOURCES:
        return _named_rows(source, split, data_dir, flag)
    path = Path(source)
    if not path.exists():
        known = ", ".join(SOURCES)
        raise UsageError(f"{flag} names {source!r}, which is neither an existing path nor one of {known}")
    return rows_at(source, path, _SAVED_SPLITS[split], None)


def evaluation_text(source: str, data_dir: Path | None, *, flag: str = "--datasets") -> tuple[str, str]:
    """The test rows of a source, blank ones included, joined with two newlines; and its origin.

    This is the text of the paper's perplexity, of which no chat is a part. Raises UsageError as `read_rows` does, for
    prompts, and for chats without a column of prose beside them.
    """
    rows = read_rows(source, "test", data_dir, flag=flag)
    if rows.has_prompts or not rows.text_field:
        kind = "prompts" if rows.has_prompts else "chats"
        raise UsageError(f"{flag} names {rows.origin}, which holds {kind}: give prose, with a column text")
    return "\n\n".join(text or "" for text in rows.table[rows.text_field]), rows.origin


def _pydoc_rows(split: str, flag: str) -> Rows:
    """The topics and their text differ by version of Python, which the origin therefore names."""
    with reading(f"{flag} names {PYDOC}, which this Python lacks", "give another source"):
        from pydoc_data.topics import topics
    return _python_rows(PYDOC, "pydoc_data.topics", pydoc_passages(topics, split))


def _pysource_rows(split: str, flag: str) -> Rows:
    """The modules of CPython's own library, one a row; they differ by version, which the origin therefore names."""
    folder = Path(sysconfig.get_path("stdlib"))
    with reading(f"{flag} names {PYSOURCE}: {folder} cannot be read", "give another source"):
        modules = [path.read_text("utf-8", "replace") for path in source_modules(folder, split)]
    if not modules:
        raise UsageError(f"{flag} names {PYSOURCE}, but {folder} holds no modules: give another source")
    return _python_rows(PYSOURCE, "library", modules)


def source_modules(folder: Path, split: str) -> list[Path]:
    """Modules of Python's library in `folder`, but for tests, in order of their paths.

    One in five is "test", by the digest of its path, the others are "train": what one version adds moves no other.
    """
    left_out = {"test", "tests", "idle_test", "pydoc_data", "__pycache__"}
    kept, names = [], sys.stdlib_module_names
    paths = [folder / f"{name}.py" for name in names]
    paths += [path for name in names for path in (folder / name).rglob("*.py")]
    for path in sorted(path for path in paths if path.is_file()):
        name = path.relative_to(folder)
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        is_generated = name.name.startswith("_sysconfigdata")  # by how this Python was built
        is_held_back = int.from_bytes(digest[:4]) % HELD_BACK_EVERY == 0
        if not (left_out & {*name.parts} or is_generated) and is_held_back == (split == "test"):
            kept.append(path)
    return kept


def _python_rows(name: str, part: str, texts: list[str]) -> Rows:
    """Rows of text that comes with Python."""
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    origin = f"CPython {platform.python_version()} {part}"
    return Rows(name, origin, fingerprint, datasets.Dataset.from_dict({"text": texts}), "text", False)


def pydoc_passages(topics: dict[str, str], split: str) -> list[str]:
    """Unique paragraphs of CPython's help topics, joined to passages of `PASSAGE_CHARACTERS` or more.

    "test" is every fifth topic in sorted order. "train" is the other topics without any paragraph of those,
    for topics quote each other (`compound` contains `if`, `for` and more).
    """
    held_back = sorted(topics)[::HELD_BACK_EVERY]
    kept, seen = held_back, set()
    if split == "train":
        kept = sorted(topics.keys() - held_back)
        seen = {words for name in held_back for words in _paragraphs(topics[name])}
    passages = []
    for name in kept:
        fresh = {words: text for words, text in _paragraphs(topics[name]).items() if words not in seen}
        seen |= fresh.keys()
        passages += _pack(fresh.values())
    return passages


def _paragraphs(text: str) -> dict[str, str]:
    """Paragraphs by their words, which show that one is quoted however it is indented."""
    return {" ".join(part.split()): part.strip("\n") for part in text.split("\n\n") if part.strip()}


def _pack(paragraphs: Iterable[str]) -> list[str]:
    """Consecutive paragraphs joined until a passage is long enough; what is left over joins the last one."""
    passages, pending = [], []
    for paragraph in paragraphs:
        pending.append(paragraph)
        if len("\n\n".join(pending)) >= PASSAGE_CHARACTERS:
            passages.append("\n\n".join(pending))
            pending = []
    if pending:
        passages[-1:] = ["\n\n".join([*passages[-1:], *pending])]
    return passages


def _named_rows(name: str, split: str, data_dir: Path | None, flag: str) -> Rows:
    source = SOURCES[name]
    if split not in source.splits:
        served = ", ".join(known for known, row in SOURCES.items() if split in row.splits)
        raise UsageError(f"{flag} names {name}, which has no {split} split: give one of {served}, or a path")
    local = _local_copy(name, split, data_dir, flag) if data_dir else None
    if local:
        return rows_at(name, local, (source.splits[split],), source.row_of_line)
    hub_split, files = source.splits[split], source.files.get(split)
    remedy = f"put a local copy, {source.local[split][0]}.jsonl, into the folder --data_dir {data_dir or ''}"
    with reading(f"{flag} {name} cannot be read from the hub", remedy.rstrip()):
        data_files = {hub_split: files} if files else None
        table = datasets.load_dataset(**source.hub, data_files=data_files, split=hub_split)
    place = f"{source.hub['path']}@{source.hub.get('revision', 'main')}"
    origin = " ".join(filter(None, [place, source.hub.get("name"), files, hub_split]))
    return rows_of(name, origin, table._fingerprint, table)


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
    return format_of(path) is not None


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem
