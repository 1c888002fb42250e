"""Surveys that are kept: which runs take one up, and which make their own."""

import json
import os
import shutil
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from safetensors.torch import save_file
from tiny_run import (
    FOLDER,
    LAYERS,
    Killed,
    bare,
    checkpoint_of,
    contents,
    flags_of,
    folder_of,
    prune,
    sparser_checkpoint,
)

from olica.machine import BatchSize
from olica.outputs import run_progress
from olica.outputs.survey_store import StoredSurvey
from olica.pruning import survey as survey_module


@pytest.fixture
def undisturbed(here) -> dict[str, bytes]:
    """The checkpoint of a run that nobody disturbs."""
    return checkpoint_of("olica")


@cache
def survey_of_a_run() -> dict[str, bytes]:
    """What a run of `here` leaves of its survey."""
    prune()
    survey = contents(Path("data"))
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    return survey


@pytest.fixture
def surveyed(undisturbed) -> dict[str, bytes]:
    """The checkpoint of a run that has left its survey."""
    for name, held in survey_of_a_run().items():
        path = Path("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(held)
    return undisturbed


def dying_in_survey(patched, after: int) -> list:
    """Have the survey die when so many layers are surveyed; returns those, also of later runs."""
    surveyed, calibrate = [], survey_module.calibrate

    def dying(layer, *arguments, **settings):
        if len(surveyed) == after:
            raise Killed
        surveyed.append(layer)
        calibrate(layer, *arguments, **settings)

    patched.setattr(survey_module, "calibrate", dying)
    return surveyed


@pytest.mark.parametrize("recipe", ["olica", "olica-paper", "olica-plus", "flap"])
def test_a_survey_goes_on_too(here, monkeypatch, recipe):
    folder, flags, expected = folder_of(recipe), flags_of(recipe), checkpoint_of(recipe)
    monkeypatch.setattr(run_progress, "SAVED_EVERY", -1.0)
    with monkeypatch.context() as patched:
        dying_in_survey(patched, 4)
        with pytest.raises(Killed):
            bare(*flags)
    with monkeypatch.context() as patched:
        surveyed = dying_in_survey(patched, LAYERS)
        assert bare(*flags) == 0
    assert len(surveyed) == LAYERS - 4
    assert contents(folder) == expected
    assert json.loads((folder / "olica_run.json").read_text())["survey"]["layers_taken_up"] == 4
    (kept,) = Path("data/surveys").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["findings-6-all.safetensors", "survey.json"]


@pytest.mark.parametrize("harm", ["cut", "altered", "missing"])
def test_a_damaged_survey_is_made_anew(here, surveyed, caplog, harm):
    (file,) = Path("data/surveys").glob("*/findings*")
    match harm:
        case "cut":
            file.write_bytes(file.read_bytes()[:-3])
        case "altered":
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        case "missing":
            file.unlink()
    assert prune() == 0
    assert "the survey is made anew" in caplog.text
    assert contents(FOLDER) == surveyed


def test_a_survey_serves_other_sparsities(here, surveyed, monkeypatch):
    """Each checkpoint is that of its single run; only a survey that reads the plan is made for each."""
    with monkeypatch.context() as patched:
        visited = dying_in_survey(patched, LAYERS)
        assert prune("--sparsity=0.2,0.3") == 0
    assert visited == [], "the run before has left one"
    assert contents(FOLDER) == surveyed
    both = contents(Path("out/tiny_sparsity-0.3"))
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    assert sparser_checkpoint() == both
    with monkeypatch.context() as patched:
        visited = dying_in_survey(patched, 2 * LAYERS)
        assert prune("--sparsity=0.2,0.3", "--recipe=olica-paper") == 0
    assert len(visited) == 2 * LAYERS


@pytest.mark.parametrize("change", ["--percdamp=0.4", "--mlp_num=0", "--batch_size=3", "--dtype=bfloat16", "ids"])
def test_another_survey_is_not_taken_up(here, surveyed, change):
    if change == "ids":
        save_file({"calibration_ids": torch.randint(3, 259, (8, 32))}, "ids.safetensors")
    assert prune(*([change] if change != "ids" else [])) == 0
    assert len([*Path("data/surveys").iterdir()]) == 2


@pytest.mark.parametrize("recipe", ["olica", "magnitude"])
def test_models_whose_files_have_equal_sizes_and_times_share_no_survey(here, recipe):
    """As copies have that keep the times."""
    make_llama(1, num_key_value_heads=2, num_hidden_layers=LAYERS).save_pretrained("other")
    for path in Path("tiny").iterdir():
        twin = Path("other") / path.name
        if not twin.exists():
            shutil.copy(path, twin)
        stat = path.stat()
        os.utime(twin, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert twin.stat().st_size == stat.st_size
    other, folder = (
        [*flags_of(recipe), "--base_model=other"],
        Path("out") / folder_of(recipe).name.replace("tiny", "other"),
    )
    assert bare(*other, "--data_dir=elsewhere") == 0
    expected = contents(folder)
    shutil.rmtree("out")
    assert bare(*flags_of(recipe)) == 0
    assert bare(*other) == 0
    assert len([*Path("data/surveys").iterdir()]) == 2
    assert contents(folder) == expected


def test_corrections_of_another_number_and_rank_share_a_survey(here, surveyed):
    assert prune("--mlp_num=1", "--ratio=0.2", "--k=2") == 0
    assert len([*Path("data/surveys").iterdir()]) == 1


def test_where_no_survey_can_be_kept_one_is_made_all_the_same(here, undisturbed, caplog):
    Path("data").mkdir()
    Path("data/surveys").write_text("a file in the way")
    assert prune() == 0
    assert "the survey is not kept" in caplog.text
    assert contents(FOLDER) == undisturbed


def test_a_second_run_waits_for_the_survey_of_the_first(here, caplog):
    held, seen = threading.Event(), []

    def second() -> None:
        held.wait(20)
        with StoredSurvey.locked(here / "data", {"a": 1}, BatchSize(8)) as survey:
            seen.append((survey.is_complete, survey.surveyed().findings))

    other = threading.Thread(target=second)
    other.start()
    with StoredSurvey.locked(here / "data", {"a": 1}, BatchSize(8)) as survey:
        assert not survey.is_complete
        held.set()
        while "waiting for its end" not in caplog.text:
            time.sleep(0.01)
        survey.finish([{"score": torch.ones(2)}])
    other.join()
    ((is_complete, (found,)),) = seen
    assert is_complete and torch.equal(found["score"], torch.ones(2))


def test_the_batch_size_that_a_survey_left_is_kept(here):
    sizes = []
    for size in (8, 4):
        batch_size = BatchSize(8)
        with StoredSurvey.locked(here / "data", {"a": 1}, batch_size) as survey:
            sizes.append(batch_size.size)
            batch_size.size = size // 2
            survey.finish([{"score": torch.ones(2)}])
    assert sizes == [8, 4]
