"""The real command line, killed at random moments."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked import Fork
from tiny_run import FLAGS, FOLDER, LAYERS, WORK, contents, journal, prune

ROOT = Path(__file__).parents[1]


def steps() -> int:
    """How many layers the journal has as surveyed and as pruned, and one more when all is to be moved to its place."""
    try:
        facts = journal()
    except (ValueError, FileNotFoundError):  # there is none, or it has just been removed
        return 0
    return facts.get("surveyed", {}).get("layers", 0) + facts["pruned"] + facts.get("publishing", False)


# The command line, as it is, and keeping surveys and hidden states after every layer.
COMMAND = [str(ROOT / "model_pruning.py")]
SAVING = "import runpy, sys, olica.outputs.run_folder as r; r.SAVED_EVERY = -1.0; sys.argv.pop(0); "
SAVING_COMMAND = ["-c", SAVING + "runpy.run_path(sys.argv[0], run_name='__main__')", *COMMAND]


def kill_until_done(kills: int, server: str, command: list[str]) -> list[int]:
    """Run the command, killing it so often at random moments of its work; returns how many steps were done then.

    The command is what Python is called with, in forks of the `server`.
    """
    draw, met = random.Random(kills), []
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while True:
        done, more = steps(), draw.randint(0, 3)
        with open("errors", "w+") as errors, open(os.devnull, "w") as null:
            process = Fork(server, command, environment, (0, null.fileno(), errors.fileno()))
            while len(met) < kills and process.poll() is None:
                # At work, that many steps further, and then at any moment.
                if "/s]" in Path("errors").read_text(errors="replace") and steps() >= done + more:
                    time.sleep(draw.uniform(0, 0.05))
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.001)
            process.wait()
        if process.returncode == -signal.SIGKILL and WORK.exists():
            met.append(steps())
            continue
        assert process.returncode in (0, -signal.SIGKILL), Path("errors").read_text(errors="replace")[-2000:]
        if process.returncode == 0 and len(met) >= kills:
            return met
        shutil.rmtree("out")  # it was faster than the signal: once more from the start


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
    met = kill_until_done(kills, fork_server, [*command, *FLAGS, *flags])
    assert contents(FOLDER) == undisturbed
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
    assert len(met) == kills and any(step > LAYERS for step in met), f"no kill met a finished layer: {met}"
    if kills > 10:
        assert len(set(met)) > 4, f"the kills met too few moments: {met}"
