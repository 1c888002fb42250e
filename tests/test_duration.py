import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from called import load
from conftest import make_llama

from olica import described
from olica.described import as_timed, describe
from olica.duration import STAGES, Pruning, nearest, read_timed
from olica.jobs import prepare
from olica.pruning.memory import survey_disk_bytes
from olica.settings import settings_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
SMALL = Pruning("card", "olica-plus", 2, 4, 4000, 5000, (48, 16))


@pytest.fixture
def job(tmp_path):
    make_llama(num_key_value_heads=2).save_pretrained(tmp_path / "tiny")
    asked = {"base_model": str(tmp_path / "tiny"), "datasets": "c4", "device": "cpu", "recipe": "olica-plus"}
    return prepare(settings_of(asked | {"num_samples": 96, "seqlen": 16}), [0.2])[0]


def write_speed(folder: Path, pruning: Pruning, seconds: dict[str, float], **changed) -> None:
    """A record as the benchmark writes it, as far as it is read."""
    settings = {"recipe": pruning.recipe, "dtype": "float32", "layers": None, "num_samples": 7, "seqlen": 5}
    record = {
        "kind": "pruning speed",
        "settings": settings,
        "layers": pruning.layers,
        "calibration": list(pruning.ids_shape),
        "dense_pass_seconds": [1.0, 3.0],
        "stages": {name: {"seconds": value} for name, value in (seconds | {"pruning": 1e9}).items()},
        "parameters": {"before": pruning.total, "decoder_layers_before": pruning.of_layers},
        "environment": {"device": pruning.device, "cpu_threads": 2},
    }
    record = {name: value for name, value in (record | changed).items() if value is not None}
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "speed.json").write_text(json.dumps(record))


def test_the_stages_are_those_that_are_timed():
    assert list(STAGES)[:-1] == list(load("benchmarks/pruning_speed.py").STAGES)


@pytest.mark.parametrize("layers", [4, 32, 70])
def test_what_variants_go_through_is_counted_layer_by_layer(layers):
    """Three variants of every group of layers, each on a 32nd of 480 samples, from its group to the end."""
    between = layers - 4  # in groups of neighbours
    group = -(-between // 14) or 1
    entered, groups = 0, set()
    for index in range(layers):
        inside = 2 <= index < layers - 2
        groups.add((index - 2) // group * group + 2 if inside else index)
        entered += 3 * len(groups)
    amounts = Pruning("card", "olica-plus", 2, layers, 1000 * layers, 1000 * layers + 77, (480, 16)).amounts
    assert amounts["variants"] == entered * 15 * 16 * 1000
    assert amounts["logits"] == 3 * len(groups) * 15 * 16 / 4 * 77


def test_every_stage_grows_with_its_own_amount(tmp_path):
    write_speed(tmp_path, SMALL, dict.fromkeys(STAGES, 1.0))
    (timed,) = read_timed(tmp_path)
    asked = replace(SMALL, itemsize=4)
    assert (timed.pruning, timed.dense_pass, timed.source) == (asked, 2.0, "deep/speed.json")
    assert timed.total == timed.scaled(asked) == len(STAGES)
    longer = timed.scaled(replace(asked, ids_shape=(48, 48)))  # passes three times as long; solves and files as before
    assert longer == pytest.approx(3 * 6 + 6)
    wider = timed.scaled(replace(asked, of_layers=4 * 4000, total=4 * 5000))  # twice as wide
    assert wider == pytest.approx(5 * 8 + 7 * 4)


def test_recorded_times_are_foreseen_from_each_other():
    """Of two models whose layers differ by three times and their text by eight times."""
    timed = read_timed(RESULTS, {"smollm2/pruning_speed.json": 30})
    alike = [one for one in timed if (one.pruning.recipe, one.pruning.itemsize) == ("olica", 4)]
    alike = [one for one in alike if one.source.split("/")[0] in ("smollm2", "streaming")]
    assert len(alike) == 4
    for one in alike:
        for other in alike:
            assert other.scaled(one.pruning) == pytest.approx(one.total, rel=0.15)


def test_the_nearest_record_of_the_same_kind_counts(tmp_path):
    write_speed(tmp_path, SMALL, {"embed": 1.0})
    (timed,) = read_timed(tmp_path)
    asked = replace(timed.pruning, of_layers=9000)
    near = replace(timed, pruning=replace(timed.pruning, of_layers=8000))
    assert nearest(asked, [timed, near]) == near
    for other in (replace(asked, device="x"), replace(asked, recipe="olica"), replace(asked, itemsize=2)):
        assert nearest(other, [timed, near]) is None


def test_records_that_do_not_say_enough_are_left_out(tmp_path):
    write_speed(tmp_path, SMALL, {"embed": 1.0}, layers=None, calibration=None)
    (tmp_path / "other.json").write_text("[]")
    assert read_timed(tmp_path) == read_timed(tmp_path / "nowhere") == []
    (timed,) = read_timed(tmp_path, {"deep/speed.json": 4})
    assert (timed.pruning.layers, timed.pruning.ids_shape) == (4, (7, 5))


def test_a_dry_run_gives_a_time_where_the_same_kind_of_device_was_timed(job, tmp_path, monkeypatch):
    monkeypatch.setattr(described, "RECORDS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")

    def time_on(device: str, **other: str) -> list[str]:
        options, settings = replace(job.options, device=torch.device(device)), replace(job.settings, **other)
        lines = describe(replace(job, options=options, settings=settings)).splitlines()
        return [line for line in lines if line.startswith("time")]

    assert time_on("cuda") == []
    for name, expected in (
        ("cpu", []),
        ("another card", []),
        ("card", ["time         about 5 min by itself, by what deep/speed.json took on card"]),
    ):
        write_speed(tmp_path, as_timed(job, name), {"embed": 300.0})
        assert time_on("cuda") == expected
        assert time_on("cpu") == []
    (tmp_path / "cut.json").write_text('{"kind": "pruning sp')
    (tmp_path / "list.json").write_text("[]")
    assert len(time_on("cuda")) == 1, "what cannot be read is left out"
    assert time_on("cuda", refit="none") == [], "of another repair nothing is known"


def test_a_dry_run_gives_the_disk_that_is_wanted(job):
    """Hidden states of all samples and those of three variants of both layers on eight of them, twice, in float32."""
    layers, width = job.config.num_hidden_layers, job.config.hidden_size
    expected = 2 * 4 * width * 16 * (96 + 3 * layers * 8)
    assert survey_disk_bytes(job.task) == expected
    words = f"disk         {job.disk_bytes / 1e9:.2f} GB under --save_dir, {expected / 1e9:.2f} GB under --data_dir"
    assert any(line.startswith(words) for line in describe(job).splitlines())
    (blind,) = prepare(replace(job.settings, recipe="magnitude"), [0.2])
    assert survey_disk_bytes(blind.task) == 0 and "--data_dir" not in describe(blind)
