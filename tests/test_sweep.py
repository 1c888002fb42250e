"""Sweeps: points, what is held back, stopped ones, and wrong input."""

import json
import math
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from called import call
from conftest import load_weights, make_tokenizer, refused
from launched import start
from safetensors.torch import load_file
from tiny_sweep import (
    FLAGS,
    FOLDER,
    HELD,
    PLAIN_FLAGS,
    SAMPLES,
    SPARSITIES,
    TOKENS,
    bare,
    fill_with_sweep,
    sweep,
    swept,
    without_times,
    write_text,
)
from tiny_tasks import ROWS, write_rows
from transformers import AutoModelForCausalLM

import model_pruning
import olica
from olica.errors import UsageError
from olica.evaluation import measures
from olica.methods.damage import LeastDamage
from olica.settings import Settings, settings_of
from olica.sources.calibration_set import CalibrationSet, Draw, build_calibration_set, held_back, without
from olica.sweeping import work as sweep_module
from olica.sweeping.commands import command_of

ROOT = Path(__file__).parents[1]
fill_here = fill_with_sweep


def plain_nll(folder: str | Path, ids: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of every window by the library's own loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        return [model(window[None], labels=window[None]).loss.item() for window in ids]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


# Points.


def test_points_are_those_of_separate_prunings(here):
    assert bare(*PLAIN_FLAGS, SPARSITIES, "--keep", "--recipe=olica-plus", "--sparsity_of=layers") == 0
    record = json.loads(Path("out/tiny_sweep_of-layers_olica-plus/sweep.json").read_text())
    (draw,) = [
        ids for path in Path("data/calibration").iterdir()
        if len(ids := load_file(path)["calibration_ids"]) == SAMPLES + HELD
    ]  # fmt: skip
    dense = plain_nll("tiny", draw[SAMPLES:])
    assert [point["sparsity"] for point in record["points"]] == [0.1, 0.2, 0.3]
    shutil.rmtree("data")
    for point in record["points"]:
        kept = Path(f"out/tiny_sparsity-{point['sparsity']:g}_of-layers_olica-plus")
        words = shlex.split(point["command"])
        assert words[:2] == ["python", "model_pruning.py"]
        again = [*words[2:], "--save_dir=alone"]
        assert call(model_pruning, *again) == 0
        assert contents(kept) and contents(kept) == contents(Path("alone") / kept.name)
        nll = plain_nll(kept, draw[SAMPLES:])
        ratio = math.exp(sum(nll) / HELD - sum(dense) / HELD)
        assert point["ratio"] == pytest.approx(ratio, rel=1e-4)
        weights = load_weights(kept)
        for index, layer in enumerate(point["layers"]):
            of_layer = {name: w.numel() for name, w in weights.items() if f"layers.{index}." in name}
            counted = Counter()
            for name, number in of_layer.items():
                part = next((part for part in ("mlp", "q_proj", "k_proj", "v_proj", "o_proj") if part in name), "")
                counted[part] += number
            assert layer["mlp"] + layer["correction"] == counted["mlp"]
            assert layer["query_key"] == counted["q_proj"] + counted["k_proj"]
            assert layer["value_output"] == counted["v_proj"] + counted["o_proj"]
        assert point["parameters"]["total"] == sum(w.numel() for w in weights.values())
    damage = [sum(point["damage"]) for point in record["points"]]
    assert 0 < damage[0] < damage[1] < damage[2], "what does least damage does more where more has to go"


def test_corrections_are_counted_beside_the_mlp(here):
    """Two of D r parameters; by a recipe whose survey knows no damage."""
    (point,) = sweep("--sparsity=0.2")["points"]
    added = [layer["correction"] for layer in point["layers"]]
    assert sorted(added) == [0, 0, 2 * 64 * round(0.1 * 64)]
    assert point["damage"] is None


def test_a_size_that_stays_dense_does_no_damage():
    """The damage of a plan is read from the findings at the sizes of the parts."""
    allocate = LeastDamage((_Part("one"), _Part("two")), is_uniform=False)
    findings = [{"one": torch.tensor([9.0, 4.0, 0.0]), "two": torch.tensor([7.0, 1.0, 0.0])}] * 2
    assert allocate.damage([None] * 2, [{"one": 1, "two": 0}, {"one": 2, "two": 2}], findings) == [4.0 + 7.0, 0.0]


class _Part:
    """A part of three sizes, in a shape that is a dictionary."""

    def __init__(self, name: str):
        self.name = name

    def candidates(self, layer, round_to):
        return [0, 1, 2]

    def shape(self, shape, layer, size):
        return shape | {self.name: size}


def test_checkpoints_go_once_they_are_measured(here):
    sweep(SPARSITIES)
    assert {path.name for path in FOLDER.iterdir()} == {"sweep.json", "sweep.html"}
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]
    assert len([*Path("data/surveys").iterdir()]) == 1, "points share one survey"


def test_checkpoints_are_kept_by_a_later_sweep_too(here):
    sweep("--sparsity=0.1,0.2")
    record = sweep("--sparsity=0.1,0.2", "--keep")
    for point in record["points"]:
        kept = load_weights(Path("out") / f"tiny_sparsity-{point['sparsity']:g}")
        assert sum(weight.numel() for weight in kept.values()) == point["parameters"]["total"]


def test_a_checkpoint_in_the_way_is_refused_before_anything_is_measured(here, capsys):
    Path("out/tiny_sparsity-0.2").mkdir(parents=True)
    assert "out/tiny_sparsity-0.2 exists already" in refused(capsys, sweep, "--sparsity=0.1,0.2", "--keep")
    assert not (FOLDER / "sweep.json").exists() and not Path("out/tiny_sparsity-0.1").exists()


@pytest.mark.parametrize(
    "asked",
    [
        {"recipe": "olica-plus"},
        {"recipe": "olica-plus", "datasets": "pydoc"},
        {"recipe": "olica-plus", "datasets": "pydoc", "num_samples": 768},
        {"recipe": "olica-plus", "datasets": Settings(recipe="olica-plus").datasets, "num_samples": 128},
        {"recipe": "olica", "num_samples": 768, "mlp_num": "3", "add_bos_token": True},
    ],
)
def test_a_points_command_asks_for_the_same_pruning(asked):
    settings = settings_of({"base_model": "tiny"} | asked)
    words = shlex.split(command_of("model_pruning.py", settings, sparsity="0.2"))
    parsed = vars(model_pruning.build_parser().parse_args(words[2:]))
    given = {name: value for name, value in parsed.items() if name not in ("sparsity", "dry_run", "verbose")}
    assert settings_of(given) == settings


def test_from_python(here):
    settings = dict(datasets="text.jsonl", num_samples=SAMPLES, seqlen=TOKENS, held_back=HELD, mlp_num=1, ratio=0.1)
    done = olica.sweep("tiny", sparsity=[0.2, 0.1], save_dir="out", **settings)
    assert done.page == FOLDER / "sweep.html" and done.page.is_file()
    assert [point["sparsity"] for point in done.record["points"]] == [0.1, 0.2]
    shutil.rmtree("out")  # or the record would be taken up
    assert without_times(json.loads(json.dumps(done.record))) == without_times(sweep("--sparsity=0.1,0.2"))
    with pytest.raises(UsageError, match=r"^there is no argument held_bak; did you mean held_back.*\?$"):
        olica.sweep("tiny", held_bak=3)
    with pytest.raises(UsageError, match="^there is no argument dry_run: it is a flag of .*model_sweep.py alone$"):
        olica.sweep("tiny", dry_run=True)


def test_a_dry_run_writes_nothing(here, capsys):
    before = sorted(Path().rglob("*"))
    assert bare(*FLAGS, SPARSITIES, "--dry_run", "--keep") == 0
    assert sorted(Path().rglob("*")) == before
    said = capsys.readouterr().out
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("tiny").parameters())
    assert re.search(rf"dense +{dense:,}", said)
    assert [line.split()[0] for line in said.splitlines()[2:5]] == ["0.1", "0.2", "0.3"]
    assert "peak memory" in said and "GB of checkpoints stay" in said


@pytest.mark.usefixtures("stock_tasks")
def test_tasks_are_scored_at_every_point(here):
    write_rows(here / "data", "piqa_validation", [ROWS["piqa_validation"] | {"idx": index} for index in range(5)])
    record = sweep("--sparsity=0.2", "--tasks=piqa", "--limit=3")
    hits = [len(model["zero_shot"]["tasks"]["piqa"]["hits"]["acc"]) for model in (record["dense"], *record["points"])]
    assert hits == [3, 3]
    shown = (FOLDER / "sweep.html").read_text()
    assert "piqa acc_norm" in shown and "Rows: the first 3 rows of each." in shown


# What is held back.


def rows_in(ids: torch.Tensor) -> set[str]:
    """The rows of `write_text` that windows are of, by mark and number."""
    found = set()
    for window in make_tokenizer().batch_decode(ids):
        (row,) = set(re.findall(r"[ab]\d{3}(?= )", window))
        found.add(row)
    return found


def drawn(source: str, samples: int, candidates: int = 1) -> CalibrationSet:
    draw = Draw(samples, TOKENS, seed=3, candidates=candidates)
    return build_calibration_set(source, make_tokenizer(), draw, None, Path("drawn"), 320)


def test_no_row_calibrates_and_measures(here):
    write_text("other.jsonl", "b")

    calibration = drawn("text.jsonl+other.jsonl", SAMPLES)
    ids = held_back(drawn("text.jsonl+other.jsonl", SAMPLES + HELD), calibration)
    assert ids.shape == (2 * HELD, TOKENS)
    measured, calibrated = rows_in(ids), rows_in(calibration.ids)
    assert len(measured) == 2 * HELD and len(calibrated) == 2 * SAMPLES and not measured & calibrated
    assert Counter(row[0] for row in measured) == {"a": HELD, "b": HELD}


def test_no_candidate_is_measured(here):
    calibration, pool = drawn("text.jsonl", 2, candidates=3), drawn("text.jsonl", 6)
    ids = held_back(drawn("text.jsonl", 6 + HELD), calibration, candidates=3)
    assert len(ids) == HELD and len(calibration.ids) == 2
    assert not rows_in(ids) & rows_in(pool.ids) and rows_in(calibration.ids) < rows_in(pool.ids)


def test_a_sweep_measures_no_candidate(here):
    record = sweep("--sparsity=0.2", "--candidates=2")
    (source,) = record["held_back"]["sources"]
    assert source["accepted"] == 2 * SAMPLES + HELD and record["settings"]["candidates"] == 2
    assert "--candidates 2" in record["points"][0]["command"]


def test_windows_of_the_calibration_set_are_left_out():
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [3, 4]])
    assert without(ids, torch.tensor([[3, 4], [6, 5]])).tolist() == [[1, 2], [5, 6]]
    assert without(ids, ids).shape == (0, 2)


def test_a_token_file_wants_other_text(here, capsys):
    sweep("--sparsity=0.2")
    (tokens,) = [p for p in Path("data/calibration").iterdir() if len(load_file(p)["calibration_ids"]) == SAMPLES]
    first = json.loads((FOLDER / "sweep.json").read_text())["points"][0]
    assert "--held_back_datasets" in refused(capsys, sweep, f"--datasets={tokens}", "--save_dir=other")
    with_text = ["--held_back_datasets=text.jsonl", "--save_dir=other", "--sparsity=0.2"]
    assert bare(*FLAGS, f"--datasets={tokens}", *with_text) == 0
    record = json.loads(Path("other/tiny_sweep/sweep.json").read_text())
    assert record["points"][0]["plan"] == first["plan"]
    assert record["held_back"]["ids"][0] <= HELD
    same = [f"--datasets={tokens}", f"--held_back_datasets={tokens}", "--save_dir=third"]
    assert "all of its samples are in the calibration set" in refused(capsys, sweep, *same)


# Stopped sweeps.


@pytest.fixture
def undisturbed(here) -> dict:
    return swept()


@pytest.mark.parametrize("at", ["pruning", "measuring", "removing"])
def test_an_interrupted_sweep_goes_on_to_the_same_record(undisturbed, monkeypatch, at):
    """At the second point; finished ones, and what was pruned but not measured, are not done again."""
    module, name = {
        "pruning": (sweep_module, "run"),
        "measuring": (measures, "perplexity"),
        "removing": (sweep_module.shutil, "rmtree"),
    }[at]
    real, made, pruned = getattr(module, name), [], []
    stop_at = {"pruning": 2, "measuring": 3, "removing": 2}[at]

    def stopping(*arguments, **settings):
        if at != "removing" or Path(arguments[0]).name.startswith("tiny_sparsity-"):
            made.append(1)
            if len(made) == stop_at:
                raise KeyboardInterrupt
        return real(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, stopping)
        with pytest.raises(KeyboardInterrupt) as stopped:
            sweep(SPARSITIES)
    done = 2 if at == "removing" else 1
    assert any(f"{done} of the points are measured" in note for note in stopped.value.__notes__)
    assert len(json.loads((FOLDER / "sweep.json").read_text())["points"]) == done
    run = sweep_module.run
    monkeypatch.setattr(sweep_module, "run", lambda job: pruned.append(job.settings.sparsity) or run(job))
    assert without_times(sweep(SPARSITIES)) == undisturbed
    assert pruned == {"pruning": [0.2, 0.3], "measuring": [0.3], "removing": [0.3]}[at]
    assert {path.name for path in FOLDER.iterdir()} == {"sweep.json", "sweep.html"}
    pruned.clear()
    assert without_times(sweep(SPARSITIES)) == undisturbed
    assert pruned == []


def test_a_killed_sweep_goes_on_to_the_same_record(here, fork_server):
    """SIGKILL, as soon as the record has the dense model, and again when it has a point."""
    command, path = [str(ROOT / "model_sweep.py"), *FLAGS, "--sparsity=0.1,0.2"], FOLDER / "sweep.json"

    def until(points: int) -> int:
        """The status of the command, killed when so many points are there."""
        process = start(fork_server, command, Path("errors"))
        while process.poll() is None:
            if path.is_file() and len(json.loads(path.read_text())["points"]) >= points:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        return process.wait()

    assert until(math.inf) == 0, Path("errors").read_text()
    undisturbed = without_times(json.loads(path.read_text()))
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    assert (until(0), until(1)) == (-signal.SIGKILL, -signal.SIGKILL), Path("errors").read_text()
    assert until(math.inf) == 0, Path("errors").read_text()
    assert without_times(json.loads(path.read_text())) == undisturbed
    assert {one.name for one in FOLDER.iterdir()} == {"sweep.json", "sweep.html"}


def test_a_longer_sweep_takes_up_the_points_of_a_shorter(here, monkeypatch):
    sweep("--sparsity=0.1")
    pruned, run = [], sweep_module.run
    monkeypatch.setattr(sweep_module, "run", lambda job: pruned.append(job.settings.sparsity) or run(job))
    record = sweep("--sparsity=0.1,0.2")
    assert pruned == [0.2] and [point["sparsity"] for point in record["points"]] == [0.1, 0.2]


def test_another_sweep_is_not_gone_on_with(here, capsys):
    first = sweep("--sparsity=0.2")
    message = refused(capsys, sweep, "--sparsity=0.2", "--percdamp=0.3")
    assert "made with another --percdamp (0.5, now 0.3)" in message and "--overwrite" in message
    assert "held-back text" in refused(capsys, sweep, "--sparsity=0.2", "--held_back=9")
    replaced = sweep("--sparsity=0.3", "--percdamp=0.3", "--overwrite")
    assert [point["sparsity"] for point in replaced["points"]] == [0.3] and first["points"][0]["sparsity"] == 0.2
    (FOLDER / "sweep.json").write_text("{}")
    assert "is no record of a sweep" in refused(capsys, sweep, "--sparsity=0.2")


# Wrong input.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sparsity=0.1:0.5"], "give a range START:END:STEP"),
        (["--sparsity=0.1:x:0.1"], "give a range START:END:STEP"),
        (["--sparsity=often"], "give a range START:END:STEP"),
        (["--sparsity="], "give a range START:END:STEP"),
        (["--sparsity=0.5:0.1:0.1"], "END must be no less than START"),
        (["--sparsity=0.1:0.5:0"], "STEP at least 0.001"),
        (["--sparsity=0.1:0.5:nan"], "STEP at least 0.001"),
        (["--sparsity=0.5:1:0.25"], "1 is outside [0, 1)"),
        (["--sparsity=-0.1,0.2"], "-0.1 is outside [0, 1)"),
        (["--sparsity=nan"], "outside [0, 1)"),
        (["--sparsity=0.2,0.2"], "a sparsity is there twice"),
        (["--sparsity=0.99"], "the largest possible is"),
        (["--target_ppl_ratio=1.2", "--max_params=1M"], "--target_ppl_ratio and --max_params are both given"),
        (["--target_ppl_ratio=1"], "give a ratio above 1"),
        (["--target_ppl_ratio=inf"], "give a ratio above 1"),
        (["--target_ppl_ratio=bad"], "--target_ppl_ratio bad: give a number"),
        (["--max_params=many"], "--max_params many: give a number of parameters"),
        (["--max_params=0"], "--max_params 0: give a number of parameters"),
        (["--tolerance=0"], "--tolerance 0 is outside"),
        (["--held_back=0"], "--held_back is 0"),
        (
            ["--held_back=1000"],
            "--held_back 1000, which goes on top of --num_samples: --datasets text.jsonl has too few",
        ),
        (["--held_back_datasets=nowhere.jsonl"], "nowhere.jsonl"),
        (["--limit=0"], "--limit 0 must be"),
        (["--datasets=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_input_ends_in_a_sentence(here, capsys, flags, words):
    assert words in refused(capsys, sweep, *flags)
    assert not FOLDER.exists()
