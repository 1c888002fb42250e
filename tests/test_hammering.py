"""Kills, full disks and mutated files at random, many of each: run it by `pytest -m slow tests/test_hammering.py`.

The variable OLICA_SEED, a text, draws others.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from filelock import FileLock
from launched import COMMAND, environment, start
from safetensors.torch import save_file
from tiny_gguf import save
from tiny_run import FOLDER, PLAIN_FLAGS, contents, prune
from tiny_sweep import without_times

from olica.errors import UsageError
from olica.jobs import method_of
from olica.methods.recipes import RECIPES
from olica.model.layouts import LAYOUTS, for_family
from olica.settings import Settings
from olica.sweeping.plan import RECORD

ROOT, MUTATED = Path(__file__).parents[1], Path(__file__).with_name("mutated.py")
SEED = os.environ.get("OLICA_SEED", "0")
KILLS, FULL_DISKS, MUTATIONS, PARTS = 40, 10, 200, 10
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


CONFIG = make_llama().config


def is_possible(recipe: str, layout: str) -> bool:
    """Whether a recipe, with its own parameters, makes a checkpoint of a layout."""
    try:
        method_of(RECIPES[recipe], Settings(), for_family(LAYOUTS[layout], CONFIG))
    except UsageError:
        return False
    return True


WAYS = [(recipe, layout) for layout in LAYOUTS for recipe in RECIPES if is_possible(recipe, layout)]
SHARES = [KILLS // len(WAYS) + (number < KILLS % len(WAYS)) for number in range(len(WAYS))]


def flags_of(recipe: str, layout: str) -> list[str]:
    """What prunes the tiny model of `here`, in place of what lies there."""
    corrected = ["--mlp_num=2", "--ratio=0.1"] if "mlp_num" in RECIPES[recipe].parameter_names else []
    return [*PLAIN_FLAGS, *corrected, f"--recipe={recipe}", f"--layout={layout}", "--overwrite"]


def test_the_ways_are_all_recipes_and_layouts():
    assert {recipe for recipe, _ in WAYS} == {*RECIPES} and {layout for _, layout in WAYS} == {*LAYOUTS}
    assert sum(SHARES) == KILLS and min(SHARES) >= 1


def is_at_work() -> bool:
    """Whether a run has begun to write."""
    return any(Path("out").glob(".*.partial")) or any(Path("data/surveys").glob("*"))


@pytest.mark.parametrize(("way", "kills"), [*zip(WAYS, SHARES, strict=True)], ids=[" ".join(way) for way in WAYS])
def test_what_is_killed_at_random_moments_leaves_no_half_checkpoint_and_goes_on_to_the_same_bits(
    here, fork_server, way, kills
):
    draw, command = random.Random(f"{SEED} {way}"), [*COMMAND, *flags_of(*way)]
    process = start(fork_server, command, Path("errors"))
    while not is_at_work() and process.poll() is None:
        time.sleep(0.001)
    began = time.monotonic()
    assert process.wait() == 0, Path("errors").read_text()
    took = time.monotonic() - began
    (folder,) = Path("out").iterdir()
    undisturbed, replaced = contents(folder), {"old": b""}

    def start_anew() -> None:
        for made in ("out", "data"):
            shutil.rmtree(made, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "old").touch()

    start_anew()
    while kills:
        process = start(fork_server, command, Path("errors"))
        while not is_at_work() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, took))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            assert contents(folder) in (replaced, undisturbed)
        else:  # between two moves
            assert contents(folder.with_name(f".{folder.name}.old")) in (replaced, undisturbed)
        if process.returncode == -signal.SIGKILL:
            kills -= 1
        else:  # it was faster
            assert process.returncode == 0, Path("errors").read_text()
            took *= 0.9
            start_anew()
    process = start(fork_server, command, Path("errors"))
    assert process.wait() == 0, Path("errors").read_text()
    assert contents(folder) == undisturbed
    assert [path.name for path in Path("out").iterdir()] == [folder.name]


# Commands that write to a disk, and what may not lie on it when they did not end well.
ON_DISK = ["--save_dir=disk/out", "--data_dir=disk/data"]
OTHERS = "--held_back_datasets=others.safetensors"
PRUNING = ["model_pruning.py", *PLAIN_FLAGS, "--mlp_num=2", "--ratio=0.1", *ON_DISK, "--max_shard_size=300KB"]
MEASURING = ["--ppl=held.txt", "--ppl_seqlen=16"]
ON_FULL_DISKS = [
    (FULL_DISKS, PRUNING, "out/tiny*"),
    (3, ["model_evaluate.py", "--checkpoint=tiny", *MEASURING, "--output_path=disk/said.json"], "said.json"),
    (3, ["model_export.py", "merging", "--output_path=disk/a.gguf"], "a.gguf"),
    (3, ["model_export.py", str(FOLDER), "--layout=dense", "--output_path=disk/dense"], "dense"),
    # A point's checkpoint is whole before it is measured.
    (3, ["model_sweep.py", *PRUNING[1:], "--sparsity=0.1,0.2", OTHERS], "out/*/.*.partial"),
]


def on_disk_of(python: str, size: int, command: list[str]) -> list[dict]:
    """How a command ends on a disk of so many bytes, and then on one with room."""
    shutil.rmtree("later", ignore_errors=True)
    called = [python, Path(__file__).with_name("full_disk.py"), size, ROOT / command[0], *command[1:]]
    done = subprocess.run([*map(str, called)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("wants a system that gives a process a disk of its own (user namespaces)")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("times", "command", "place"), ON_FULL_DISKS)
def test_a_disk_that_fills_up_ends_in_a_sentence_and_with_room_all_goes_on_to_the_same_bits(
    here, fast_python, times, command, place
):
    Path("held.txt").write_text("Old owls read long books of law by candle light.\n" * 8)
    prune()
    save(make_llama(), Path("merging"))
    others = torch.randint(3, 259, (4, 32), generator=torch.Generator().manual_seed(1))
    save_file({"calibration_ids": others}, "others.safetensors")
    draw = random.Random(f"{SEED} {command}")
    whole, _ = on_disk_of(fast_python, 2**30, command)
    assert whole["status"] == 0, whole["errors"]
    undisturbed, most = made_in(Path("later")), sum(whole["left"].values())
    assert undisturbed
    for _ in range(times):
        full, later = on_disk_of(fast_python, size := int(draw.uniform(0.05, 1) * most), command)
        check_ended(full, size, place)
        assert later["status"] == 0, later["errors"]
        assert made_in(Path("later")) == undisturbed, size


def made_in(folder: Path) -> dict[str, Any]:
    """Every file of weights below a folder, but for surveys, and what was measured, but for how long it took."""
    held = {name: content for name, content in contents(folder).items() if "data" not in name}
    measured = {name: json.loads(content) for name, content in held.items() if name.endswith(("said.json", RECORD))}
    perplexities = {
        name: [record.get("results"), without_times(record.get("points"))] for name, record in measured.items()
    }
    weights = {name: content for name, content in held.items() if Path(name).suffix in (".safetensors", ".gguf")}
    return perplexities | weights


def check_ended(full: dict, size: int, place: str) -> None:
    """Of a command on a disk of `size` bytes: it ended in one sentence, and nothing lies at a place."""
    assert full["status"] == 2 and "Traceback" not in full["errors"], (size, full["errors"])
    *warnings, said = full["errors"].splitlines()
    assert ": error: " in said and not any(": error: " in line for line in warnings), (size, full["errors"])
    assert "make room" in said, said
    left = [name for name in full["left"] for path in [Path(name), *Path(name).parents] if path.match(place)]
    assert not [name for name in left if not name.startswith(".")], (size, full["left"])


@pytest.fixture(scope="session")
def made(shared_folder, fork_server) -> Path:
    """Pruned checkpoints in every layout, as the command line makes them, for all processes of the tests."""
    folder = shared_folder / "mutated"
    with FileLock(shared_folder / "mutated.lock"):
        if not folder.exists():
            folder.mkdir()
            process = start(fork_server, [str(MUTATED), "--prepare", str(folder)], shared_folder / "errors")
            assert process.wait() == 0, (shared_folder / "errors").read_text()
    return folder


@pytest.mark.parametrize("part", range(PARTS))
def test_mutated_files_end_in_a_sentence_or_in_a_sound_result(tmp_path, fork_server, made, part):
    (tmp_path / "made").symlink_to(made)
    arguments = [str(MUTATED), f"{SEED} {part}", str(MUTATIONS // PARTS), str(tmp_path)]
    process = start(fork_server, arguments, tmp_path / "errors")
    assert process.wait() == 0, (tmp_path / "errors").read_text()
    ended = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert not [row for row in ended if row["fault"]]
    assert {row["number"] for row in ended} == {*range(MUTATIONS // PARTS)}
    assert {row["status"] for row in ended} == {0, 2}, "of so many some are harmless"
