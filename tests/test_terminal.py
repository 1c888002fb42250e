"""Terminals that cannot show all, and readers that go."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from called import call
from conftest import raising, save_tiny

import model_evaluate
from olica import progress_bar
from olica.command_line import run_command
from olica.errors import UsageError
from olica.terminal import time_in_words

ROOT = Path(__file__).parents[1]


def fill_here() -> None:
    """A tiny model and a text."""
    save_tiny("tiny", num_key_value_heads=2)
    Path("text.txt").write_text("seven wise owls " * 40)


def evaluate(*flags: str) -> dict:
    flags = ["--checkpoint=tiny", "--ppl=text.txt", "--ppl_seqlen=32", "--output_path=eval.json", *flags]
    assert call(model_evaluate, *flags) == 0
    return json.loads(Path("eval.json").read_text())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_that_cannot_show_all(here, monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    measured = evaluate("--prompt=ż ½ 文")["results"]["model"]
    printed = shown.getvalue().decode(encoding)
    sign = "+-" if encoding == "ascii" else "±"
    row = measured["perplexity"]["text.txt"]
    assert f"{row['value']:,.3f} {sign} {row['standard_error']:.3f}" in printed
    assert {"ascii": "? ? ?", "cp1252": "? ½ ?", "utf-8": "ż ½ 文"}[encoding] in printed
    assert printed.endswith("record eval.json\n")


def test_an_error_where_not_all_can_be_shown(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, encoding="ascii"))

    with pytest.raises(SystemExit) as ended:
        run_command(argparse.ArgumentParser(prog="x"), raising(UsageError("--x ½: give 1")), [])
    assert ended.value.code == 2 and shown.getvalue() == b"x: error: --x ?: give 1\n"


@pytest.mark.parametrize("buffering", [1, 8192])
def test_a_reader_that_has_gone_costs_nothing(here, monkeypatch, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)  # as after 2>&1
        record = evaluate()
    assert record["results"]["model"]["perplexity"]["text.txt"]["windows"] == 20
    assert not list(here.glob(".*"))


PRINTING = """
import argparse, sys
from olica.command_line import run_command
def run(args):
    for number in range(1000):
        print(number, "x" * 80)
    print("end", file=sys.stderr)
sys.exit(run_command(argparse.ArgumentParser(), run, []))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_first_lines_of_a_command(unbuffered, fast_python):
    """The real thing where anything is left for Python to write at the end of the process."""
    python = fast_python if unbuffered else sys.executable
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -1; echo status $?', python, PRINTING]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"0 {'x' * 80}\nstatus 0\n"
    assert done.stderr == "end\n"


def test_a_closed_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_command(argparse.ArgumentParser(), lambda args: print(torch.pi), []) == 0


def test_times_have_two_digits():
    shown = {0.333: "0.33 s", 119: "120 s", 120: "2 min", 333: "5.5 min", 7199: "120 min", 7200: "2 h", 99999: "28 h"}
    assert {seconds: time_in_words(seconds) for seconds in shown} == shown


def test_without_a_terminal_a_line_says_how_far_a_run_is_and_how_long_it_will_take(monkeypatch, capsys):
    """Of two stages of 10 layers, the first of which were done by a run before; every layer takes 20 seconds."""
    clock = iter(range(0, 10000, 20))
    now = [next(clock)]
    monkeypatch.setattr(progress_bar, "monotonic", lambda: now[0])
    with progress_bar.one_bar(20) as bar:
        bar.skip(10)
        for _ in bar.through("prune", 4, 10):
            now[0] = next(clock)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "prune: layer 6 of 10, 80% of the run, 40 s so far, about 80 s left"
    assert lines[-1] == "prune: layer 10 of 10, 100% of the run, 2 min so far, about 0 s left" and len(lines) == 3


def test_a_quiet_process_says_nothing_of_its_layers(monkeypatch, capsys):
    monkeypatch.setattr(progress_bar, "LINE_EVERY", -1)
    with progress_bar.no_bars():
        assert list(progress_bar.counted("prune", 0, 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    assert list(progress_bar.counted("prune", 0, 3)) == [0, 1, 2]
    assert capsys.readouterr().err.count("prune: layer") == 3
