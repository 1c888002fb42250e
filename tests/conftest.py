"""Tiny seeded models and a byte tokenizer, built in memory: no test reaches a hub."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

# ruff: noqa: E402
import ctypes
import errno
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from filelock import FileLock
from pretended_gpu import PretendedGpu, compiled_guard
from safetensors.torch import load_file, save_file
from tiny_run import LAYERS
from tiny_texts import builder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from olica.jobs import plan_before_survey
from olica.machine import BatchSize
from olica.methods.moments import Moments
from olica.methods.recipe import Findings, Layer, Method
from olica.methods.recipes import RECIPES
from olica.methods.sizes import Budget, Sizes
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import Projections, projections_of
from olica.model.skeleton import pruned_skeleton
from olica.outputs.checkpoint import check_description, complete
from olica.outputs.run_folder import RunFolder
from olica.outputs.run_progress import Shards
from olica.pruning.layers import prune_layers
from olica.pruning.options import PruningOptions, Work
from olica.pruning.progress import Progress, SurveyProgress
from olica.pruning.survey import survey_layers
from olica.run import measure_and_decide
from olica.sources.dense_model import DenseModel
from olica.sources.locate import locate
from olica.sources.opening import open_dense_model

CPU = torch.device("cpu")
FORKED = Path(__file__).with_name("forked.py")
TEST_DATA = Path(__file__).parent / "data"
# What git-lfs has in the place of a file that was not fetched.
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes (ids 3 to 258), after <unk>, <s> and </s>; it adds no token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A seeded random LLaMA of 3 layers, 4 query heads of width 16 and, unless overridden, 4 key/value heads."""
    settings = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


def save_tiny(folder: str | Path, **sizes) -> None:
    """Save `make_llama` of these sizes with its tokenizer."""
    make_llama(**sizes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def save_bin(model: PreTrainedModel, folder: Path, shards: int = 1, **more: torch.Tensor) -> None:
    """Save a model, and weights that it has not, in so many .bin files."""
    model.config.save_pretrained(folder)
    state = model.state_dict() | more
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = {name: f"pytorch_model-{1 + index % shards:05}-of-{shards:05}.bin" for index, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: state[name] for name in state if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def hub_snapshot(cache: Path, name: str = "team/model", revision: str = "0" * 40) -> Path:
    """The folder of a model's files in a cache of the hub, empty, laid out as a download would."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return snapshot


def add_adapter(folder: str | Path) -> None:
    """Put an adapter that changes every output beside a model, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)


def opened(folder: str | Path, dtype: str = "auto") -> DenseModel:
    """The dense model of a folder or a name, as the command line reads it."""
    return open_dense_model(locate(str(folder)), dtype)


def write_json(path: Path, rows: list) -> Path:
    """Write one row a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pruning_options(**overrides) -> PruningOptions:
    """Batches of four samples on the CPU, unless overridden."""
    return PruningOptions(**dict(batch_size=BatchSize(4), device=CPU, cache_device=CPU) | overrides)


def as_method(recipe_name: str, **parameters) -> Method:
    """A recipe that corrects one layer at rank 6 of 64, where it has corrections, unless its parameters are given."""
    recipe = RECIPES[recipe_name]
    usual = {"mlp_num": 1, "ratio": 6 / 64} if "mlp_num" in recipe.parameter_names else {}
    return recipe.method(recipe.with_parameters(usual | parameters))


def uncorrected(recipe_name: str) -> Method:
    """A recipe that corrects no layer."""
    return as_method(recipe_name, **{"mlp_num": 0} if "mlp_num" in RECIPES[recipe_name].parameter_names else {})


def allocate(
    recipe_name: str, config, total: int, sparsity: float, k: float = 3.0, round_to: int = 1
) -> tuple[list[LayerShape], SimpleNamespace]:
    """The plan of a recipe with fixed shares, corrections left out, and the shares."""
    sizes, budget = [Sizes.of(config)] * config.num_hidden_layers, Budget(total, sparsity, round_to)
    method = as_method(recipe_name, k=k, mlp_num=0)
    plan = plan_before_survey(RECIPES[recipe_name], method, sizes, budget)
    return plan, SimpleNamespace(**method.allocate.shares(sizes, budget))


def work_on(model, ids: torch.Tensor, method: Method, **overrides) -> Work:
    """What is to be done to a causal model in memory."""
    return Work(DenseModel(model), ids, method, pruning_options(**overrides))


def prune(
    model, ids: torch.Tensor, recipe_name: str, sparsity: float, **overrides
) -> tuple[list[Findings], list[LayerShape]]:
    """Prune a causal model in place as the command line does; returns the findings and the plan.

    Overrides are parameters of the recipe, or options.
    """
    own = {name: overrides.pop(name) for name in RECIPES[recipe_name].parameter_names if name in overrides}
    work = work_on(model, ids, as_method(recipe_name, **own), **overrides)
    plan, findings = measure_and_decide(work, Budget(model.num_parameters(), sparsity), SurveyProgress())
    prune_layers(work, plan, findings, Progress())
    return findings, plan


def prune_to(model, ids: torch.Tensor, plan: list[LayerShape], recipe_name: str = "olica", **overrides) -> None:
    """Prune a causal model in place to sizes that no rule has to give."""
    work = work_on(model, ids, uncorrected(recipe_name), **overrides)
    prune_layers(work, plan, survey_layers(work, plan, SurveyProgress()), Progress())


def edit_config(folder: Path, **changes) -> None:
    """Change values in the config.json of a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_pruned(model, plan: list[LayerShape], tokenizer, folder: Path, largest: int = 10**9) -> None:
    """Save a model that was pruned in memory as the command line saves one that it streams."""
    dense = DenseModel(model)
    with RunFolder.locked(folder) as run:
        progress = run.begin({}, False, Shards(dense.layers_prefix, len(plan)), BatchSize(1))
        for index, layer in enumerate(dense.decoder.layers):
            progress.save_layer(index, layer, None)
        progress.wait()
        pruned = pruned_skeleton(dense.config, plan)
        check_description(run, dense, pruned, tokenizer)
        complete(run, progress, dense, pruned, tokenizer, largest)
        run.publish()


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All weights in the safetensors files of a folder, by name."""
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def no_memory_for_more_than(samples: int, error: str = "cuda"):
    """A hook that fails as the allocators do when a batch has more than so many samples."""

    def hook(module, args, kwargs=None):
        batch = args[0] if args else kwargs["input_ids"]
        if len(batch) > samples:
            match error:
                case "cuda":
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                case "cublas":
                    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
                case "cpu":
                    torch.empty(2**60)

    return hook


def raising(error: BaseException) -> Callable:
    """What raises the error, whatever it is called with."""

    def fail(*arguments, **settings):
        raise error

    return fail


def no_space_left(*arguments, **settings) -> None:
    """Stands for what writes to a disk that is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def pytest_collection_finish() -> None:
    """What was imported stays: no search for garbage has to visit it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, after which files that were not synchronised are lost: what is killed leaves them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run of the tests, the same for all processes that share them."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def fork_server(shared_folder) -> Iterator[str]:
    """The socket of a process that forks (forked.py), so that what is run in a process of its own starts at once.

    One for all processes that share the tests: it ends when the last of them has let go of its standard input.
    """
    path, held = str(shared_folder / "socket"), shared_folder / "held"
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads()))}
    with FileLock(shared_folder / "fork.lock"):
        try:
            writing = os.open(held, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody has started it, or it has ended
            for left in (path, f"{path}.new", held):
                Path(left).unlink(missing_ok=True)
            os.mkfifo(held)
            reading = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
            writing = os.open(held, os.O_WRONLY)
            command = [sys.executable, FORKED, "--serve", path]
            server = subprocess.Popen(command, env=environment, stdin=reading, stdout=subprocess.DEVNULL)
            os.close(reading)
            while not os.path.exists(path):
                assert server.poll() is None
                time.sleep(0.01)
    yield path
    os.close(writing)


@pytest.fixture(scope="session")
def fast_python(fork_server, tmp_path_factory) -> str:
    """An executable to be called as Python is, which starts at once."""
    path = tmp_path_factory.mktemp("fork") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{FORKED}" "{fork_server}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stock_tasks(monkeypatch, shared_folder):
    """lm-eval's index of its thousands of tasks is made once for all tests."""
    from lm_eval.tasks import _index
    from stock_tasks import build_from

    monkeypatch.setattr(_index.TaskIndex, "build", build_from(shared_folder / "stock_tasks.pickle"))


@pytest.fixture(scope="session")
def gpu_guard(tmp_path_factory) -> ctypes.CDLL:
    """What torch lacks of a GPU, compiled once."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which one that is pretended would hide")
    guard = compiled_guard(tmp_path_factory.mktemp("guard"))
    if guard is None:
        pytest.skip("wants a C++ compiler: g++ or clang++")
    return guard


@pytest.fixture
def gpu(gpu_guard) -> Iterator[PretendedGpu]:
    """A pretended GPU, there for torch, the libraries and the command lines."""
    with PretendedGpu().installed(gpu_guard) as gpu:
        yield gpu


@pytest.fixture
def decoder_layer() -> nn.Module:
    """A dense decoder layer whose MLP has biases."""
    return make_llama(mlp_bias=True).model.layers[0]


@pytest.fixture
def mlp(decoder_layer) -> nn.Module:
    """The MLP of `decoder_layer`, to be run."""
    return decoder_layer.mlp


def seen(weights: Projections, moments: Moments | None = None, num_kv_heads: int = 4, **findings) -> Layer:
    """A layer of `make_llama`, as the stages see it."""
    sizes = Sizes(64, 4, num_kv_heads, 16, weights.down_proj.in_features)
    return Layer(weights, moments or Moments((), 4), findings, sizes)


@pytest.fixture
def layer(decoder_layer) -> Projections:
    """The projections of `decoder_layer`."""
    return projections_of(decoder_layer)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """A cache of datasets that nothing else reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def build(tmp_path, tokenizer) -> Callable:
    """Draws calibration sets from texts in `tmp_path`."""
    return builder(tmp_path, tokenizer)


@pytest.fixture
def tokenise_no_more(monkeypatch, tokenizer) -> Callable:
    """From its call on, tokenising fails the test."""
    refuse = raising(AssertionError("tokenised again"))
    return lambda: monkeypatch.setattr(type(tokenizer), "__call__", refuse)


@pytest.fixture
def grouped_llama() -> LlamaForCausalLM:
    """Two key/value heads for four query heads, tied embeddings: the shape of SmolLM2."""
    return make_llama(num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture
def saved_llama(grouped_llama, tokenizer, tmp_path) -> Path:
    """The folder of a small checkpoint with its tokenizer."""
    folder = tmp_path / "tiny-llama"
    grouped_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def shared_data() -> Path:
    """The optional folder of real text and evaluation sets, named by the variable OLICA_DATA."""
    folder = os.environ.get("OLICA_DATA")
    if not folder:
        pytest.skip("wants the folder of real text and evaluation sets: set OLICA_DATA to it")
    return Path(folder)


def fill_with_run(folder: Path = Path(), samples: int = 8) -> None:
    """Put into a folder, or the current one, a tiny model of several layers and a calibration set."""
    save_tiny(folder / "tiny", num_key_value_heads=2, num_hidden_layers=LAYERS)
    ids = torch.randint(3, 259, (samples, 32), generator=torch.Generator().manual_seed(0))
    save_file({"calibration_ids": ids}, folder / "ids.safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch, request) -> Path:
    """A current folder with what the module's `fill_here` puts there, or else `fill_with_run`."""
    monkeypatch.chdir(tmp_path)
    getattr(request.module, "fill_here", fill_with_run)()
    return tmp_path


@pytest.fixture
def bos_tokenizer():
    """The byte tokenizer, made to put <s> in front of every text, as LLaMA's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def refused(capsys, call: Callable, *arguments, alone: bool = False) -> str:
    """The message of a command that must end with status 2 and one sentence on standard error, `alone` if it is all."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if "error: " in line]
    assert ended.value.code == 2 and len(lines) == 1 and (len(said) == 1 or not alone)
    return lines[0].split("error: ", 1)[1]
