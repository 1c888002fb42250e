"""scripts/everything.sh: its stages name commands that are there, with flags that they have, and run each once."""

import os
import subprocess
from pathlib import Path

from called import load

ROOT = Path(__file__).parents[1]
# In place of Python: it writes down how it was called, and the record that it was asked for.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "${*//$'\\n'/ }" >> "$CALLS"
while [ $# -gt 0 ]; do
    if [ "$1" = --output_path ]; then mkdir -p "$(dirname "$2")"; touch "$2"; fi
    if [ "$1" = --save_dir ]; then mkdir -p "$2"; fi
    shift
done
"""


def run_stages(tmp_path: Path, *stages: str, **variables: str) -> list[str]:
    """Run stages with the stub, in a folder in which others may have been run before; what it was called with."""
    stub, calls, script = tmp_path / "python", tmp_path / "calls", tmp_path / "copy/everything.sh"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for folder in ("scripts", "benchmarks"):
        (tmp_path / folder).unlink(missing_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    script.parent.mkdir(exist_ok=True)
    script.write_text((ROOT / "scripts/everything.sh").read_text())
    calls.write_text("")
    environment = {"CALLS": str(calls), "PYTHON": str(stub), "SHARED": str(tmp_path), "RESULTS": "records"}
    done = subprocess.run(
        ["bash", str(script), *stages], env=os.environ | environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if " took " in line] == [
        f"== {stage} took 0 minutes" for stage in stages
    ]
    return calls.read_text().splitlines()


def test_benchmarks_are_run_once_with_flags_that_they_have(tmp_path):
    stages = ("choices", "speed", "shapes")
    commands = [line.split() for line in run_stages(tmp_path, *stages) if not line.startswith("-c ")]
    assert {"benchmarks/ablation.py", "benchmarks/pruning_speed.py", "model_pruning.py"} <= {c[0] for c in commands}
    for script, *flags in commands:
        load(script).build_parser().parse_args(flags)
    again = run_stages(tmp_path, *stages)
    assert not any("--output_path" in line for line in again), "what is recorded is not run again"


def test_a_stage_that_is_not_there_ends_it(tmp_path):
    command = ["bash", str(ROOT / "scripts/everything.sh"), "all"]
    done = subprocess.run(command, env=os.environ | {"SHARED": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.partition(";")[0]) == (2, "all is no stage")


def test_without_texts_it_says_what_to_give():
    environment = {name: value for name, value in os.environ.items() if name != "SHARED"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/everything.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and "SHARED" in done.stderr
