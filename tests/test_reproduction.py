"""The scripts of tables and figures, run on a tiny model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from test_zero_shot import ROWS, write_rows

from olica.plots import FIGURES
from olica.tables import TABLES

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
WORDS = "seven wise owls read old books by candle light and hoot at every quick brown fox".split()


@pytest.fixture
def here(tmp_path):
    """A tiny model of eight layers, texts and rows of the seven tasks."""
    make_llama(num_key_value_heads=2, num_hidden_layers=8).save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    for stem, row in ROWS.items():
        write_rows(tmp_path / "data", stem, [row | {"idx": index} for index in range(3)])
    for seed, name in enumerate(("wikitext2_raw_test", "bookcorpus", "c4_train")):
        drawn = torch.randint(len(WORDS), (9, 90), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [{"text": " ".join(WORDS[index] for index in line)} for line in drawn]
        write_rows(tmp_path / "data", name, rows)
    return tmp_path


def run(here: Path, script: str, **variables: str) -> str:
    """What a script prints that has to succeed."""
    environment = {
        "MODEL": str(here / "tiny"),
        "DATASETS": "bookcorpus",
        "NUM_SAMPLES": "8",
        "DATA_DIR": str(here / "data"),
        "DEVICE": "cpu",
        "LIMIT": "2",
        "WINDOWS": "3",
        "RESULTS": str(here / "results"),
        "SAVE_DIR": str(here / "checkpoints"),
        "PYTHON": sys.executable,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(SCRIPTS / script)], env=os.environ | environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_table_is_made_once(here):
    printed = run(here, "table6.sh")
    results = here / "results/tiny"
    names = {path.parent.relative_to(results).as_posix() for path in results.rglob("flags")}
    assert names == {"tables/dense", "tables/sparsity-0.2", "tables/sparsity-0.2_olica-ond"}
    assert "| Fast-OND | perplexity" in printed and "the first 2 rows of each" in printed
    record = json.loads((results / "tables/sparsity-0.2_olica-ond/pruning.json").read_text())
    assert record["settings"]["recipe"] == "olica-ond" and record["calibration"]["ids"] == [8, 128]
    checkpoints = sorted(path.name for path in (here / "checkpoints").glob("*/*/config.json"))
    assert len(checkpoints) == 2
    times = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    again = run(here, "table6.sh")
    assert again.count("is recorded") == 3
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json")} == times

    # Another table shares checkpoints, other flags are measured anew, and what was pruned by the same ones is kept.
    (results / "tables/dense/flags").unlink()
    pruned = {path: path.stat().st_mtime_ns for path in (here / "checkpoints").rglob("*.safetensors")}
    assert run(here, "table2.sh", SPARSITIES="0.2", WINDOWS="2").count("is recorded") == 0
    assert {path: path.stat().st_mtime_ns for path in (here / "checkpoints").rglob("*.safetensors")} == pruned
    measured = json.loads((results / "tables/sparsity-0.2/evaluation.json").read_text())["results"]["model"]
    assert measured["perplexity"]["wikitext2"]["windows"] == 2


def test_figures_keep_no_checkpoints(here):
    printed = run(here, "figure3.sh", NUMBERS="0 2", SPARSITY="0.2")
    assert str(here / "results/tiny/figure3.png") in printed
    assert (here / "results/tiny/figure3.png").stat().st_size > 5000
    assert not list((here / "checkpoints").rglob("*.safetensors"))
    assert "figure2.png" in run(here, "figure2.sh", LAYERS="0,7")
    flags = ["--results", str(here / "results"), "--output_path", str(here / "RESULTS.md")]
    subprocess.run([sys.executable, str(SCRIPTS / "report.py"), *flags], check=True, capture_output=True)
    text = (here / "RESULTS.md").read_text()
    assert "## tiny" in text and "(results/tiny/figure3.png)" in text and "(results/tiny/figure2.png)" in text


def test_what_is_not_recorded_is_named(here):
    command = [sys.executable, str(SCRIPTS / "report.py"), "table2", "--results", str(here), "--only", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "table2: the runs that it shows are not recorded" in done.stderr


@pytest.mark.parametrize("name", [*TABLES, *FIGURES])
def test_every_table_and_figure_has_a_script_that_says_what_it_takes(name):
    head = (SCRIPTS / f"{name}.sh").read_text().split("source ")[0]
    number = re.sub(r"\D", "", name)
    assert head.startswith(f"#!/usr/bin/env bash\n# {name.capitalize().rstrip(number)} {number}: ")
    for words in ("# Command: ", "# Expected (paper): ", "# Memory and time: ", "MODEL=smollm2"):
        assert words in head, words


def test_scripts_are_sound_shell():
    for path in SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("flags", [["--layers=0,8"], ["--layers=a"]])
def test_layers_that_the_model_has_not(here, flags):
    command = [sys.executable, str(SCRIPTS / "singular_values.py"), f"--base_model={here / 'tiny'}", *flags]
    done = subprocess.run([*command, f"--output_path={here / 'x.json'}"], capture_output=True, text=True)
    assert done.returncode == 2 and "give indices from 0 to 7" in done.stderr and not (here / "x.json").exists()
