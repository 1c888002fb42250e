"""Sources of text: python -m pytest tests/test_text_sources.py"""

import errno
import gc
import gzip
import hashlib
import json
import os
import socket
import tempfile

import datasets
import huggingface_hub
import pyarrow
import pytest
from conftest import POINTER, no_space_left, raising, write_json
from pyarrow import parquet
from tiny_texts import texts

from olica.errors import UsageError
from olica.sources import text_files
from olica.sources.text_sources import SOURCES, evaluation_text, read_rows


@pytest.fixture(autouse=True)
def offline_with_own_cache(tmp_path_factory, monkeypatch):
    # Set here because both libraries read their environment variables when they are imported.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def sentences(*values):
    return [{"text": value} for value in values]


# Files and folders given by their path


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    plain = write_json(tmp_path / "a.jsonl", sentences("one", "two"))
    (tmp_path / "b.json").write_text(json.dumps(sentences("one", "two")))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "d.txt").write_text("one\n\ntwo")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"one\n\n\n\ntwo"))
    datasets.Dataset.from_list(sentences("one", "two")).to_parquet(str(tmp_path / "f.parquet"))
    for path in sorted(tmp_path.iterdir()):
        rows = read_rows(str(path), "train", None)
        assert texts(rows) == ["one", "two"], path.name
        assert rows.origin == rows.name == str(path)
        assert rows.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
        assert not rows.has_prompts


def test_a_path_is_no_pattern(tmp_path):
    path = write_json(tmp_path / "odd [1]+*.jsonl", sentences("one"))
    write_json(tmp_path / "odd 1+2.jsonl", sentences("two"))
    assert texts(read_rows(str(path), "train", None)) == ["one"]
    folder = tmp_path / "data [1]?*"
    datasets.DatasetDict(test=datasets.Dataset.from_list(sentences("three"))).save_to_disk(folder / "wikitext2")
    (folder / "ptb_test.txt").write_text(" four \n")
    datasets.Dataset.from_list(sentences("five")).to_parquet(str(folder / "c4.parquet"))
    assert texts(read_rows("wikitext2", "test", folder)) == ["three"]
    assert texts(read_rows("ptb", "test", folder)) == ["four"]
    assert texts(read_rows("c4", "train", folder)) == ["five"]


def test_new_content_with_the_old_time_stamp_is_read(tmp_path):
    path = write_json(tmp_path / "a.jsonl", sentences("one"))
    stat = path.stat()
    before = read_rows(str(path), "train", None)
    write_json(path, sentences("two"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = read_rows(str(path), "train", None)
    assert (texts(before), texts(after)) == (["one"], ["two"])
    assert before.fingerprint != after.fingerprint


def test_a_local_file_is_read_without_asking_the_network(tmp_path, monkeypatch):
    asked = []

    def getaddrinfo(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("a.jsonl", "b.jsonl"):
        read_rows(str(write_json(tmp_path / name, sentences("one"))), "train", None)
    assert not asked


def test_saved_folders(tmp_path):
    one, two = datasets.Dataset.from_list(sentences("one")), datasets.Dataset.from_list(sentences("two"))
    one.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=one, validation=two).save_to_disk(tmp_path / "both")
    datasets.DatasetDict(first=one).save_to_disk(tmp_path / "only")
    datasets.DatasetDict(first=one, second=two).save_to_disk(tmp_path / "neither")
    assert texts(read_rows(str(tmp_path / "plain"), "train", None)) == ["one"]
    assert texts(read_rows(str(tmp_path / "both"), "train", None)) == ["one"]
    assert texts(read_rows(str(tmp_path / "only"), "train", None)) == ["one"]
    measured = read_rows(str(tmp_path / "both"), "test", None)
    assert texts(measured) == ["two"]
    assert measured.origin == str(tmp_path / "both" / "validation")
    with pytest.raises(UsageError, match="neither has the splits first, second but not train"):
        read_rows(str(tmp_path / "neither"), "train", None)


def test_the_fingerprint_of_a_folder_follows_its_content(tmp_path):
    for name, value in {"a": "one", "b": "two", "c": "one"}.items():
        datasets.Dataset.from_list(sentences(value)).save_to_disk(tmp_path / name)
    first, second, third = (read_rows(str(tmp_path / name), "train", None).fingerprint for name in "abc")
    assert first == third != second


def test_columns_tell_prompts_from_prose(tmp_path):
    prompt = {"instruction": "Add.", "input": "", "output": "2", "text": "the filled-in prompt"}
    prompts = read_rows(str(write_json(tmp_path / "a.jsonl", [prompt])), "train", None)
    assert prompts.has_prompts
    assert prompts.table[0] == prompt
    without = write_json(tmp_path / "b.jsonl", [prompt | {"instruction": ""}])
    assert not read_rows(str(without), "train", None).has_prompts
    other = write_json(tmp_path / "c.jsonl", [{"sentence": "one"}])
    assert texts(read_rows(str(other), "train", None)) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "tw', "cannot be read as json"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000, mtime=0)[:-20], "cannot be read as json"),
        ("a.jsonl.gz", b"not gzip", "cannot be read as json"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.txt", b"\n\n", "cannot be read as text"),
        ("a.txt", b"caf\xe9", "cannot be read as text"),
        ("a.csv", b"text\none\n", "is of an unknown kind: give .jsonl"),
        ("a.jsonl", b'{"page": "one", "url": "u"}\n', "has the columns page, url: prose needs a column text"),
        ("a.jsonl", b'{"instruction": "Add."}\n', "has the columns instruction: .* instruction and output"),
        ("a.jsonl", b'{"messages": "Hello."}\n', "has the columns messages: .* chats need messages .* a list of role"),
        ("a.jsonl", b'{"conversations": [{"speaker": "a"}]}\n', "has the columns conversations: .* chats need"),
        ("a.jsonl", b'{"text": 1}\n', "has a column text of int64"),
        ("a.jsonl", b'{"text": ["one", "two"]}\n', "has a column text of list"),
    ],
)
def test_an_unusable_file_is_named(tmp_path, capfd, caplog, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    datasets.logging.get_logger().addHandler(caplog.handler)
    try:
        with pytest.raises(UsageError, match=message) as caught:
            read_rows(str(path), "train", None)
    finally:
        datasets.logging.get_logger().removeHandler(caplog.handler)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_a_folder_that_was_not_saved_is_named(tmp_path):
    with pytest.raises(UsageError, match="made by save_to_disk") as caught:
        read_rows(str(tmp_path), "train", None)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        read_rows("bookcorpos", "train", None, flag="--texts")
    for part in ("--texts", "'bookcorpos'", "bookcorpus", "alpaca", "c4", "wikitext2", "ptb", "pydoc"):
        assert part in str(caught.value)


@pytest.mark.parametrize("shown", [True, False])
def test_reading_leaves_the_progress_bars_and_messages_of_datasets_as_they_were(tmp_path, capfd, shown):
    before = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity())
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    datasets.logging.set_verbosity_info()
    try:
        read_rows(str(write_json(tmp_path / "a.jsonl", sentences("one"))), "train", None)
        assert datasets.are_progress_bars_disabled() == (not shown)
        assert datasets.logging.get_verbosity() == datasets.logging.INFO
        assert capfd.readouterr().err == ""
    finally:
        (datasets.disable_progress_bars if before[0] else datasets.enable_progress_bars)()
        datasets.logging.set_verbosity(before[1])


# Local copies of named sources


@pytest.mark.parametrize(
    ("source", "split", "file"),
    [
        ("bookcorpus", "train", "bookcorpus_part.jsonl"),
        ("alpaca", "train", "alpaca.jsonl"),
        ("alpaca", "train", "alpaca_6k.jsonl.gz"),
        ("c4", "train", "c4.jsonl"),
        ("c4", "train", "c4_en_train_first1000.jsonl"),
        ("c4", "test", "c4_validation.jsonl"),
        ("wikitext2", "train", "wikitext2_raw_train_slice.jsonl"),
        ("wikitext2", "test", "wikitext2_raw_test.jsonl"),
        ("ptb", "train", "ptb.jsonl"),
        ("ptb", "test", "ptb_test.jsonl"),
    ],
)
def test_a_local_copy_goes_before_the_hub(tmp_path, source, split, file):
    content = b'{"text": "one"}\n'
    (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    rows = read_rows(source, split, tmp_path)
    assert texts(rows) == ["one"]
    assert (rows.name, rows.origin) == (source, str(tmp_path / file))


@pytest.mark.parametrize(
    ("source", "split", "file"),
    [
        ("alpaca", "train", "alpaca_test.jsonl"),
        ("bookcorpus", "train", "bookcorpus_validation.jsonl"),
        ("c4", "train", "c4_validation.jsonl"),
        ("c4", "train", "c4_train_test.jsonl"),
        ("c4", "test", "c4.jsonl"),
        ("c4", "test", "c4_train_validation.jsonl"),
        ("wikitext2", "train", "wikitext2_raw_test.jsonl"),
        ("wikitext2", "test", "wikitext2_raw_test_documents.jsonl"),
        ("wikitext2", "test", "wikitext2.jsonl"),
        ("ptb", "train", "ptb_test.txt"),
        ("ptb", "test", "ptb.txt"),
        ("alpaca", "train", "alpaca.csv"),
    ],
)
def test_a_file_of_the_other_split_does_not_serve(tmp_path, source, split, file):
    (tmp_path / file).write_text('{"text": "one"}\n')
    with pytest.raises(UsageError, match="cannot be read from the hub"):
        read_rows(source, split, tmp_path)


def test_an_exact_name_goes_before_a_wildcard_and_a_tie_is_refused(tmp_path):
    for file in ("alpaca_1.jsonl", "alpaca_2.jsonl"):
        write_json(tmp_path / file, sentences(file))
    with pytest.raises(UsageError, match=r"alpaca_1.jsonl and alpaca_2.jsonl.*--texts"):
        read_rows("alpaca", "train", tmp_path, flag="--texts")
    write_json(tmp_path / "alpaca.jsonl", sentences("exact"))
    assert texts(read_rows("alpaca", "train", tmp_path)) == ["exact"]


def test_a_saved_folder_under_the_name_of_a_source_serves_the_splits_it_has(tmp_path):
    one, two = datasets.Dataset.from_list(sentences("one")), datasets.Dataset.from_list(sentences("two"))
    datasets.DatasetDict(train=one, validation=two).save_to_disk(tmp_path / "c4")
    datasets.DatasetDict(test=two).save_to_disk(tmp_path / "wikitext2")
    two.save_to_disk(tmp_path / "ptb_test")
    assert texts(read_rows("c4", "train", tmp_path)) == ["one"]
    assert texts(read_rows("c4", "test", tmp_path)) == ["two"]
    assert texts(read_rows("wikitext2", "test", tmp_path)) == ["two"]
    assert texts(read_rows("ptb", "test", tmp_path)) == ["two"]
    for source in ("wikitext2", "ptb"):
        with pytest.raises(UsageError, match="cannot be read from the hub"):
            read_rows(source, "train", tmp_path)


def test_lines_of_plain_files_become_the_rows_of_the_data_sets(tmp_path):
    (tmp_path / "ptb_test.txt").write_text(" no it was n't \n but <unk> \n")
    (tmp_path / "wikitext2_test.txt").write_text(" \n = Title = \n \n Text .\n")
    assert texts(read_rows("ptb", "test", tmp_path)) == ["no it was n't", "but <unk>"]
    assert texts(read_rows("wikitext2", "test", tmp_path)) == ["", " = Title = \n", "", " Text .\n"]


def test_other_plain_files_have_a_row_a_paragraph(tmp_path):
    (tmp_path / "bookcorpus.txt").write_text("one\ntwo\n\nthree")
    assert texts(read_rows("bookcorpus", "train", tmp_path)) == ["one\ntwo", "three"]


# The hub


@pytest.mark.parametrize(
    ("source", "split", "arguments", "origin"),
    [
        (
            "bookcorpus",
            "train",
            {"path": "bookcorpus/bookcorpus", "revision": "refs/convert/parquet", "split": "train"},
            "bookcorpus/bookcorpus@refs/convert/parquet train",
        ),
        ("alpaca", "train", {"path": "tatsu-lab/alpaca", "split": "train"}, "tatsu-lab/alpaca@main train"),
        (
            "c4",
            "train",
            {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train",
            },
            "allenai/c4@main en/c4-train.00000-of-01024.json.gz train",
        ),
        (
            "c4",
            "test",
            {
                "path": "allenai/c4",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
            },
            "allenai/c4@main en/c4-validation.00000-of-00008.json.gz validation",
        ),
        (
            "wikitext2",
            "test",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
            "Salesforce/wikitext@main wikitext-2-raw-v1 test",
        ),
        (
            "ptb",
            "test",
            {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"},
            "ptb-text-only/ptb_text_only@refs/convert/parquet test",
        ),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, tmp_path, source, split, arguments, origin):
    asked = []
    table = datasets.Dataset.from_list([{"sentence" if source == "ptb" else "text": "one"}])

    def load_dataset(**kwargs):
        asked.append({name: value for name, value in kwargs.items() if value is not None})
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(source, split, tmp_path)
    assert asked == [arguments]
    assert (rows.origin, rows.fingerprint) == (origin, table._fingerprint)
    assert texts(rows) == ["one"]


@pytest.mark.parametrize("missing", [False, True])
def test_an_unreachable_hub_is_answered_with_where_to_put_a_copy(tmp_path, missing):
    data_dir = tmp_path / "missing" if missing else tmp_path
    with pytest.raises(UsageError) as caught:
        read_rows("wikitext2", "test", data_dir, flag="--ppl")
    assert "--ppl wikitext2" in str(caught.value) and "Salesforce/wikitext" in str(caught.value)
    assert f"put a local copy, wikitext2_test.jsonl, into the folder --data_dir {data_dir}" in str(caught.value)
    # What the message asks for is what is then read.
    data_dir.mkdir(exist_ok=True)
    write_json(data_dir / "wikitext2_test.jsonl", sentences("one"))
    assert texts(read_rows("wikitext2", "test", data_dir)) == ["one"]


def test_the_file_that_every_source_asks_for_is_one_it_reads(tmp_path):
    for name, source in SOURCES.items():
        for split, patterns in source.local.items():
            folder = tmp_path / name / split
            folder.mkdir(parents=True)
            write_json(folder / f"{patterns[0]}.jsonl", sentences(f"{name} {split}"))
            assert texts(read_rows(name, split, folder)) == [f"{name} {split}"]


# Text to measure on


def test_evaluation_text_joins_all_rows_with_two_newlines(tmp_path):
    path = write_json(tmp_path / "a.jsonl", sentences("", " = Title = \n", "", "one", None))
    assert evaluation_text(str(path), None) == ("\n\n = Title = \n\n\n\n\none\n\n", str(path))


def test_evaluation_takes_the_test_split(tmp_path):
    write_json(tmp_path / "ptb.jsonl", sentences("train"))
    write_json(tmp_path / "ptb_test.jsonl", sentences("test"))
    assert evaluation_text("ptb", tmp_path) == ("test", str(tmp_path / "ptb_test.jsonl"))


def test_what_cannot_be_measured_on_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--ppl names alpaca, .* no test split: give one of c4, wikitext2, ptb"):
        evaluation_text("alpaca", tmp_path, flag="--ppl")
    prompts = write_json(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "2"}])
    with pytest.raises(UsageError, match="--ppl names .*a.jsonl, which holds prompts"):
        evaluation_text(str(prompts), None, flag="--ppl")


# The optional folder of real text


@pytest.mark.shared
@pytest.mark.parametrize(
    ("source", "split", "file", "count"),
    [
        ("alpaca", "train", "alpaca_6k.jsonl.gz", 6000),
        ("c4", "train", "c4_en_train_first1000.jsonl.gz", 1000),
        ("wikitext2", "train", "wikitext2_raw_train_slice.jsonl", 1525),
        ("wikitext2", "test", "wikitext2_raw_test.jsonl", 4358),
        ("ptb", "test", "ptb_test.txt", 3761),
    ],
)
def test_the_shared_folder_works_as_it_stands(shared_data, source, split, file, count):
    rows = read_rows(source, split, shared_data)
    assert (rows.origin, len(rows.table)) == (str(shared_data / file), count)
    assert rows.has_prompts == (source == "alpaca")


@pytest.mark.shared
def test_the_plain_wikitext_file_gives_the_same_text(shared_data, tmp_path):
    rows = texts(read_rows("wikitext2", "test", shared_data))
    plain = "".join(row or " \n" for row in rows)
    # The checksum of the published wiki.test.raw.
    digest = hashlib.sha256(plain.encode()).hexdigest()
    assert digest == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    (tmp_path / "wikitext2_test.txt").write_text(plain, encoding="utf-8")
    assert texts(read_rows("wikitext2", "test", tmp_path)) == rows
    assert evaluation_text("wikitext2", tmp_path)[0] == "\n\n".join(rows)


@pytest.mark.shared
def test_the_articles_of_wikitext_lack_a_column_text(shared_data):
    with pytest.raises(UsageError, match="has the columns page"):
        read_rows(str(shared_data / "wikitext2_raw_test_documents.jsonl.gz"), "test", None)


# Columns that nobody needs


LONG = {"text": "one plain row " * 800}  # 1,000 of them are more than datasets looks at


@pytest.mark.parametrize(
    ("first", "last", "ending"),
    [
        ({"meta": 1}, {"meta": "later a word"}, ".jsonl"),
        ({"meta": 1}, {"meta": "later a word"}, ".jsonl.gz"),
        ({}, {"meta": 1}, ".jsonl"),
        ({"meta": None}, {"meta": {"a": [1]}}, ".jsonl"),
        ({"meta": {"a": 1}}, {"meta": [1, "x"]}, ".jsonl"),
    ],
)
def test_a_column_that_nobody_needs_does_no_harm(tmp_path, first, last, ending):
    path, count = tmp_path / f"rows{ending}", 1000
    lines = (json.dumps(LONG | first) + "\n") * count + "\n" + json.dumps({"text": "the last"} | last) + "\n"
    path.write_bytes(gzip.compress(lines.encode(), 1) if ending.endswith("gz") else lines.encode())
    for _ in range(2):  # the second time from the cache
        rows = read_rows(str(path), "train", None)
        assert (len(rows.table), rows.table[0], rows.table[count]) == (count + 1, LONG, {"text": "the last"})
        assert (rows.text_field, rows.has_prompts) == ("text", False)
    with pytest.raises(UsageError, match="cannot be read as json .line 1003 has a int in the column text"):
        path.write_bytes(path.read_bytes() + compressed_like(path, b'{"text": 1}\n'))
        read_rows(str(path), "train", None)


def compressed_like(path, content):
    return gzip.compress(content) if path.suffix == ".gz" else content


def test_a_name_that_comes_twice_in_a_row_does_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "m": 1, "m": 2}\n{"instruction": "Add.", "output": "2"}\n')
    rows = read_rows(str(tmp_path / "a.jsonl"), "train", None)
    assert rows.table[1] == {"text": None, "instruction": "Add.", "output": "2"}
    assert rows.has_prompts


def test_a_column_of_parquet_that_datasets_does_not_know_does_no_harm(tmp_path):
    texts_column = pyarrow.array(["one", "two"], pyarrow.large_string())
    odd = {
        "map": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "uuid": pyarrow.array([b"0" * 16] * 2, pyarrow.uuid()),
    }
    parquet.write_table(pyarrow.table(odd | {"text": texts_column}), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"), "train", None)
    assert (rows.table.column_names, texts(rows)) == (["text"], ["one", "two"])
    parquet.write_table(pyarrow.table({"page": texts_column, "url": texts_column}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="has the columns page, url: prose needs"):
        read_rows(str(tmp_path / "b.parquet"), "train", None)


def test_a_column_of_a_saved_folder_that_nobody_needs_is_not_decoded(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "picture": datasets.Image()})
    pictures = {"text": ["one"], "picture": [{"bytes": b"no picture", "path": None}]}
    datasets.Dataset.from_dict(pictures, features).save_to_disk(tmp_path / "saved")
    assert read_rows(str(tmp_path / "saved"), "train", None).table[0] == {"text": "one"}


# The cache of datasets


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """A cache of datasets that cannot be made, and a folder for temporary files of its own."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    text_files._temporary_cache.cache_clear()
    yield tmp_path
    text_files._temporary_cache.cache_clear()


def test_without_a_cache_a_local_file_is_read_all_the_same(no_cache, caplog):
    plain = write_json(no_cache / "a.jsonl", sentences("one"))
    (no_cache / "b.txt.gz").write_bytes(gzip.compress(b"one"))
    datasets.Dataset.from_list(sentences("one")).to_parquet(str(no_cache / "c.parquet"))
    for path in (plain, no_cache / "b.txt.gz", no_cache / "c.parquet"):
        assert texts(read_rows(str(path), "train", None)) == ["one"]
    (said,) = caplog.messages
    assert "HF_DATASETS_CACHE" in said and f"{no_cache / 'file'}" in said
    assert list((no_cache / "temporary").iterdir())
    text_files._temporary_cache.cache_clear()  # as at the end of the process
    gc.collect()
    assert not list((no_cache / "temporary").iterdir())


def test_without_any_place_for_a_copy_the_cache_is_named_and_not_the_file(no_cache, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(no_cache / "nowhere"))
    path = write_json(no_cache / "a.jsonl", sentences("one"))
    with pytest.raises(UsageError) as caught:
        read_rows(str(path), "train", None)
    assert str(caught.value).startswith("the cache of datasets (HF_DATASETS_CACHE, HF_HOME) cannot be written to")


def test_a_full_disk_is_the_fault_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "__init__", no_space_left)
    path = write_json(tmp_path / "a.jsonl", sentences("one"))
    with pytest.raises(UsageError, match="No space left.*: a cache cannot be written to; name a folder .*HF_HOME"):
        read_rows(str(path), "train", None)


def test_a_cache_that_the_hub_cannot_use_is_named(tmp_path, monkeypatch):
    denied = PermissionError(errno.EACCES, "Permission denied", "/some/cache")
    monkeypatch.setattr(datasets, "load_dataset", raising(denied))
    with pytest.raises(UsageError, match="/some/cache.*: a cache cannot be written to"):
        read_rows("wikitext2", "test", tmp_path)


# Pointers of git-lfs


def test_a_pointer_of_git_lfs_in_place_of_text(tmp_path):
    datasets.Dataset.from_list(sentences("one")).save_to_disk(tmp_path / "saved")
    files = [tmp_path / name for name in ("a.jsonl", "b.txt", "c.parquet", "d.jsonl.gz")]
    arrow = tmp_path / "saved/data-00000-of-00001.arrow"
    for file in [*files, arrow]:
        file.write_text(POINTER)
        with pytest.raises(UsageError, match=f"{file.name} is a pointer of git-lfs .*run git lfs pull"):
            read_rows(str(tmp_path / "saved" if file == arrow else file), "train", None)
