"""Write a pruned model as a checkpoint that the Auto classes load, whole or not at all."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

from ..checks import check_room, check_writable
from ..errors import UsageError, in_words, is_out_of_memory
from ..model.configuration_olica import PREFIX, PrunedConfig, former_names
from ..model.families import SEQUENCE_CLASSIFIERS, TOKEN_CLASSIFIERS
from ..model.modeling_deci import DeciLMConfig
from ..model.skeleton import try_out, without_weights
from ..sources.dense_model import DenseModel
from ..sources.tokenizers import GENERIC_TOKENIZER, tokens_of_probes
from ..sources.weight_files import stored_weights
from .run_folder import RunFolder
from .run_progress import RunProgress
from .weight_shards import write_index


def check_folder(folder: Path) -> None:
    """Raise UsageError unless a checkpoint's folder can be made at `folder`, or is one."""
    check_writable(folder, "--save_dir")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"--save_dir: {folder} is a file or a link; give another --save_dir")


def check_place(folder: Path, needed_bytes: int, overwrite: bool) -> None:
    """Raise UsageError if `folder` exists and may not be replaced, or the disk has no room for `needed_bytes`."""
    if folder.exists() and not overwrite:
        raise UsageError(f"--save_dir: {folder} exists already; give --overwrite to replace it, or another --save_dir")
    check_room(folder, needed_bytes, "--save_dir", "the pruned model, with what the run keeps meanwhile,")


def complete(
    run: RunFolder,
    progress: RunProgress,
    dense: DenseModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    largest: int,
) -> dict[str, int]:
    """Make the checkpoint of the skeleton `pruned`, whose decoder layers are all kept.

    Args:
        run: whose checkpoint it is.
        progress: which has the decoder layers.
        dense: the dense model, which has all else.
        pruned: the skeleton.
        tokenizer: of the model.
        largest: bytes of weights that a file has at most, unless a single one has more.

    Returns:
        The parameters that were written: `total`, and `decoder_layers` alone.

    Raises:
        RuntimeError: the weights are not those of the plan.
        UsageError: the disk is full or fails.
    """
    if not progress.is_gathering:
        embedding, others = dense.other_names()
        progress.save_shard(1, dense.read(embedding))
        progress.save_shard(progress.shards.layers + 2, dense.read(others))
    progress.gather(largest)
    stored = stored_weights(sorted(run.checkpoint.glob("*.safetensors")))
    with in_words(would_not_load, let_through=is_out_of_memory):
        loaded = describe(run.checkpoint, dense, pruned, tokenizer, run.in_words)
    expected = {name: tuple(weight.shape) for name, weight in loaded.named_parameters()}
    if expected != {name: weight.shape for name, weight in stored.items()}:
        raise RuntimeError("the weights written are not those of the plan")
    sizes = {name: prod(weight.shape) for name, weight in stored.items()}
    written = {
        "total": sum(sizes.values()),
        "decoder_layers": sum(size for name, size in sizes.items() if name.startswith(dense.layers_prefix)),
    }
    with run.in_words():
        write_index(run.checkpoint, stored)
    return written


def check_description(
    run: RunFolder, dense: DenseModel, pruned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Raise UsageError if a checkpoint of the skeleton `pruned` would not load or run: before layers are pruned."""
    with TemporaryDirectory(dir=run.work) as folder, in_words(would_not_load, let_through=is_out_of_memory):
        try_out(describe(Path(folder), dense, pruned, tokenizer, run.in_words))


def would_not_load(error: Exception) -> str:
    """What to correct where a checkpoint cannot be described."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        "--base_model: a pruned checkpoint with the model's configuration, generation settings and tokenizer would "
        f"not load ({reason}); correct these files of the model"
    )


def describe(
    folder: Path,
    dense: DenseModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    writing: Callable[[], AbstractContextManager],
) -> PreTrainedModel:
    """Write what a checkpoint has beside its weights, and load it again.

    Args:
        folder: the checkpoint's.
        dense: the model that was read.
        pruned: the skeleton of the one that is written.
        tokenizer: of the model.
        writing: has a disk that is full or fails end in a UsageError.

    Returns:
        The model that the Auto classes make of the folder, without weights.

    Raises:
        UsageError: the disk is full or fails.
        Exception: it cannot be made, or not be loaded.
    """
    with writing():
        _write_description(pruned, dense.model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            if (folder / TOKENIZER_CONFIG_FILE).is_file():
                _name_tokenizer_formerly(folder / TOKENIZER_CONFIG_FILE, tokenizer.chat_template)
    if tokenizer is not None:
        _check_tokenizer(folder, tokenizer, writing)
    config = AutoConfig.from_pretrained(folder)
    return without_weights(lambda: AutoModelForCausalLM.from_config(config))


def _write_description(pruned: PreTrainedModel, dense: PreTrainedModel, folder: Path) -> None:
    """Write the configuration, modelling files of ours and the generation settings, as save_pretrained does."""
    pruned.config.dtype = str(dense.dtype).removeprefix("torch.")
    pruned.config.architectures = [type(pruned).__name__]
    if isinstance(pruned.config, PrunedConfig | DeciLMConfig):
        _add_code(pruned, folder)
    pruned.config.save_pretrained(folder)
    if not isinstance(pruned.config, PrunedConfig):
        add_former_names(folder / CONFIG_NAME)
    dense.generation_config.save_pretrained(folder)


def add_former_names(path: Path) -> None:
    """Have a configuration of no class of ours, or of DeciLM's, say the names of old releases of transformers too."""
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_settings(path, config | former_names(config))


def _write_settings(path: Path, settings: dict) -> None:
    """Write settings in the form in which the libraries write them."""
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_tokenizer_formerly(path: Path, chat_template: str | dict[str, str] | None) -> None:
    """Have a tokenizer's settings say its class, further special tokens and chat template as every release reads them.

    The template is in a file of its own too, which the releases of today prefer and old ones do not know.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = GENERIC_TOKENIZER
    if isinstance(settings.get("extra_special_tokens"), list):  # old releases take this name for a dictionary
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if isinstance(chat_template, dict):
        chat_template = [{"name": name, "template": template} for name, template in chat_template.items()]
    if chat_template:
        settings["chat_template"] = chat_template
    _write_settings(path, settings)


def _check_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, writing: Callable[[], AbstractContextManager]
) -> None:
    """Have the tokenizer that was saved in `folder` make the tokens that it made before.

    Some classes put rules of their own in the place of those in the file, such as Gemma's, which a GGUF file may not
    follow: then the settings name the class that reads the file as it is.

    Raises:
        Exception: it cannot be read, or makes other tokens all the same.
    """
    path, wanted = folder / TOKENIZER_CONFIG_FILE, tokens_of_probes(tokenizer)
    with suppress(Exception):  # the libraries share none
        if tokens_of_probes(AutoTokenizer.from_pretrained(folder)) == wanted:
            return
    if path.is_file():
        with writing():
            _write_settings(path, json.loads(path.read_text("utf-8")) | {"tokenizer_class": GENERIC_TOKENIZER})
    if tokens_of_probes(AutoTokenizer.from_pretrained(folder)) != wanted:
        raise ValueError("its tokenizer makes other tokens of a text when it has been saved")


def _add_code(pruned: PreTrainedModel, folder: Path) -> None:
    """Write the modelling files, and have the configuration say which Auto class finds what there."""
    family, module = pruned.config.model_type.removeprefix(PREFIX), type(pruned).__module__.split(".")[-1]
    others = {
        "AutoModel": pruned.base_class,
        "AutoModelForSequenceClassification": SEQUENCE_CLASSIFIERS.get(family),
        "AutoModelForTokenClassification": TOKEN_CLASSIFIERS.get(family),
    }
    # The entries of the configuration and of the class that is saved are added.
    pruned.config.auto_map = {auto: f"{module}.{model.__name__}" for auto, model in others.items() if model}
    custom_object_save(pruned, folder, config=pruned.config)
