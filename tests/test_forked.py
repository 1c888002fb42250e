"""The double of Python that the slow tests start their processes by."""

import os
import signal
import subprocess

import pytest


def run(python: str, *arguments: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], capture_output=True, text=True, timeout=120, **settings)


def test_a_fork_has_the_arguments_variables_folder_and_streams_of_its_call(fast_python, tmp_path):
    (tmp_path / "beside.py").write_text("NAME = __name__")
    (tmp_path / "script.py").write_text(
        "import os, sys, beside\nprint(sys.argv[1:], os.environ['A'], os.getcwd(), sys.stdin.read(), __name__)\n"
        "print(beside.NAME, file=sys.stderr)\nsys.exit(3)\n"
    )
    done = run(fast_python, "script.py", "b c", cwd=tmp_path, env=os.environ | {"A": "x"}, input="given")
    assert (done.returncode, done.stderr) == (3, "beside\n")
    assert done.stdout == f"['b c'] x {tmp_path} given __main__\n"


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("print(1)", 0, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_a_call_ends_as_its_fork_does(fast_python, code, status, error):
    done = run(fast_python, "-c", code)
    assert done.returncode == status and done.stderr.endswith(error) and bool(done.stderr) == bool(error)


def test_a_fork_knows_nothing_of_olica_and_the_next_nothing_of_it(fast_python):
    loaded = "import sys; print(any(name.split('.')[0] == 'olica' for name in sys.modules), 'torch' in sys.modules)"
    assert run(fast_python, "-c", "import sys; sys.modules['olica'] = sys").returncode == 0
    assert run(fast_python, "-c", loaded).stdout == "False True\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_handed_on(fast_python, number):
    process = subprocess.Popen(
        [fast_python, "-c", "import time; print(0, flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(30) == -number
    process.stdout.close()
