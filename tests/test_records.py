import json
import os
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import olica
from olica.errors import UsageError
from olica.outputs.records import (
    EVALUATION_RECORD,
    PRUNING_RECORD,
    Stages,
    add_record,
    environment,
    flags_of,
    has_former_shares,
    latest_comparison,
    read_pruning_record,
    write_record,
)

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Point:
    share: float
    size: int | None = None


def test_flags_are_recorded_as_values():
    args = Namespace(layers=None, scale=2, ridges=[0.1, 1.0], is_dry=False, folder=Path("a/b"), points=[Point(0.5)])
    assert flags_of(args) == {
        "layers": None,
        "scale": 2,
        "ridges": [0.1, 1.0],
        "is_dry": False,
        "folder": "a/b",
        "points": [{"share": 0.5, "size": None}],
    }


def test_a_record_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_record(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError):
        write_record(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]


def test_records_of_one_name_are_all_kept(tmp_path):
    path = tmp_path / EVALUATION_RECORD.format(time="20260101T090000Z")
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda number: add_record(path, {"number": number}), range(24)))
    assert sorted(json.loads(path.read_text())["number"] for path in paths) == list(range(24))
    assert path in paths and {*tmp_path.iterdir()} == {*paths} == {*tmp_path.glob("olica_eval_*.json")}


def test_a_file_that_another_writes_meanwhile_is_whole(tmp_path, monkeypatch):
    path, replace = tmp_path / "record.json", os.replace

    def replace_after_another(*paths):
        monkeypatch.setattr(os, "replace", replace)
        write_record(path, {"a": 2})
        replace(*paths)

    monkeypatch.setattr(os, "replace", replace_after_another)
    write_record(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_the_pruning_record_and_the_latest_evaluation_are_found(tmp_path):
    assert read_pruning_record(tmp_path) is None and latest_comparison(tmp_path) is None
    pruning = {"model": {"name": "tiny", "source": "tiny"}, "parameters": {"before": 5}}
    write_record(tmp_path / PRUNING_RECORD, pruning)
    for hour in ("09", "17", "11"):
        record = {"results": {"dense": {"perplexity": {}}}, "hour": hour}
        write_record(tmp_path / EVALUATION_RECORD.format(time=f"20260101T{hour}0000Z"), record)
    write_record(tmp_path / EVALUATION_RECORD.format(time="20260101T230000Z"), {"results": {"model": {}}})
    assert read_pruning_record(tmp_path) == pruning
    assert latest_comparison(tmp_path)["hour"] == "17"
    (tmp_path / EVALUATION_RECORD.format(time="20260102T000000Z")).write_text("{")
    with pytest.raises(UsageError, match="20260102T000000Z.json is not the record of an evaluation"):
        latest_comparison(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"name": "tiny"}}'])
def test_a_file_that_is_no_pruning_record_is_named(tmp_path, content):
    (tmp_path / PRUNING_RECORD).write_text(content)
    with pytest.raises(UsageError, match=f"{PRUNING_RECORD} is not the record of a pruning"):
        read_pruning_record(tmp_path)


def test_stages_measure_time_and_memory():
    stages = Stages(CPU)
    with stages.stage("sleep"):
        time.sleep(0.3)
    with stages.stage("allocate"):
        block = torch.ones(100_000_000)  # 400 MB
    del block
    assert list(stages.rows) == ["sleep", "allocate"]
    assert 0.3 <= stages.rows["sleep"]["minutes"] * 60 < 5
    assert stages.rows["allocate"]["host_bytes"] > stages.rows["sleep"]["host_bytes"] + 300e6
    assert stages.rows["sleep"]["device_bytes"] is None


def test_environment_names_versions_and_device():
    found = environment(CPU)
    assert found["olica"] == olica.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["device"] == "cpu" and found["cpu_threads"] == torch.get_num_threads()
    json.dumps(found)


@pytest.mark.parametrize(
    ("recipe", "sparsity", "query", "key", "expected"),
    [
        ("olica", 0.2, 0.4, 0.4, False),
        ("olica", 0.2, 8 / 15, 0.0, True),
        ("olica-wanda", 0.1, 0.5, 0.0, True),
        ("olica", 0.03, 0.0, 0.0, True),  # the MLPs would have had to grow
        ("olica", 0.0, 0.0, 0.0, False),
        ("olica-grouped", 0.2, 8 / 15, 0.0, False),
    ],
)
def test_former_shares_of_grouped_heads_are_known_by_queries_and_keys(recipe, sparsity, query, key, expected):
    settings = {"recipe": recipe, "sparsity": sparsity}
    assert has_former_shares({"settings": settings, "shares_removed": {"query": query, "key": key}}) is expected


def test_older_records_have_one_share_for_both():
    assert not has_former_shares({"settings": {}, "shares_removed": {"query_key": 0.4}}) and not has_former_shares({})


@pytest.mark.parametrize(
    ("driver", "precision", "expected"),
    [(None, "highest", False), (None, "high", True), ("1", "highest", True), ("0", "high", False)],
)
def test_a_record_of_a_gpu_says_whether_products_are_in_tf32(monkeypatch, driver, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if driver is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", driver)
    assert environment(torch.device("cuda"))["tf32"] is expected
    assert environment(CPU)["tf32"] is False
