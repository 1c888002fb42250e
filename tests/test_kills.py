"""The real command line: killed at random moments, and twice at the same survey."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from forked import Fork
from tiny_run import FLAGS, FOLDER, LAYERS, WORK, contents, journal, prune

ROOT = Path(__file__).parents[1]
SURVEYS = Path("data/surveys")


def surveyed() -> int:
    """How many layers the journal of the survey has."""
    try:
        (path,) = SURVEYS.glob("*/survey.json")
        return json.loads(path.read_text())["facts"]["layers"]
    except (ValueError, FileNotFoundError):  # there is none
        return 0


def steps() -> int:
    """How many layers the journals have as surveyed and as pruned, how many files as gathered, and one more when all is
    to be put in its place."""
    try:
        facts, files = journal(), journal("files")
    except (ValueError, FileNotFoundError):  # there is none, or it has just been removed
        return surveyed()
    gathered = sum(name.startswith("checkpoint/") for name in files)
    return surveyed() + facts["pruned"] + gathered + facts.get("publishing", False)


def changed_at() -> int:
    """When the list of files in the work folder changed last; 0 while there is none."""
    try:
        return WORK.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# The command line, as it is, and keeping surveys and hidden states after every layer.
COMMAND = [str(ROOT / "model_pruning.py")]
RUN = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
SAVING_COMMAND = ["-c", "import olica.outputs.run_progress as r; r.SAVED_EVERY = -1.0; " + RUN, *COMMAND]
# Files that a checkpoint has then, and the command on a disk that takes its time over every block of them.
SMALL_FILES, FILES = "--max_shard_size=300KB", 4
SLOW_DISK = """
import time
import olica.outputs.run_progress as r
bytes_in = r.bytes_in
r.bytes_in = lambda path, entry: (time.sleep(0.005) or piece for piece in bytes_in(path, entry))
"""
GATHERING_COMMAND = ["-c", SLOW_DISK + RUN, *COMMAND]


def start(server: str, arguments: list[str], errors: Path) -> Fork:
    """Start a fork of the `server`, which Python calls with the arguments, and which writes its errors to a file."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with errors.open("w") as said, open(os.devnull, "w") as null:
        return Fork(server, arguments, environment, (0, null.fileno(), said.fileno()))


class Kill(NamedTuple):
    """What a kill met: how many steps were done, and whether hidden states behind pruned layers were kept."""

    steps: int
    has_hidden: bool


def kill_until_done(kills: int, server: str, command: list[str], first: int = 0) -> list[Kill]:
    """Run the command, killing it so often at random moments of its work, the first when so many steps are done.

    The command is what Python is called with, in forks of the `server`.
    """
    draw, met, errors = random.Random(kills), [], Path("errors")
    while True:
        done, more, before = steps(), draw.randint(0, 3) if met else 0, changed_at()
        for lock in SURVEYS.glob("*.lock"):  # of a process that is dead: the next says that one is at work again
            lock.unlink()
        process = start(server, command, errors)
        while len(met) < kills and process.poll() is None:
            at_work = changed_at() != before if surveyed() == LAYERS else any(SURVEYS.glob("*.lock"))
            # That many steps further, and then at any moment.
            if at_work and steps() >= max(done + more, first):
                time.sleep(draw.uniform(0, 0.05) if met else 0)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        process.wait()
        if process.returncode == -signal.SIGKILL and WORK.exists():
            met.append(Kill(steps(), any(WORK.glob("hidden-pruned*"))))
            continue
        assert process.returncode in (0, -signal.SIGKILL), errors.read_text(errors="replace")[-2000:]
        if process.returncode == 0 and len(met) >= kills:
            return met
        for folder in ("out", "data"):  # it was faster than the signal: once more from the start
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("kills", "command", "flags"),
    [
        (3, COMMAND, []),
        pytest.param(24, COMMAND, [], marks=pytest.mark.slow),
        pytest.param(12, SAVING_COMMAND, ["--overwrite"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_command_goes_on_to_the_same_bits(here, fork_server, kills, command, flags):
    kill_until_done(0, fork_server, [*COMMAND, *FLAGS, *flags])
    undisturbed = contents(FOLDER)
    shutil.rmtree("out")
    if flags:
        prune("--percdamp=0.3")  # what is replaced
    shutil.rmtree("data")
    met = kill_until_done(kills, fork_server, [*command, *FLAGS, *flags])
    assert contents(FOLDER) == undisturbed
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
    done = [kill.steps for kill in met]
    assert len(met) == kills and min(done) < LAYERS < max(done), f"no kill met the survey, or none the cut: {done}"
    if kills > 10:
        assert len(set(done)) > 4, f"the kills met too few moments: {done}"
    is_saving = command is SAVING_COMMAND
    assert any(kill.has_hidden for kill in met) == is_saving
    assert any(0 < step < LAYERS for step in done) == is_saving, f"no kill met a survey that was half done: {done}"


@pytest.mark.parametrize("kills", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_a_command_that_is_killed_while_it_gathers_goes_on_to_the_same_bits(here, fork_server, kills):
    kill_until_done(0, fork_server, [*COMMAND, *FLAGS, SMALL_FILES])
    undisturbed = contents(FOLDER)
    shutil.rmtree("out")
    gathering = 2 * LAYERS
    met = kill_until_done(kills, fork_server, [*GATHERING_COMMAND, *FLAGS, SMALL_FILES], gathering)
    assert contents(FOLDER) == undisturbed
    assert sum(name.endswith(".safetensors") for name in undisturbed) == FILES
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
    done = [kill.steps for kill in met]
    assert len(met) == kills and min(done) >= gathering, "a layer was lost"
    assert any(gathering < step < gathering + FILES for step in done), f"no kill met half gathered files: {done}"


# Its survey waits before the first layer for a file that is called go.
WAITING = """
import time
from pathlib import Path
import olica.pruning.survey as s
calibrate = s.calibrate
def waiting(*arguments, **settings):
    while not Path("go").exists():
        time.sleep(0.01)
    calibrate(*arguments, **settings)
s.calibrate = waiting
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_of_two_commands_that_make_the_same_survey_one_waits(here, fork_server, is_killed):
    """For the end of the other: then it has its survey, or makes it where the other was killed."""
    kill_until_done(0, fork_server, [*COMMAND, *FLAGS])
    undisturbed = contents(FOLDER)
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    first = start(fork_server, ["-c", WAITING + RUN, *COMMAND, *FLAGS], Path("first"))
    while not any(SURVEYS.glob("*.lock")):
        assert first.poll() is None, Path("first").read_text()
        time.sleep(0.01)
    second = start(fork_server, [*COMMAND, *FLAGS, "--save_dir=second"], Path("errors"))
    while "making the same survey: waiting for its end" not in Path("errors").read_text():
        assert first.poll() is None and second.poll() is None, Path("errors").read_text()
        time.sleep(0.01)
    if is_killed:
        first.send_signal(signal.SIGKILL)
    else:
        Path("go").touch()
    assert (first.wait(), second.wait()) == (-signal.SIGKILL if is_killed else 0, 0)
    other = Path("second") / FOLDER.name
    assert contents(other) == undisturbed
    assert is_killed or contents(FOLDER) == undisturbed
    taken_up = json.loads((other / "olica_run.json").read_text())["survey"]["layers_taken_up"]
    assert taken_up == (0 if is_killed else LAYERS)
    assert surveyed() == LAYERS and len([*SURVEYS.iterdir()]) == 1
