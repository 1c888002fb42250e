"""Write a pruned model as a checkpoint that the Auto classes load, whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_olica import LayerShape
from .errors import UsageError
from .modeling_olica import FAMILIES

DEFAULT_RECIPE = "olica"


def checkpoint_folder(save_dir: str, label: str, sparsity: float, recipe: str = DEFAULT_RECIPE) -> Path:
    """Where a pruned model is saved; the default recipe is not named, so that evaluation finds it by two flags."""
    suffix = "" if recipe == DEFAULT_RECIPE else f"_{recipe}"
    return Path(save_dir) / f"{label}_sparsity-{sparsity:g}{suffix}"


def check_writable(path: Path, flag: str) -> Path:
    """The nearest folder above `path` that exists; raises UsageError, naming `flag`, unless it can be written to."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{flag}: {parent} is not a folder that can be written to")
    return parent


def check_record_path(path: Path, flag: str) -> None:
    """Raise UsageError unless a record can be written to `path`, in place of a file at the most."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{flag} {path} is a folder, a link or a device; give the name of a file")
    check_writable(path, flag)


def check_output(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    """Raise UsageError if `folder` exists and may not be replaced, or the disk has no room for `needed_bytes`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--save_dir: {folder} is a file or a link; give another --save_dir")
    if folder.exists() and not overwrite:
        raise UsageError(f"--save_dir: {folder} exists already; give --overwrite to replace it, or another --save_dir")
    parent = check_writable(folder, "--save_dir")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UsageError(
            f"--save_dir: the pruned model takes {needed_bytes / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB "
            "free; make room or give another --save_dir"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `folder` when all went well and vanishes when not.

    What was there is put aside until the new folder has its place, so that there is always one that is whole.
    """
    partial, old = (folder.with_name(f".{folder.name}.{word}") for word in ("partial", "old"))
    if old.exists() and not folder.exists():
        old.replace(folder)  # a run was killed between the two moves below
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.replace(old)
        try:
            partial.replace(folder)
        except BaseException:
            if old.exists():
                old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def pruned_skeleton(config: PreTrainedConfig, plan: list[LayerShape]) -> PreTrainedModel:
    """The pruned form, without weights, of a dense model of `config` whose layers get the sizes `plan`."""
    pruned_class = FAMILIES[config.model_type]
    settings = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    with torch.device("meta"):
        return pruned_class(pruned_class.config_class(**settings, layer_shapes=[shape.to_dict() for shape in plan]))


def write_pruned(
    model: PreTrainedModel, plan: list[LayerShape], tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Save a model whose layers were pruned to `plan` as a checkpoint of its family's pruned form.

    Raises:
        RuntimeError: the weights are not those of the plan.
        UsageError: the disk is full or fails.
    """
    pruned = pruned_skeleton(model.config, plan)
    # save_pretrained adds the entries of the configuration and of the class that it saves.
    base_class = pruned.base_class
    pruned.config.auto_map = {"AutoModel": f"{base_class.__module__.split('.')[-1]}.{base_class.__name__}"}
    pruned.load_state_dict(model.state_dict(), assign=True)
    pruned.tie_weights()
    pruned.generation_config = model.generation_config
    try:
        pruned.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except (SafetensorError, OSError) as error:  # a full disk is the one or the other, by who writes
        raise UsageError(f"--save_dir: the model cannot be written ({error}); make room or give another") from error
