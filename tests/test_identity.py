import shutil
from pathlib import Path

import pytest
import torch

from olica.outputs import identity, records
from olica.sources.locate import Location, locate

CPU = torch.device("cpu")
GROUND = ("machine.py",)
SHARED = ("model/modeling_olica.py", "sources/text_files.py", "sources/weights.py")
PRUNING = ("methods/linalg.py", "pruning/survey.py", "outputs/checkpoint.py", "outputs/journal.py")
PRUNING += (
    "outputs/run_folder.py",
    "outputs/run_progress.py",
    "outputs/survey_store.py",
    "outputs/weight_shards.py",
    "tensor_files.py",
    "settings.py",
    "jobs.py",
    "run.py",
    "methods/deeper/new.py",
    "pruning/new.py",
)
EVALUATION = ("evaluation/zero_shot.py", "evaluation/deeper/new.py")
NEITHER = (
    "version.py",
    "progress_bar.py",
    "command_line.py",
    "described.py",
    "duration.py",
    "errors.py",
    "report/plots.py",
    "report/new.py",
    "outputs/model_card.py",
    "outputs/records.py",
    "model/notes.md",
)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A copy of the package that takes its place as what is digested."""
    copy = shutil.copytree(identity.PACKAGE, tmp_path / "copy" / "olica", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(identity, "PACKAGE", copy)
    return copy


@pytest.fixture
def location(saved_llama) -> Location:
    return locate(str(saved_llama))


def run(location: Location, **settings) -> dict:
    return identity.of_run(settings, location, "hash", CPU)


def evaluation(location: Location) -> dict:
    return identity.of_evaluation({}, {"model": location}, {}, CPU)


def changed(before: dict, now: dict) -> set[str]:
    return {name for name in before | now if before.get(name) != now.get(name)}


def edit(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write("# another line\n")


def test_the_copy_is_the_code_that_runs(package, location, monkeypatch):
    of_copy = run(location), evaluation(location)
    monkeypatch.undo()
    assert of_copy == (run(location), evaluation(location))


@pytest.mark.parametrize("file", [*GROUND, *SHARED, *PRUNING, *EVALUATION, *NEITHER])
def test_each_result_depends_on_the_code_that_decides_it_and_no_other(package, location, file):
    before = run(location), evaluation(location)
    edit(package / file)
    decides_pruning, decides_evaluation = file in GROUND + SHARED + PRUNING, file in GROUND + SHARED + EVALUATION
    assert changed(before[0], run(location)) == ({"version of the code"} if decides_pruning else set())
    assert changed(before[1], evaluation(location)) == ({"code"} if decides_evaluation else set())


def test_a_module_that_moves_to_another_name_is_other_code(package, location):
    before = run(location)
    (package / "pruning" / "survey.py").rename(package / "pruning" / "measure.py")
    assert changed(before, run(location)) == {"version of the code"}


@pytest.mark.parametrize(
    ("name", "of_pruning"),
    [("torch", True), ("transformers", True), ("numpy", True), ("safetensors", True), ("gguf", True),
     ("lm_eval", False), ("datasets", False), ("accelerate", False), ("tokenizers", False)],
)  # fmt: skip
def test_each_result_depends_on_the_packages_that_compute_it(location, monkeypatch, name, of_pruning):
    before, version = (run(location), evaluation(location)), records._version
    monkeypatch.setattr(records, "_version", lambda package: "0.1" if package == name else version(package))
    assert changed(before[0], run(location)) == ({f"version of {name}"} if of_pruning else set())
    assert changed(before[1], evaluation(location)) == {"environment"}


def test_settings_that_only_say_where_things_are_decide_nothing(location):
    assert changed(run(location, k=3.0, save_dir="a"), run(location, k=3.0, save_dir="b")) == set()
    assert changed(run(location, k=3.0), run(location, k=2.0)) == {"--k"}
