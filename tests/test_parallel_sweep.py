"""Points of a sweep that processes share."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from launched import RUN, Ended, end_of, started
from tiny_sweep import FLAGS, FOLDER, SPARSITIES, fill_with_sweep, sweep, swept, without_times

ROOT = Path(__file__).parents[1]
fill_here = fill_with_sweep


@pytest.fixture
def undisturbed(here) -> dict:
    return swept()


# Says to which sparsities a process prunes. At STOP, a sparsity, it is killed when it has pruned, or fails.
SHARED = """
import os, signal
from olica.errors import UsageError
from olica.sweeping import work
real = work.run
def run(job):
    done = real(job)
    print("made", job.settings.sparsity, flush=True)
    how, _, at = os.environ.get("STOP", "").partition(" ")
    if at == str(job.settings.sparsity):
        if how == "fail":
            raise UsageError("it is too hot")
        os.kill(os.getpid(), signal.SIGKILL)
    return done
work.run = run
"""


SHARED_COMMAND = ["-c", SHARED + RUN, str(ROOT / "model_sweep.py"), *FLAGS, SPARSITIES]


def made_by(ended: Ended) -> list[float]:
    return [float(line.split()[1]) for line in ended.out.splitlines() if line.startswith("made")]


def test_two_processes_share_the_points(here, undisturbed, fork_server):
    """To the same record, and of what one says the other repeats nothing."""
    main, other = end_of(started(fork_server, SHARED_COMMAND))
    assert (main.status, other.status) == (0, 0), main.errors[-1500:] + other.errors[-1500:]
    # The dense model is the first of four tasks.
    assert (made_by(main), made_by(other)) == ([0.2], [0.1, 0.3])
    assert without_times(json.loads((FOLDER / "sweep.json").read_text())) == undisturbed
    assert {path.name for path in FOLDER.iterdir()} == {"sweep.json", "sweep.html"}
    assert len(re.findall("(?m)^sparsity ", main.out)) == 3 and "in each of 2 processes" in main.out
    assert all(line.startswith("made") for line in other.out.splitlines())
    assert "perplexity" in main.errors and "perplexity" not in other.errors


def test_two_processes_search_for_a_target(here, fork_server):
    alone = sweep(SPARSITIES, "--max_params=135000")
    shutil.rmtree("out")
    ended = end_of(started(fork_server, [*SHARED_COMMAND, "--max_params=135000"]))
    assert [one.status for one in ended] == [0, 0], ended[0].errors
    assert without_times(json.loads((FOLDER / "sweep.json").read_text())) == without_times(alone)


@pytest.mark.parametrize(("sparsity", "killed"), [(0.1, 1), (0.2, 0), (0.3, 1)])
@pytest.mark.parametrize("later", [1, 2])
def test_a_kill_of_either_process_ends_both_and_any_number_goes_on(
    here, undisturbed, fork_server, monkeypatch, sparsity, killed, later
):
    """In the first round, whose other half is the dense model, and in the second; nothing is pruned again."""
    monkeypatch.setenv("STOP", f"kill {sparsity}")
    ended = end_of(started(fork_server, SHARED_COMMAND))
    assert ended[killed].status == -signal.SIGKILL and ended[1 - killed].status == 2
    said = [line for line in ended[1 - killed].errors.splitlines() if "error: " in line]
    assert len(said) == 1 and "another of the 2 processes has ended" in said[0]
    monkeypatch.delenv("STOP")
    again = end_of(started(fork_server, SHARED_COMMAND, later))
    assert all(one.status == 0 for one in again), again[0].errors
    made = [made_by(one) for one in (*ended, *again)]
    assert sorted(sum(made, [])) == [0.1, 0.2, 0.3]
    assert without_times(json.loads((FOLDER / "sweep.json").read_text()))["points"] == undisturbed["points"]
    assert {path.name for path in FOLDER.iterdir()} == {"sweep.json", "sweep.html"}


def test_what_the_others_have_made_is_recorded_where_one_fails(here, fork_server, monkeypatch):
    monkeypatch.setenv("STOP", "fail 0.2")
    ended = end_of(started(fork_server, SHARED_COMMAND))
    assert [one.status for one in ended] == [2, 2]
    said = [line for one in ended for line in one.errors.splitlines() if "error: " in line]
    assert len(said) == 1 and said[0].endswith("error: it is too hot")
    record = json.loads((FOLDER / "sweep.json").read_text())
    assert [point["sparsity"] for point in record["points"]] == [0.1, 0.3] and (FOLDER / "sweep.html").is_file()


def test_two_processes_end_in_one_sentence(here, fork_server):
    ended = end_of(started(fork_server, [*SHARED_COMMAND, "--max_params=135000", "--target_ppl_ratio=2"]))
    assert [one.status for one in ended] == [2, 2]
    FOLDER.mkdir(parents=True)
    (FOLDER / "sweep.json").write_text("{}")
    ended = end_of(started(fork_server, SHARED_COMMAND))
    assert [one.status for one in ended] == [2, 2]
    said = [line for one in ended for line in one.errors.splitlines() if "error: " in line]
    assert len(said) == 1 and "is no record of a sweep; give --overwrite" in said[0]
