"""Pruning in several processes: the samples are shared, the sums added, the solves shared out; one writes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import fill_with_run, load_weights
from launched import COMMAND, RUN, Ended, end_of, environment, started
from safetensors.torch import save_file
from tiny_run import LAYERS, PLAIN_FLAGS, contents

import olica
from olica.methods.moments import Moments, cosine, cross, diagonal, full, per_head, total
from olica.processes import Processes

ROOT = Path(__file__).parents[1]
CORRECTING = {"mlp_num": 2, "ratio": 0.1}
RECIPES = {"olica": CORRECTING, "olica-grouped": CORRECTING, "olica-plus": {}, "flap": {}, "slimgpt": {}}
# Of 7 samples one process has 3 and one 4; in batches of 3.
SAMPLES, BATCH = 7, 3
FLAGS = [*PLAIN_FLAGS, f"--batch_size={BATCH}"]
# What may differ from a single process, in a tensor's largest number: another --batch_size changes the value heads of
# olica-plus, whose basis is one of eigenvectors, by 1.6e-5, and all else by less.
ROUNDING = 4e-5
SECONDS_TO_END = 20


def flags_of(recipe: str) -> list[str]:
    return [*FLAGS, f"--recipe={recipe}", *(f"--{name}={value}" for name, value in RECIPES[recipe].items())]


def run(server: str, *flags: str, recipe: str = "olica", count: int = 2, changed: str = "") -> list[Ended]:
    """The command in several processes; `changed` is code that is run before it."""
    arguments = ["-c", changed + RUN, *COMMAND] if changed else COMMAND
    return end_of(started(server, [*arguments, *flags_of(recipe), *flags], count))


def succeeded(ended: list[Ended]) -> list[Ended]:
    assert all(one.status == 0 for one in ended), [one.errors[-2000:] for one in ended]
    return ended


def assert_alike(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """That weights are the expected ones to rounding."""
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        largest = weight.abs().max().item()
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=ROUNDING * largest, msg=name)


def the_sentence_of(ended: list[Ended]) -> str:
    """The one sentence that one of the processes says of why all end, and nothing else that is an error."""
    lines = [line for one in ended for line in one.errors.splitlines() if line and "Writing model shards" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("model_pruning.py: error: ")
    return lines[0]


# Every recipe twice, inside a process group that is there.
CALLS = f"""
import sys
import torch
from olica import prune
torch.distributed.init_process_group("gloo")
for recipe, parameters in {RECIPES}.items():
    for time in ("first", "second"):
        done = prune("tiny", datasets="ids.safetensors", recipe=recipe, batch_size={BATCH}, save_dir=time,
                     data_dir="data-" + time, **parameters)
        print(recipe, done.folder, done.plan, done.record["processes"])
"""


@pytest.fixture(scope="module")
def twice(fork_server, tmp_path_factory) -> Path:
    """A folder in which two processes have pruned twice by each recipe."""
    folder = tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        fill_with_run(folder, SAMPLES)
        main, other = succeeded(end_of(started(fork_server, ["-c", CALLS])))
    assert main.out == other.out and main.out.count("\n") == 2 * len(RECIPES)
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """An empty current folder with a tiny model and a calibration set."""
    monkeypatch.chdir(tmp_path)
    fill_with_run(tmp_path, SAMPLES)
    return tmp_path


def folder_of(recipe: str) -> str:
    return "tiny_sparsity-0.2" + ("" if recipe == "olica" else f"_{recipe}")


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_give_the_weights_of_one_and_the_same_bits_again(there, twice, recipe):
    two = twice / "first" / folder_of(recipe)
    assert contents(two) == contents(twice / "second" / folder_of(recipe))
    alone = olica.prune("tiny", datasets="ids.safetensors", recipe=recipe, batch_size=BATCH, **RECIPES[recipe])
    record = json.loads((two / "olica_run.json").read_text())
    assert record["plan"] == alone.record["plan"] and record["corrected_layers"] == alone.record["corrected_layers"]
    assert (record["processes"], alone.record["processes"]) == (2, 1)
    assert record["identity"] != alone.record["identity"]
    weights, expected = load_weights(two), load_weights(alone.folder)
    assert_alike(weights, expected)
    assert any(not torch.equal(weights[name], expected[name]) for name in expected), "the sums were not shared"


# Ends one process by a signal before it keeps a layer of the survey or of the cut; keeps states after every layer.
KILLED = """
import os, sys
import olica.outputs.run_progress as saved
from olica.pruning import layers, survey
saved.SAVED_EVERY = -1.0
module, name, place, index, rank, number = survey, "keep_survey", *os.environ["KILLED"].split()
if place == "cut":
    module, name = layers, "keep_layer"
keep = getattr(module, name)
def killing(work, progress, what, *others):
    layer = what if place == "cut" else len(what.findings) - 1
    if (layer, work.options.processes.index) == (int(index), int(rank)):
        os.kill(os.getpid(), int(number))
    keep(work, progress, what, *others)
setattr(module, name, killing)
"""


@pytest.mark.parametrize(
    ("recipe", "place", "layer", "rank"),
    [("olica-plus", "survey", 3, 1), ("olica-plus", "cut", 3, 0), ("olica", "cut", 2, 1), ("flap", "survey", 2, 0)],
)
def test_a_kill_of_either_ends_both_and_the_same_command_goes_on(
    there, twice, fork_server, monkeypatch, recipe, place, layer, rank
):
    monkeypatch.setenv("KILLED", f"{place} {layer} {rank} {signal.SIGKILL.value}")
    ended = run(fork_server, recipe=recipe, changed=KILLED)
    killed, other = ended[rank], ended[1 - rank]
    assert killed.status == -signal.SIGKILL and other.status == 2
    assert other.at - killed.at < SECONDS_TO_END
    assert "another of the 2 processes has ended" in the_sentence_of(ended)
    assert not Path("out", folder_of(recipe)).exists()
    if place == "cut":
        (alone,) = run(fork_server, recipe=recipe, count=1)
        assert alone.status == 2 and "another number of processes (2, now 1)" in alone.errors
    main, other = succeeded(run(fork_server, recipe=recipe))
    assert "saved" in main.out and not other.out
    assert contents(Path("out", folder_of(recipe))) == contents(twice / "first" / folder_of(recipe))
    record = json.loads(Path("out", folder_of(recipe), "olica_run.json").read_text())
    assert record["went_on_after"] == ([layer] if place == "cut" else [])
    if recipe != "olica":
        assert record["survey"]["layers_taken_up"] == (LAYERS if place == "cut" else layer)


# Does not keep the second layer of the cut before a signal comes.
HELD = """
import time
from olica.pruning import layers
keep = layers.keep_layer
def holding(work, progress, index, *others):
    if index == 1:
        time.sleep(60)
    keep(work, progress, index, *others)
layers.keep_layer = holding
"""


def test_a_signal_that_stops_both_is_said_once(there, fork_server):
    forks = started(fork_server, ["-c", HELD + RUN, *COMMAND, *flags_of("olica")])
    while not list(Path("out").glob(".*.partial/progress.json")) and all(fork.poll() is None for fork in forks):
        time.sleep(0.01)
    for fork in forks:
        fork.send_signal(signal.SIGTERM)
    ended = end_of(forks)
    assert all(one.status != 0 for one in ended)
    said = "".join(one.errors for one in ended)
    assert said.count("model_pruning.py: stopped by SIGTERM; ") == 1


# A process that has memory for so many samples at a time.
SMALL = f"""
import os, sys
sys.path.append({str(ROOT / "tests")!r})
from conftest import no_memory_for_more_than
from olica.sources.dense_model import DenseModel, StreamedModel
layers, rank, samples = StreamedModel.layers, *map(int, os.environ["SMALL"].split())
def with_little_memory(self, *arguments, **named):
    for index, layer in layers(self, *arguments, **named):
        if os.environ["RANK"] == str(rank):
            layer.mlp.register_forward_pre_hook(no_memory_for_more_than(samples))
        yield index, layer
StreamedModel.layers = with_little_memory
"""


def test_a_process_without_memory_halves_its_batch(there, twice, fork_server, monkeypatch):
    monkeypatch.setenv("SMALL", "1 1")
    _, other = succeeded(run(fork_server, changed=SMALL))
    assert "out of memory: going on with --batch_size 1" in other.errors
    record = json.loads(Path("out", folder_of("olica"), "olica_run.json").read_text())
    assert record["batch_size"] == 1
    assert_alike(load_weights(Path("out", folder_of("olica"))), load_weights(twice / "first" / folder_of("olica")))


@pytest.mark.parametrize("rank", [0, 1])
def test_one_without_memory_for_a_single_sample_ends_both(there, fork_server, monkeypatch, rank):
    monkeypatch.setenv("SMALL", f"{rank} 0")
    ended = run(fork_server, "--batch_size=1", changed=SMALL)
    assert [one.status for one in ended] == [2, 2]
    assert abs(ended[0].at - ended[1].at) < SECONDS_TO_END
    assert "out of memory" in the_sentence_of(ended)
    assert not Path("out").exists()


def test_a_process_may_have_no_probe(there, fork_server):
    flags = [*FLAGS, "--recipe=olica-plus", "--probes=1", "--save_dir=out"]
    folder = Path("out", folder_of("olica-plus"))
    succeeded(end_of(started(fork_server, [*COMMAND, *flags])))
    shared = load_weights(folder)
    shutil.rmtree("out")
    shutil.rmtree("data", ignore_errors=True)  # with the survey
    (alone,) = end_of(started(fork_server, [*COMMAND, *flags], 1))
    assert alone.status == 0
    assert_alike(shared, load_weights(folder))


def test_what_all_find_wrong_is_said_once(there, fork_server):
    ended = run(fork_server, "--sparsity=0.99")
    assert [one.status for one in ended] == [2, 2] and "--sparsity 0.99" in the_sentence_of(ended)


def test_a_folder_that_is_there_is_refused_once(there, fork_server):
    Path("out", folder_of("olica")).mkdir(parents=True)
    ended = run(fork_server)
    assert [one.status for one in ended] == [2, 2] and "--overwrite" in the_sentence_of(ended)


def test_more_processes_than_samples_are_refused(there, fork_server):
    save_file({"calibration_ids": torch.ones(2, 32, dtype=torch.long)}, "ids.safetensors")
    ended = run(fork_server, count=3)
    assert [one.status for one in ended] == [2, 2, 2]
    assert "3 processes cannot share 2 samples" in the_sentence_of(ended)
    main, other = succeeded(run(fork_server, "--dry_run"))
    assert "in each of 2 processes" in main.out and not other.out


def test_the_launcher_of_accelerate_gives_the_same_bits(there, twice, fast_python):
    """Of its agent all have the store, not of the first process."""
    launch = [fast_python, "-m", "accelerate.commands.accelerate_cli", "launch", "--no_python"]
    launch += ["--multi_gpu", "--num_processes=2", "--num_machines=1", fast_python, *COMMAND]
    launch += [*flags_of("olica"), "--device=cpu"]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved ") == 1
    assert contents(Path("out", folder_of("olica"))) == contents(twice / "first" / folder_of("olica"))
    shutil.rmtree("out")
    done = subprocess.run([*launch, "--sparsity=0.99"], env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode and done.stderr.count("model_pruning.py: error: ") == 1


# ------------------------------------------------------------------------------------------------- parts of it


def test_every_sample_has_one_process():
    for samples, count in ((7, 2), (8, 3), (3, 3), (100, 7)):
        processes = Processes(count=count)
        rows = [processes.rows_of(index, samples) for index in range(count)]
        assert [row for own in rows for row in own] == list(range(samples))
        assert {len(own) for own in rows} <= {samples // count, processes.most_of(samples)}


def test_sums_of_parts_of_the_text_are_those_of_the_whole():
    x, y = "mlp_input", "intermediate"
    generator = torch.Generator().manual_seed(0)
    activations = [
        {x: 5 * part + torch.randn(9, 6, generator=generator), y: torch.randn(9, 4, generator=generator) - part}
        for part in range(4)
    ]
    statistics = [total(x), full(x), cross(x, y), cross(y, x), diagonal(y), per_head(x), cosine("heads", "heads")]

    def summed(parts) -> Moments:
        moments = Moments(statistics, num_heads=2)
        for part in parts:
            moments.update(part | {"heads": part[x]})
        return moments

    whole, first, second = summed(activations), summed(activations[:1]), summed(activations[1:])
    second.move_to(first.centres)
    first.count += second.count
    for own, other in zip(first.sums, second.sums, strict=True):
        own += other
    assert first.count == whole.count == 36
    for statistic in [*statistics, total(y), diagonal(x)]:
        torch.testing.assert_close(first[statistic], whole[statistic], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(first.about_mean(x), whole.about_mean(x), rtol=1e-5, atol=1e-3)


def test_sums_stay_as_they_are_about_their_own_centres():
    moments = Moments([full("mlp_input")], num_heads=1)
    moments.update({"mlp_input": torch.randn(9, 6, generator=torch.Generator().manual_seed(0))})
    before = [summed.clone() for summed in moments.sums]
    moments.move_to({name: centre.clone() for name, centre in moments.centres.items()})
    assert all(torch.equal(*pair) for pair in zip(before, moments.sums, strict=True))
