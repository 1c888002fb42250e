"""Text that every Python has: the topics of pydoc, the modules of its library."""

import platform
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from tiny_texts import texts

from olica.errors import UsageError
from olica.sources.text_sources import evaluation_text, pydoc_passages, read_rows, source_modules


def test_pydoc_passages_of_made_up_topics():
    long, other = "x" * 1000, "y" * 1000
    topics = {
        "a": "Held back.\n\n   Quoted\n   code.",
        "b": f"Head.\n\n{long}\n\nTail.",
        "c": f"Quoted code.\n\nshort\n\n{other}\n\nHead.",
        "d": "only short",
        "e": "Held back.",
    }
    # "Quoted code." is held back, the second "Head." is not the first one.
    assert pydoc_passages(topics, "train") == [f"Head.\n\n{long}\n\nTail.", f"short\n\n{other}", "only short"]
    assert pydoc_passages(topics, "test") == ["Held back.\n\n   Quoted\n   code."]


def paragraphs(text):
    return {" ".join(part.split()) for part in text.split("\n\n")} - {""}


def test_no_held_back_paragraph_of_pydoc_is_calibrated_on():
    from pydoc_data.topics import topics

    train, test = read_rows("pydoc", "train", None), read_rows("pydoc", "test", None)
    held_back = set().union(*(paragraphs(topics[name]) for name in sorted(topics)[::5]))
    calibrated = set().union(*map(paragraphs, texts(train)))
    assert not held_back & calibrated
    assert calibrated | held_back == set().union(*map(paragraphs, topics.values()))
    assert set().union(*map(paragraphs, texts(test))) == held_back


def test_pydoc_rows_are_long_unique_and_named_after_the_version():
    rows = read_rows("pydoc", "train", None)
    assert rows.origin == f"CPython {platform.python_version()} pydoc_data.topics"
    parts = [" ".join(part.split()) for text in texts(rows) for part in text.split("\n\n")]
    assert len(parts) == len(set(parts))
    assert sum(len(text) >= 1000 for text in texts(rows)) > len(texts(rows)) / 2
    assert rows.fingerprint == read_rows("pydoc", "train", None).fingerprint
    assert rows.fingerprint != read_rows("pydoc", "test", None).fingerprint
    text, origin = evaluation_text("pydoc", None)
    assert text == "\n\n".join(texts(read_rows("pydoc", "test", None))) and origin == rows.origin


def test_a_python_without_the_topics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match="--datasets names pydoc"):
        read_rows("pydoc", "train", None)


def test_modules_of_pysource_are_those_of_the_library_and_split(tmp_path):
    """What is added moves no other from one split to the other."""
    names = ["ast.py", "json/encoder.py", "json/decoder.py", "asyncio/tasks.py", "csv.py", "zipfile/_path/glob.py"]
    others = ["json/tests/test_x.py", "mine.py", "site-packages/y.py", "ast.txt", "_sysconfigdata__x.py"]
    for name in names + others:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    def split() -> tuple[list[str], list[str]]:
        return tuple(
            [path.relative_to(tmp_path).as_posix() for path in source_modules(tmp_path, name)]
            for name in ("test", "train")
        )

    test, train = split()
    assert sorted(test + train) == sorted(names) and test == sorted(test) and train == sorted(train)
    for name in ("abc.py", "wave.py", "heapq.py"):
        (tmp_path / name).write_text("")
    more = split()
    assert set(test) <= set(more[0]) and set(train) <= set(more[1])


def test_pysource_is_this_pythons_library():
    train, test = (read_rows("pysource", split, None) for split in ("train", "test"))
    assert train.origin == test.origin == f"CPython {platform.python_version()} library"
    texts = set(train.table["text"]), set(test.table["text"])
    assert Path(textwrap.__file__).read_text() in texts[0] | texts[1]
    assert len(texts[0]) > 3 * len(texts[1]) > 100
    assert read_rows("pysource", "train", None).fingerprint == train.fingerprint != test.fingerprint


def test_a_python_without_its_library_has_no_pysource(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UsageError, match="--datasets names pysource, but .* holds no modules"):
        read_rows("pysource", "train", None)
