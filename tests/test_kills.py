"""The real command line: killed at random moments, and twice at the same survey."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from launched import COMMAND, RUN, start
from tiny_run import FLAGS, FOLDER, LAYERS, WORK, contents, journal, prune

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


# The command line, keeping surveys and hidden states after every layer.
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
TRIALS = 5


class Kill(NamedTuple):
    """What a kill met: how many steps were done, and whether hidden states behind pruned layers were kept."""

    steps: int
    has_hidden: bool


def kill_until_done(kills: int, server: str, command: list[str], first: int = 0, trial: int = 0) -> list[Kill]:
    """Run the command, killing it so often at random moments of its work, the first when so many steps are done.

    The command is what Python is called with, in forks of the `server`; each trial draws other moments.
    """
    draw, met, errors = random.Random(f"{kills} {trial}"), [], Path("errors")
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


def until_met(trial: Callable[[int], list[Kill]], wanted: Callable[[list[Kill]], bool]) -> None:
    """Run trials of a number each until the kills of one have met the moments that are wanted, which is luck."""
    tried: list[list[Kill]] = []
    while not tried or not wanted(tried[-1]):
        assert len(tried) < TRIALS, f"the kills never met the moments that are wanted: {tried}"
        tried.append(trial(len(tried)))


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
    is_saving = command is SAVING_COMMAND

    def trial(number: int) -> list[Kill]:
        shutil.rmtree("out")
        if flags:
            prune("--percdamp=0.3")  # what is replaced
        shutil.rmtree("data")
        met = kill_until_done(kills, fork_server, [*command, *FLAGS, *flags], trial=number)
        assert contents(FOLDER) == undisturbed
        assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
        assert len(met) == kills
        assert is_saving or not any(kill.has_hidden or 0 < kill.steps < LAYERS for kill in met)
        return met

    def wanted(met: list[Kill]) -> bool:
        """Some kill met the survey, another the cut, and of states that are kept some were there."""
        done = [kill.steps for kill in met]
        is_half = any(kill.has_hidden for kill in met) and any(0 < step < LAYERS for step in done)
        return min(done) < LAYERS < max(done) and (kills <= 10 or len({*done}) > 4) and (is_half or not is_saving)

    until_met(trial, wanted)


@pytest.mark.parametrize("kills", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_a_command_that_is_killed_while_it_gathers_goes_on_to_the_same_bits(here, fork_server, kills):
    kill_until_done(0, fork_server, [*COMMAND, *FLAGS, SMALL_FILES])
    undisturbed = contents(FOLDER)
    assert sum(name.endswith(".safetensors") for name in undisturbed) == FILES
    gathering = 2 * LAYERS

    def trial(number: int) -> list[Kill]:
        shutil.rmtree("out")
        met = kill_until_done(kills, fork_server, [*GATHERING_COMMAND, *FLAGS, SMALL_FILES], gathering, number)
        assert contents(FOLDER) == undisturbed
        assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
        assert len(met) == kills and all(kill.steps >= gathering for kill in met), "a layer was lost"
        return met

    until_met(trial, lambda met: any(gathering < kill.steps < gathering + FILES for kill in met))


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
