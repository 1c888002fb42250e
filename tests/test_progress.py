"""Runs that die, go on, and are not taken for one another (test_kills.py kills them from outside)."""

import json
import os
import shutil
import subprocess
import threading
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import allocate, as_method, make_llama, opened, pruning_options, refused
from safetensors.torch import save_file
from tiny_run import (
    BOTH,
    FOLDER,
    LAYERS,
    SPARSER,
    WORK,
    bare,
    checkpoint_of,
    contents,
    flags_of,
    folder_of,
    journal,
    killed_at,
    prune,
    sparser_checkpoint,
)

from olica.machine import BatchSize
from olica.methods.recipes import RECIPES
from olica.outputs import identity, run_progress
from olica.outputs.journal import Journal
from olica.outputs.run_folder import RunFolder
from olica.outputs.run_progress import Shards
from olica.pruning import layers as pruning_module
from olica.pruning.layers import prune_layers
from olica.pruning.options import Work
from olica.pruning.progress import SurveyProgress
from olica.pruning.survey import survey_layers

ROOT = Path(__file__).parents[1]


@pytest.fixture
def undisturbed(here) -> dict[str, bytes]:
    """The checkpoint of a run that nobody disturbs."""
    return checkpoint_of("olica")


@pytest.mark.parametrize("recipe", ["olica", "olica-paper"])
def test_hidden_states_are_written_before_the_next_layer_changes_them(here, monkeypatch, recipe):
    """In the background, as beside a GPU, and by a disk that is slow."""
    ids = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(0))
    write = Journal.write

    def written(in_background: bool, seconds: float) -> dict[str, torch.Tensor]:
        kept = {}

        def writing(self, name, tensors):
            time.sleep(seconds)
            kept.update({f"{name}: {key}": tensor.clone() for key, tensor in tensors.items()})
            write(self, name, tensors)

        monkeypatch.setattr(Journal, "write", writing)
        dense, options = opened("tiny"), pruning_options()
        plan, _ = allocate(recipe, dense.config, dense.model.num_parameters(), 0.2, 3.0)
        work = Work(dense, ids, as_method(recipe, mlp_num=0), options)
        with RunFolder.locked(here / f"out/{in_background}") as run:
            progress = run.begin({}, False, Shards(dense.layers_prefix, LAYERS), options.batch_size, in_background)
            prune_layers(work, plan, survey_layers(work, plan, SurveyProgress()), progress)
        return kept

    monkeypatch.setattr(run_progress, "SAVED_EVERY", -1.0)
    at_once, later = written(False, 0.0), written(True, 0.1)
    assert sum("hidden-pruned" in name for name in at_once) == LAYERS - 1
    assert at_once.keys() == later.keys()
    for name, tensor in at_once.items():
        assert torch.equal(later[name], tensor), name


@pytest.mark.parametrize(
    ("recipe", "layers", "seconds"),
    [
        *product(["olica", "olica-paper"], [1, LAYERS - 1], [run_progress.SAVED_EVERY, -1.0]),
        *((recipe, 3, -1.0) for recipe in RECIPES if recipe not in ("olica", "olica-paper")),
    ],
)
def test_a_run_goes_on_after_the_last_finished_layer(here, monkeypatch, recipe, layers, seconds):
    """Whether hidden states are kept after every layer or follow from the finished ones."""
    monkeypatch.setattr(run_progress, "SAVED_EVERY", seconds)
    folder, flags, expected = folder_of(recipe), flags_of(recipe), checkpoint_of(recipe)
    with killed_at(layers):
        bare(*flags)
    is_kept = seconds < 0 and recipe not in ("flap", "magnitude")  # whose cuts read no text
    assert journal()["entered"] == (layers if is_kept else 0)
    pruned, prune_layer = [], pruning_module._prune_layer
    with monkeypatch.context() as patched:
        patched.setattr(pruning_module, "_prune_layer", lambda *args: pruned.append(args) or prune_layer(*args))
        bare(*flags)
    assert len(pruned) == LAYERS - layers
    assert contents(folder) == expected
    assert json.loads((folder / "olica_run.json").read_text())["went_on_after"] == [layers]


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file of a folder is written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
@pytest.mark.parametrize("layers", [0, 2])
def test_a_kill_in_the_second_of_two_sparsities_leaves_the_first_as_it_is(
    here, undisturbed, monkeypatch, layers, flags
):
    """The same command goes on: what was finished by it is not made again."""
    expected = sparser_checkpoint()
    if flags:
        prune(BOTH, "--percdamp=0.3")  # what is replaced
    with killed_at(layers, of="0.3"):
        prune(BOTH, *flags)
    finished = state(FOLDER)
    assert contents(FOLDER) == undisturbed
    assert SPARSER.exists() == bool(flags), "the old checkpoint stays until the new one is whole"
    pruned, cut = [], pruning_module.cut
    with monkeypatch.context() as patched:
        patched.setattr(pruning_module, "cut", lambda *args: pruned.append(args) or cut(*args))
        assert prune(BOTH, *flags) == 0
    assert len(pruned) == LAYERS - layers
    assert state(FOLDER) == finished and contents(SPARSER) == expected
    assert json.loads((SPARSER / "olica_run.json").read_text())["went_on_after"] == ([layers] if layers else [])
    assert {path.name for path in Path("out").iterdir()} == {FOLDER.name, SPARSER.name}


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_kill_in_the_first_of_two_sparsities_goes_on_with_both(here, undisturbed, flags):
    with killed_at(2, of="0.2"):
        prune(BOTH, *flags)
    assert not FOLDER.exists() and not SPARSER.exists()
    assert prune(BOTH, *flags) == 0
    assert contents(FOLDER) == undisturbed
    went_on = [json.loads((folder / "olica_run.json").read_text())["went_on_after"] for folder in (FOLDER, SPARSER)]
    assert went_on == [[2], []]


def test_another_command_of_two_sparsities_takes_no_finished_checkpoint_for_its_own(here, capsys):
    with killed_at(2, of="0.3"):
        prune(BOTH)
    finished = state(FOLDER)
    assert "--overwrite" in refused(capsys, prune, BOTH, "--percdamp=0.4")
    assert state(FOLDER) == finished
    assert prune(BOTH, "--percdamp=0.4", "--overwrite") == 0
    for folder in (FOLDER, SPARSER):
        record = json.loads((folder / "olica_run.json").read_text())
        assert record["settings"]["percdamp"] == 0.4 and record["went_on_after"] == []


@pytest.mark.parametrize("damage", [{"stages": 7}, {"plan": [{}]}, {"measured_sparsity": None}])
def test_a_damaged_record_of_a_finished_checkpoint_is_named(here, capsys, damage):
    assert prune() == 0
    path = FOLDER / "olica_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    assert f"{path} is not the record of a pruning (" in refused(capsys, prune, BOTH)


def test_a_model_that_is_in_memory_as_a_whole_goes_on_too(here, undisturbed):
    model = make_llama(num_key_value_heads=2, num_hidden_layers=LAYERS)
    torch.save(model.state_dict(), "tiny/pytorch_model.bin")
    Path("tiny/model.safetensors").unlink()
    with killed_at(3):
        prune()
    assert prune() == 0
    assert contents(FOLDER) == undisturbed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--percdamp=0.4"], ["another --percdamp (0.5, now 0.4)"]),
        (["--batch_size=3"], ["another --batch_size (16, now 3)"]),
        (["--dtype=bfloat16"], ["another --dtype"]),
        ("ids", ["another calibration set"]),
        ("weights", ["of the model ("]),
        ("code", ["another version of the code"]),
        ("packages", ["another version of torch"]),
        ("threads", ["another number of threads (2, now 1)"]),
    ],
)
def test_another_run_is_refused_unless_it_is_to_start_afresh(here, capsys, monkeypatch, change, words):
    threads = torch.get_num_threads()
    if change == "threads":
        torch.set_num_threads(2)
    try:
        with killed_at(2):
            prune()
        before = contents(WORK)
        arguments = change if isinstance(change, list) else []
        match change:
            case "ids":
                save_file({"calibration_ids": torch.randint(3, 259, (8, 32))}, "ids.safetensors")
            case "weights":
                make_llama(1, num_key_value_heads=2, num_hidden_layers=LAYERS).save_pretrained("tiny")
            case "code":
                shutil.copytree(identity.PACKAGE, "edited")
                with open("edited/pruning/survey.py", "a") as file:
                    file.write("# edited\n")
                monkeypatch.setattr(identity, "PACKAGE", Path("edited"))
            case "packages":
                monkeypatch.setattr("olica.outputs.records._version", lambda package: "0.1")
            case "threads":
                torch.set_num_threads(1)
        message = refused(capsys, prune, *arguments)
        assert all(word in message for word in [*words, "--overwrite"]), message
        assert contents(WORK) == before
        if change == ["--percdamp=0.4"]:  # whatever differs, nothing of it is looked at
            assert prune("--overwrite", *arguments) == 0
            assert json.loads((FOLDER / "olica_run.json").read_text())["went_on_after"] == []
    finally:
        torch.set_num_threads(threads)


def test_code_that_only_shows_results_may_change(here, undisturbed, monkeypatch):
    with killed_at(2):
        prune()
    shutil.copytree(identity.PACKAGE, "edited")
    for name in ("report/plots.py", "evaluation/perplexity.py", "outputs/model_card.py"):
        with open(f"edited/{name}", "a") as file:
            file.write("# edited\n")
    monkeypatch.setattr(identity, "PACKAGE", Path("edited"))
    assert prune() == 0
    assert json.loads((FOLDER / "olica_run.json").read_text())["went_on_after"] == [2]
    assert contents(FOLDER) == undisturbed


def test_where_hidden_states_live_and_files_lie_may_change(here, undisturbed):
    with killed_at(2):
        prune()
    Path("elsewhere").mkdir()
    shutil.copy("ids.safetensors", "elsewhere")
    assert prune("--cache_dev=cpu", "--datasets=elsewhere/ids.safetensors") == 0
    assert contents(FOLDER) == undisturbed


@pytest.mark.parametrize("harm", ["cut", "a fact", "a checksum"])
def test_an_altered_journal_is_found_by_its_checksum(here, undisturbed, capsys, harm):
    with killed_at(3):
        prune()
    path = WORK / "progress.json"
    text = path.read_text()
    stored = json.loads(text)
    match harm:
        case "cut":
            path.write_text(text[:-3])
        case "a fact":
            stored["facts"]["pruned"] = 2
            path.write_text(json.dumps(stored))
        case "a checksum":
            stored["files"].pop("shard-00003.safetensors")
            path.write_text(json.dumps(stored))
    message = refused(capsys, prune)
    assert "progress.json is damaged" in message and "--overwrite" in message
    if harm == "cut":
        assert prune("--overwrite") == 0
        assert contents(FOLDER) == undisturbed


@pytest.mark.parametrize("harm", ["altered", "cut", "missing"])
@pytest.mark.parametrize("file", ["shard-00003.safetensors", "hidden-pruned-3.safetensors"])
def test_altered_files_are_found_by_their_checksums(here, undisturbed, capsys, monkeypatch, harm, file):
    monkeypatch.setattr(run_progress, "SAVED_EVERY", -1.0)
    with killed_at(3):
        prune()
    path = WORK / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.unlink() if harm == "missing" else path.write_bytes(data if harm == "altered" else data[:-3])
    message = refused(capsys, prune)
    assert path.name in message and "--overwrite" in message
    if (harm, file) == ("altered", "shard-00003.safetensors"):
        assert prune("--overwrite") == 0
        assert contents(FOLDER) == undisturbed


@pytest.mark.parametrize(
    ("recipe", "place"), [("olica", "propagate"), ("olica", "calibrate"), ("olica-paper", "calibrate")]
)
def test_a_batch_that_became_smaller_is_followed(here, monkeypatch, recipe, place):
    """Hidden states that came from batches of two sizes do not follow from the layers, so they are kept at once."""
    suffix = "" if recipe == "olica" else f"_{recipe}"
    folder, flag = Path(f"out/tiny_sparsity-0.2{suffix}"), f"--recipe={recipe}"
    original = getattr(pruning_module, place)

    def with_halving(patched) -> None:
        layers = []

        def halving(layer, hidden, call, *arguments, **settings):
            (batch_size,) = (value for value in arguments if isinstance(value, BatchSize))
            original(layer, hidden, call, *arguments, **settings)
            layers.append(layer)
            if len(layers) == 2 and batch_size.size == 16:
                batch_size.size = 3

        patched.setattr(pruning_module, place, halving)

    with monkeypatch.context() as patched:
        with_halving(patched)
        prune(flag)
    expected = contents(folder)
    shutil.rmtree("out")
    with monkeypatch.context() as patched:
        with_halving(patched)
        with killed_at(4):
            prune(flag)
    assert (journal()["pruned"], journal()["entered"], journal()["batch_size"]) == (4, 2, 3)
    prune(flag)
    assert contents(folder) == expected


def test_what_a_killed_run_left_half_written_is_thrown_away(here, undisturbed):
    with killed_at(3):
        prune()
    (WORK / "shard-00005.safetensors").write_bytes(b"not named in progress.json")
    (WORK / "shard-00005.unfinished").write_bytes(b"half")
    (WORK / "checkpoint/model.unfinished").write_bytes(b"half")
    (WORK / "hidden-pruned-4.safetensors").write_bytes(b"half")
    assert prune() == 0
    assert contents(FOLDER) == undisturbed


def test_a_repeated_command_that_overwrites_goes_on_too(here):
    prune("--seed=1")
    old = contents(FOLDER)
    with killed_at(2):
        prune("--overwrite", "--percdamp=0.3")
    assert contents(FOLDER) == old, "the old checkpoint stays until the new one is whole"
    assert prune("--overwrite", "--percdamp=0.3") == 0
    assert json.loads((FOLDER / "olica_run.json").read_text())["went_on_after"] == [2]
    assert contents(FOLDER) != old


def test_the_next_layer_may_halve_the_batch_before_this_one_is_written(here, monkeypatch):
    shards = Shards("model.layers.", 3)
    with RunFolder.locked(here / "out/x") as run:
        batch_size = BatchSize(8)
        progress = run.begin({"a": 1}, False, shards, batch_size, in_background=True)
        write, waiting = Journal.write, threading.Event()
        monkeypatch.setattr(Journal, "write", lambda *arguments: waiting.wait(20) and write(*arguments))
        progress.save_layer(0, torch.nn.Linear(2, 2), None)
        batch_size.size = 4
        waiting.set()
        progress.wait()
    with RunFolder.locked(here / "out/x") as run:
        run.begin({"a": 1}, False, shards, batch_size)
        assert batch_size.size == 8


# Works on the folder that it is given until its input ends.
HOLDING = """
import sys
from pathlib import Path
from olica.outputs.run_folder import RunFolder
with RunFolder.locked(Path(sys.argv[1])):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_into_the_same_folder_is_refused(here, capsys, fast_python):
    command = [fast_python, "-c", HOLDING, str(here / FOLDER)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "at work\n"
        assert "another run is at work" in refused(capsys, prune)
        assert "another run is at work" in refused(capsys, prune, "--overwrite")
    assert other.returncode == 0
    assert prune() == 0


def test_the_batch_size_that_was_left_is_kept(here):
    sizes = []
    for number, size in enumerate((8, 4)):
        with RunFolder.locked(here / "out/x") as run:
            batch_size = BatchSize(8)
            progress = run.begin({"a": 1}, False, Shards("model.layers.", 3), batch_size)
            sizes.append(batch_size.size)
            batch_size.size = size // 2
            progress.save_layer(number, torch.nn.Linear(2, 2), torch.ones(2))
    assert sizes == [8, 4]


def test_a_run_that_finished_nothing_is_no_run_to_go_on_with(here):
    with RunFolder.locked(here / "out/x") as run:
        run.begin({"a": 1}, False, Shards("model.layers.", 3), BatchSize(8))
        run._journal.commit({})
    with RunFolder.locked(here / "out/x") as run:
        run.begin({"a": 2}, False, Shards("model.layers.", 3), BatchSize(8))
        assert run.interruptions == []


def test_a_run_that_is_stopped_before_it_begins_anew_says_how_far_it_was(here):
    with killed_at(2):
        prune()
    with pytest.raises(KeyboardInterrupt) as stopped, RunFolder.locked(here / FOLDER) as progress:
        assert not progress.is_published  # which reads the journal
        raise KeyboardInterrupt
    assert stopped.value.__notes__ == ["the same command goes on after 2 layers"]
