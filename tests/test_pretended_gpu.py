"""What a GPU shows of where tensors are, on one that is pretended (pretended_gpu.py); test_gpu.py wants a real one."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from conftest import (
    allocate,
    as_method,
    load_weights,
    make_llama,
    opened,
    pruning_options,
)
from pretended_gpu import DeviceMismatch, DeviceTensor
from tiny_pretended import (
    LAYERS,
    MEASURES,
    SAMPLES,
    TOKENS,
    assert_same_weights,
    checkpoint,
    device_peak,
    evaluate,
    fill_with_shards,
    perplexity_in,
    prune,
)
from tiny_run import killed_at

from olica.evaluation.cost import generation_latency
from olica.evaluation.perplexity import perplexity
from olica.machine import BatchSize
from olica.methods.plus import PlusParameters, plus
from olica.methods.recipes import RECIPES
from olica.outputs import run_progress
from olica.outputs.run_progress import RunProgress
from olica.processes import Processes
from olica.pruning import layers as pruning_module
from olica.pruning.activations import propagate, reading_logits, record_layer_calls
from olica.pruning.options import Work
from olica.pruning.progress import SurveyProgress
from olica.pruning.survey import survey_layers
from olica.sources import dense_model
from olica.sources.dense_model import DenseModel
from olica.sources.locate import locate
from olica.sources.weights import read_model

ROOT = Path(__file__).parents[1]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
fill_here = fill_with_shards


# ---------------------------------------------------------------------------------------------- the double itself


@pytest.mark.parametrize(
    "meeting",
    [
        lambda host, device: host + device,
        lambda host, device: device.addmm_(device, host),
        lambda host, device: torch.cat([host, device]),
        lambda host, device: host[device[0].long()],
        lambda host, device: device.index_put_((torch.tensor([0]),), host[:1]),
        lambda host, device: torch.nn.functional.linear(host, device),
        lambda host, device: host.numpy() + device.numpy(),
        lambda host, device: device.normal_(generator=torch.Generator()),
    ],
)
def test_tensors_of_host_and_device_refuse_to_meet(gpu, meeting):
    with pytest.raises((DeviceMismatch, TypeError)):
        meeting(torch.zeros(3, 3), torch.zeros(3, 3, device="cuda"))


def test_what_a_gpu_takes_from_the_host(gpu):
    device, host = torch.zeros(3, device="cuda"), torch.arange(3.0)
    device[:2] = host[1:]
    device[2] = 5.0
    host.copy_(device)
    assert host.tolist() == device.tolist() == [1, 2, 5]
    assert (device * torch.tensor(2.0))[torch.tensor([2, 0])].tolist() == [10, 2]
    assert torch.tensor([1, 2], device="cuda").sum().item() == 3
    assert {device.device, torch.ones(2, device=0).device, host.to("cuda").device} == {torch.device("cuda:0")}


def test_memory_is_counted_and_runs_out(gpu):
    gpu.memory = 1000
    block = torch.zeros(100, device="cuda")
    view, other = block[10:].view(9, 10), torch.zeros(50, device="cuda")
    assert gpu.allocated == 600 and torch.cuda.mem_get_info()[0] == 400
    del block
    assert gpu.allocated == 600, "a view holds all of it"
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(101, device="cuda")
    del view, other
    assert (gpu.allocated, torch.cuda.max_memory_allocated()) == (0, 600)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 0


def test_modules_move_and_stay_tied(gpu):
    model = make_llama(tie_word_embeddings=True)
    model.to("cuda")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.device == torch.device("cuda:0")
    assert gpu.allocated >= sum(parameter.nbytes for parameter in model.parameters())
    model.to("cpu")
    assert gpu.allocated == 0 and not isinstance(model.lm_head.weight, DeviceTensor)


def is_reached() -> bool:
    return torch.zeros(1).to("cuda").is_cuda


def test_threads_see_the_device(gpu):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(is_reached).result()
    found = []
    thread = threading.Thread(target=lambda: found.append(is_reached()))
    thread.start()
    thread.join()
    assert found == [True]


# ---------------------------------------------------------------------------------------------- pruning


@cache
def pruned_on_the_cpu(recipe: str) -> dict[str, torch.Tensor]:
    """The weights of a run of `here` on the CPU: the same in every test."""
    prune("on_the_cpu", f"--recipe={recipe}", "--device=cpu")
    return load_weights(checkpoint("on_the_cpu"))


def check_pruning(gpu, monkeypatch, recipe: str = "olica") -> None:
    """Pruning on the device gives the weights of the CPU, in the memory that it expected, and leaves nothing there."""
    expected = pruned_on_the_cpu(recipe)
    peaks = {}
    for cache_dev in ("cuda", "cpu"):
        record = prune(cache_dev, f"--recipe={recipe}", f"--cache_dev={cache_dev}", "--batch_size=6")
        assert record["environment"]["device"] == "pretended GPU"
        assert_same_weights(cache_dev, expected)
        peaks[cache_dev] = device_peak(record)
        assert 0.5 < peaks[cache_dev] / record["expected_peak_memory"]["device_bytes"] < 1.02
        assert gpu.allocated == 0
    variants = 3 * LAYERS if recipe == "olica-plus" else 0  # whose states travel, of some samples each
    states = (SAMPLES + plus(PlusParameters()).survey.samples(SAMPLES) * variants) * TOKENS * 48 * 4
    if recipe == "magnitude":  # no text goes through the layers
        assert peaks["cuda"] == peaks["cpu"]
    else:
        assert states / 3 < peaks["cuda"] - peaks["cpu"] <= states


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prunes_as_on_the_cpu(here, gpu, monkeypatch, recipe):
    check_pruning(gpu, monkeypatch, recipe)


def check_threads(gpu, monkeypatch) -> None:
    """While the device works on a layer the next one is read and the last one, on the host by then, is written."""
    seen, read, save = [], dense_model.StreamedModel._read_layer, RunProgress._save_layer

    def reading(self, index):
        seen.append(("read", index, threading.current_thread().name.split("_")[0]))
        return read(self, index)

    def saving(self, index, weights, facts):
        assert all(weight.device.type == "cpu" for weight in weights.values())
        seen.append(("write", index, threading.current_thread().name.split("_")[0]))
        save(self, index, weights, facts)

    with monkeypatch.context() as patched:
        patched.setattr(dense_model.StreamedModel, "_read_layer", reading)
        patched.setattr(RunProgress, "_save_layer", saving)
        prune("streamed")
    layers = range(LAYERS)
    assert [entry for entry in seen if entry[0] == "write"] == [("write", index, "write") for index in layers]
    assert [entry for entry in seen if entry[0] == "read"] == [("read", index, "read") for index in [*layers, *layers]]


def check_layers(gpu, monkeypatch) -> None:
    """The device holds one layer at a time, whether the model is streamed or in host memory as a whole."""
    for dense in (opened("./tiny"), dense_model.DenseModel(read_model(locate("./tiny")))):
        size = sum(parameter.nbytes for parameter in make_layer().parameters())
        for _, layer in dense.layers(CUDA, "test"):
            assert next(layer.parameters()).is_cuda
            assert torch.cuda.memory_allocated() == size
        del layer
        assert torch.cuda.memory_allocated() == 0


def make_layer() -> torch.nn.Module:
    return read_model(locate("./tiny")).model.layers[0]


def check_embedding(gpu, monkeypatch) -> None:
    """A model that is on the device embeds there; hidden states live where they are to."""
    model, ids = read_model(locate("./tiny")), torch.arange(3, 35).view(2, 16)
    expected, _ = record_layer_calls(model.model, ids, CPU)
    model.to(CUDA)
    for cache_device in (CPU, CUDA):
        hidden, calls = record_layer_calls(model.model, ids, cache_device)
        assert hidden.device.type == cache_device.type
        torch.testing.assert_close(hidden.cpu(), expected)
    with torch.no_grad():
        propagate(model.model.layers[0], hidden, calls[0], BatchSize(1))


def check_final_logits(gpu, monkeypatch) -> None:
    """The head works on the device, wherever the model is and the states are."""
    model = read_model(locate("./tiny"))
    states = torch.ones(1, 16, model.config.hidden_size)
    for home, at in ((CUDA, "cpu"), ("cpu", CUDA), ("cpu", "cpu")):
        with reading_logits(DenseModel(model.to(home)), torch.tensor([3, 7]), CUDA) as logits:
            assert logits(states.to(at)).is_cuda


def check_survey(gpu, monkeypatch) -> None:
    """What a survey keeps of a layer is on the host."""
    dense = opened("./tiny")
    plan, _ = allocate("olica", dense.config, dense.model.num_parameters(), 0.2, 3.0)
    options = pruning_options(device=CUDA, cache_device=CUDA)
    work = Work(dense, torch.arange(3, 67).view(4, 16), as_method("olica"), options)
    kept = [tensor for found in survey_layers(work, plan, SurveyProgress()) for tensor in found.values()]
    assert kept and not any(tensor.is_cuda for tensor in kept)


def on_device(work: Callable) -> Callable:
    def checked(layer, hidden, *arguments, **settings):
        assert next(layer.parameters()).is_cuda and hidden.is_cuda
        work(layer, hidden, *arguments, **settings)

    return checked


def check_resuming(gpu, monkeypatch, recipe: str = "olica", seconds: float = run_progress.SAVED_EVERY) -> None:
    """A run that is killed goes on, on the device, to the same bits."""
    flag = f"--recipe={recipe}"
    prune("undisturbed", flag)

    with monkeypatch.context() as patched:
        patched.setattr(run_progress, "SAVED_EVERY", seconds)
        for name in ("calibrate", "propagate"):
            patched.setattr(pruning_module, name, on_device(getattr(pruning_module, name)))
        with killed_at(1):
            prune("resumed", flag)
        assert prune("resumed", flag)["went_on_after"] == [1]
    found, wanted = (load_weights(checkpoint(folder)) for folder in ("resumed", "undisturbed"))
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


def test_a_killed_run_goes_on_there(here, gpu, monkeypatch):
    """That of the recipe olica is one of the CHECKS."""
    check_resuming(gpu, monkeypatch, "olica-paper", seconds=-1.0)


# ---------------------------------------------------------------------------------------------- evaluation


def check_evaluation(*flags: str, of_device: tuple[str, ...] = ()) -> dict:
    """All measures on the device are those of the CPU, and the model was there."""
    expected = evaluate(*MEASURES, *flags, "--device=cpu")
    found = evaluate(*MEASURES, *flags, *of_device)
    assert perplexity_in(found) == pytest.approx(perplexity_in(expected), rel=1e-5)
    assert found.get("zero_shot") == expected.get("zero_shot")
    assert found["continuation"] == expected["continuation"]
    assert found["parameters"] == expected["parameters"]
    return found


def test_all_measures_are_those_of_the_cpu(here, gpu):
    found = check_evaluation()
    assert found["cost"]["peak_memory"]["device_bytes"] > found["weight_bytes"] and gpu.allocated == 0


def test_a_device_map_spreads_a_model_over_device_and_host(here, gpu):
    gpu.memory = 280_000  # the weights take 293 kB
    found = check_evaluation("--batch_size=1", "--tasks=", of_device=("--device_map=auto",))
    assert 61_440 < found["cost"]["peak_memory"]["device_bytes"] < found["weight_bytes"], "the embedding, not all of it"


class Summed(Processes):
    def add_up(self, tensors):
        assert all(tensor.is_cuda for tensor in tensors)


def check_perplexity(gpu, monkeypatch) -> None:
    """A model that is on the device is measured there, and several processes sum there."""

    windows = torch.randint(3, 259, (7, 16), generator=torch.Generator().manual_seed(1))
    model = read_model(locate("./tiny"))
    expected = perplexity(model, windows, 3)
    assert perplexity(model.to(CUDA), windows, 3, Summed()).value == pytest.approx(expected.value, rel=1e-5)


def check_latencies(gpu, monkeypatch) -> None:
    """Times, and a continuation, of a model on the device."""
    model = read_model(locate("./tiny")).to(CUDA)
    assert generation_latency({"model": model}, torch.arange(3, 19)[None], 2, 1)["model"]["decode"]["median_s"] > 0
    check_evaluation("--tasks=")


def check_that_the_model_is_moved(gpu, monkeypatch) -> None:
    """A model is measured on the device that the flags name."""
    found = evaluate(*MEASURES, "--tasks=")
    assert found["cost"]["peak_memory"]["device_bytes"] > found["weight_bytes"]


# ---------------------------------------------------------------------------------------------- whole commands


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_check_of_a_gpu_runs_with_tiny_sizes(gpu_guard, tmp_path):
    python = f"{sys.executable} {ROOT / 'tests/on_pretended_gpu.py'} {tmp_path}"
    sizes = dict(SCALE=16, DRY_SHAPE="7b", LAYERS=2, NUM_SAMPLES=4, TOKENS=16, MLP_NUM=1, NEW_TOKENS=2, REPEATS=1)
    settings = dict(PYTHON=python, WORK=tmp_path / "work", RESULTS=tmp_path / "results", OMP_NUM_THREADS=1, MINUTES=14)
    command = ["bash", ROOT / "scripts/gpu_check.sh", "tests/test_machine.py"]
    environment = os.environ | {name: str(value) for name, value in (sizes | settings).items()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 passed" in done.stdout and not (tmp_path / "work").exists()
    on_device, on_host, speed = (
        json.loads((tmp_path / f"results/{name}.json").read_text())
        for name in ("cache_on_device", "cache_on_host", "generation_speed")
    )
    peaks = [on_device["peak_memory"]["device_bytes"], device_peak(on_host)]
    expected = [record["expected_peak_memory"]["device_bytes"] for record in (on_device, on_host)]
    assert all(0.5 < found / wanted < 1.02 for found, wanted in zip(peaks, expected, strict=True))
    assert {record["environment"]["device"] for record in (on_device, on_host, speed)} == {"pretended GPU"}
    assert len(speed["models"]) == 2 and on_host["settings"]["dtype"] == "bfloat16"
    assert ", device " in (tmp_path / "results/dry_run.txt").read_text()
    steps = [line.split()[0] for line in (tmp_path / "results/seconds.txt").read_text().splitlines()]
    assert steps == ["dry_run", "cache_on_device", "cache_on_host", "generation_speed", "tests"]


# ---------------------------------------------------------------------------------------------- planted mistakes

# What shows that tensors are where they should be, by the modules that place them: a test of its own each, below.
CHECKS = {
    "pruning.activations": [check_embedding, check_final_logits, check_pruning, partial(check_resuming, seconds=-1.0)],
    "evaluation.cost": [check_latencies],
    "sources.dense_model": [check_layers],
    "evaluation.measures": [check_that_the_model_is_moved],
    "methods.moments": [check_survey],
    "evaluation.perplexity": [check_perplexity],
    "pruning.cutting": [check_resuming],
    "outputs.run_progress": [check_threads],
}
# Modules that do little but place tensors; what others might forget is tried among the slow tests.
MOSTLY_PLACING = ("pruning.activations", "evaluation.perplexity", "pruning.cutting")
# The number of no placing.
NONE = -1
# The library's generate moves what it is given by itself.
HARMLESS = {("evaluation.measures", "continuation", 0)}


def is_placing(node: ast.AST) -> bool:
    """Whether a call moves a tensor or a module to a device, or makes one there."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    to_device = node.func.attr == "to" and "dtype" not in ast.unparse(node.args[0])
    made_there = ast.unparse(node.func) in ("torch.empty", "torch.zeros") and "device" in {k.arg for k in node.keywords}
    return to_device or made_there or node.func.attr == "cpu"


class Without(ast.NodeTransformer):
    """Leaves out the placing of this number, or NONE."""

    def __init__(self, number: int):
        self.left = number

    def visit_Call(self, node: ast.Call) -> ast.expr:  # noqa: N802
        self.generic_visit(node)
        if not is_placing(node):
            return node
        self.left -= 1
        if self.left != -1:
            return node
        if node.func.attr in ("to", "cpu"):
            return node.func.value
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "device"]
        return node


def functions_of(module) -> dict[str, Callable]:
    """The functions and methods that a module defines, by their names."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    functions = [f for owner in [module, *classes] for f in vars(owner).values() if inspect.isfunction(f)]
    # What dataclasses and imports add has its code elsewhere.
    return {f.__qualname__: f for f in functions if inspect.unwrap(f).__code__.co_filename == module.__file__}


def mistakes() -> list[tuple[str, str, int]]:
    """Module, function and number of every placing that could be forgotten."""
    found = []
    for name in CHECKS:
        for qualified, function in functions_of(importlib.import_module(f"olica.{name}")).items():
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            found += [(name, qualified, number) for number in range(sum(map(is_placing, ast.walk(tree))))]
    return found


def plant(monkeypatch, module, qualified: str, number: int) -> None:
    """Put the function without its placing of this number in the place of the function, wherever it is called."""
    function = functions_of(module)[qualified]
    tree = Without(number).visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
    made: dict[str, Callable] = {}
    exec(compile(ast.fix_missing_locations(tree), module.__file__, "exec"), vars(module), made)  # noqa: S102
    if "." in qualified:
        monkeypatch.setattr(getattr(module, qualified.split(".")[0]), function.__name__, made[function.__name__])
        return
    callers = [m for name, m in sys.modules.items() if name.split(".")[0] in ("olica", "model_evaluate", __name__)]
    for caller in callers:
        for name, value in list(vars(caller).items()):
            if value is function:
                monkeypatch.setattr(caller, name, made[function.__name__])


@pytest.mark.parametrize(("module", "check"), [(module, check) for module in CHECKS for check in CHECKS[module]])
def test_the_checks_pass_where_nothing_is_forgotten(here, gpu, monkeypatch, module, check):
    """Though every function is put in its own place, as one that forgets is."""
    for qualified in {qualified for name, qualified, _ in mistakes() if name == module}:
        plant(monkeypatch, importlib.import_module(f"olica.{module}"), qualified, NONE)
    check(gpu, monkeypatch)


@pytest.mark.parametrize(
    ("module", "function", "number"),
    [
        pytest.param(*mistake, marks=() if mistake[0] in MOSTLY_PLACING else pytest.mark.slow)
        for mistake in mistakes()
        if mistake not in HARMLESS
    ],
)
def test_a_placing_that_is_forgotten_is_noticed(here, gpu, monkeypatch, module, function, number):
    plant(monkeypatch, importlib.import_module(f"olica.{module}"), function, number)
    with pytest.raises((DeviceMismatch, AssertionError, TypeError)):
        for check in CHECKS[module]:
            check(gpu, monkeypatch)
