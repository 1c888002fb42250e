"""The real command lines, stopped by Ctrl-C and SIGTERM at every stage."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from called import call
from launched import RUN
from tiny_run import FLAGS, FOLDER, LAYERS, WORK, contents, journal, prune

import model_evaluate

ROOT = Path(__file__).parents[1]
PRUNING, EVALUATION = str(ROOT / "model_pruning.py"), str(ROOT / "model_evaluate.py")
# A disk that takes its time, more than a busy machine may keep this process waiting, every layer being written in the
# background, as beside a GPU; and a pause between measures that the signal ends.
SLOW_WRITING = """
import time
from olica.outputs.journal import Journal
from olica.outputs.run_folder import RunFolder
begin, write = RunFolder.begin, Journal.write
RunFolder.begin = lambda self, *args, **settings: begin(self, *args, **settings | {"in_background": True})
Journal.write = lambda self, *args: time.sleep(1) or write(self, *args)
"""
SLOW_MEASURES = """
import time
from olica.evaluation.measures import Measures
take = Measures.take
Measures.take = lambda self, *args: (take(self, *args), time.sleep(60))[0]
"""


def start(*command: str, on_ctrl_c=signal.SIG_DFL, **environment: str) -> subprocess.Popen:
    """Start a process in a group of its own, in which Ctrl-C does what it does in a terminal."""
    return subprocess.Popen(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, on_ctrl_c),
    )


def wait_for(process: subprocess.Popen, moment: Callable[[], object]) -> None:
    while not moment():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def handles_signals(process: subprocess.Popen) -> bool:
    """Whether a process handles SIGTERM: plain Python does not, and the commands do before all else.

    Where the system does not tell, it is taken to.
    """
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return True
    return bool(int(re.search(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[1], 16) >> (signal.SIGTERM - 1) & 1)


def stop(process: subprocess.Popen, number: int) -> str:
    """Send a signal and return the one line that the process must end with, dying of that signal."""
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == -number, errors
    said = [line for line in errors.splitlines() if "stopped by" in line]
    assert "Traceback" not in errors and len(said) == 1 and errors.splitlines()[-1] == said[0], errors
    return said[0].split(f"stopped by {signal.Signals(number).name}; ", 1)[1]


def test_a_stopped_pruning_says_after_which_layer_it_goes_on(here, fast_python):
    prune()
    undisturbed = contents(FOLDER)
    shutil.rmtree("out")
    process = start(fast_python, "-c", SLOW_WRITING + RUN, PRUNING, *FLAGS)
    wait_for(process, lambda: len(list(WORK.glob("shard-*.safetensors"))) >= 2)
    how = stop(process, signal.SIGINT)
    finished = journal()["pruned"]
    assert how == f"the same command goes on after {finished} of {LAYERS} layers" and 2 <= finished < LAYERS
    assert [path.name for path in Path("out").iterdir()] == [WORK.name], "the lock is released"
    assert prune() == 0
    assert contents(FOLDER) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_takes_up_what_was_measured(here, fast_python, caplog, number):
    Path("held.txt").write_text("seven wise owls read old books by candle light\n" * 20)
    flags = [EVALUATION, "--checkpoint=tiny", "--ppl=held.txt", "--ppl_seqlen=64", "--output_path=out.json"]
    process = start(fast_python, "-c", SLOW_MEASURES + RUN, *flags)
    wait_for(process, Path(".out.json.measures").exists)
    assert stop(process, number) == "the same command takes up what was measured, the last being model: sizes"
    assert call(model_evaluate, *flags[1:]) == 0
    assert "measured before: 1" in caplog.text
    assert Path("out.json").exists() and not Path(".out.json.measures").exists()


@pytest.mark.parametrize("script", [PRUNING, EVALUATION])
@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_a_stop_while_libraries_are_imported_says_a_line_too(here, script, seconds):
    process = start(sys.executable, script, *(FLAGS if script == PRUNING else []))
    wait_for(process, lambda: handles_signals(process))
    time.sleep(seconds)
    assert stop(process, signal.SIGINT) == "give the same command again"
    assert not Path("out").exists()


def test_of_several_processes_one_speaks(here):
    process = start(sys.executable, EVALUATION, RANK="1")
    wait_for(process, lambda: handles_signals(process))
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


WAITING = (
    "import olica_stopping, time; "
    "olica_stopping.end_with(lambda: print('at work', flush=True) or time.sleep({seconds}) or 0)"
)


def test_ctrl_c_stops_a_shell_script_that_calls_the_command(here):
    script = 'for sparsity in 0.2 0.3; do "$@"; echo "status $?"; done'
    process = start("bash", "-c", script, "script", sys.executable, "-c", WAITING.format(seconds=60))
    assert process.stdout.readline() == "at work\n"
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert printed == "" and errors.count("stopped by SIGINT") == 1, (printed, errors)


def test_a_command_in_the_background_goes_on_ignoring_ctrl_c(here):
    process = start(sys.executable, "-c", WAITING.format(seconds=0.5), on_ctrl_c=signal.SIG_IGN)
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_a_signal_that_a_library_takes_for_an_error_of_its_own_ends_the_command(tmp_path):
    """Code in C may replace what the handler raises, and a reader then blames its file."""
    (tmp_path / "command.py").write_text(
        "import os, signal, sys, olica_stopping\n"
        "def command():\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except KeyboardInterrupt:\n        sys.exit(2)\n"
        "olica_stopping.end_with(command)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "command.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGTERM and "stopped by SIGTERM" in done.stderr
