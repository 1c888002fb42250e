"""A model's configuration, with what is refused of it before a weight is read, and what a record says of the model."""

import logging
from functools import cache
from importlib import metadata
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..checks import refuse_pointers
from ..errors import UsageError
from ..model.families import FAMILIES
from ..model.modeling_deci import DeciLMConfig
from ..model.skeleton import count_parameters, without_weights
from .gguf import add_defaults, describe_file, read_gguf_config, refuse_lost_settings
from .locate import MODEL_NAMES, PACKAGED_MODEL, PACKAGED_MODEL_NAME, Location
from .tied_head import holds_another_head

logger = logging.getLogger(__name__)

MERGE = "PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"


def read_config(location: Location) -> PreTrainedConfig:
    """The configuration of a dense or pruned model, without reading weights.

    Says once what is left out of the model, and where its weights hold another head than the configuration says.

    Raises:
        UsageError: unknown model, one of which only pointers are here or only an adapter, or of a family that is not
            supported; a dense model with the sizes of a pruned one.
    """
    supported = ", ".join(FAMILIES)
    pruned = [family.config_class.model_type for family in FAMILIES.values()]
    if location.is_local:
        fault = f"its configuration cannot be read; supported families: {supported}"
    elif location.name in MODEL_NAMES:
        fault = f"the hub does not give us {location.path}; give a folder that holds the model"
    else:
        names = ", ".join([PACKAGED_MODEL_NAME, *MODEL_NAMES])
        fault = f"not one of {names}, no local folder or .gguf file, and no model that the hub gives us"
    if location.is_local:
        refuse_pointers(location.files)
    with location.in_words(fault):
        _refuse_adapter_alone(location)
        config = read_gguf_config(location) if location.gguf_file else AutoConfig.from_pretrained(location.path)
    if config.model_type not in [*FAMILIES, *pruned, DeciLMConfig.model_type]:
        raise location.error(f"the family {config.model_type} is not supported; supported: {supported}")
    if location.gguf_file:
        with location.in_words(fault):
            add_defaults(location, config)
            refuse_lost_settings(location, config)
    _refuse_shapes_of_layers(location, config)
    _refuse_padding(location, config)
    if has_adapter(location):
        _warn_once(
            f"{location.flag} {location.name}: the adapter beside the model is left out; to have it in, merge it, by "
            f"peft's {MERGE}, and give FOLDER"
        )
    if config.tie_word_embeddings and has_another_head(location):
        _warn_once(
            f"{location.flag} {location.name}: its configuration ties the head to the embedding, but the checkpoint "
            "holds another lm_head: it counts, and is saved, as a head of its own"
        )
        config.tie_word_embeddings = False
    return config


def _refuse_adapter_alone(location: Location) -> None:
    if not location.gguf_file and location.find(ADAPTER_CONFIG_NAME) and not location.find(CONFIG_NAME):
        raise location.error(f"this is an adapter without its model; merge it first, by peft's {MERGE}")


def _refuse_shapes_of_layers(location: Location, config: PreTrainedConfig) -> None:
    """Raise UsageError for a dense model that says which sizes its layers were pruned to: one of the two is wrong."""
    if config.model_type in FAMILIES and hasattr(config, "layer_shapes"):
        raise location.error(
            "its configuration has layer_shapes, which only a pruned checkpoint has, "
            f"but says {config.model_type}; take them out if the model is dense"
        )


def _refuse_padding(location: Location, config: PreTrainedConfig) -> None:
    """Raise UsageError for a token that no embedding of the vocabulary's size can be made with."""
    padding = config.pad_token_id
    if padding is not None and not -config.vocab_size <= padding < config.vocab_size:
        raise location.error(
            f"pad_token_id {padding} in its configuration is beyond the vocabulary of {config.vocab_size}; make it null"
        )


def has_adapter(location: Location) -> bool:
    """Whether an adapter lies beside the model: no command reads it."""
    return location.find(ADAPTER_CONFIG_NAME) is not None


def has_another_head(location: Location) -> bool:
    """Whether the weights, as far as they are on this machine, hold another head than the embedding.

    Raises:
        UsageError: they cannot be read.
    """
    if location.gguf_file:
        return False  # transformers takes the presence of a head for a sign that a GGUF file does not tie it
    with location.in_words("its weights cannot be read"):
        try:
            files = [path.absolute() for path in location.weight_files]
        except UsageError:
            if location.is_local:
                raise
            return False  # the index was downloaded without its files
        return _compared(tuple((path, path.stat().st_mtime_ns) for path in files))


@cache
def _compared(files: tuple[tuple[Path, int], ...]) -> bool:
    """Read once for every state of the files: `files` has when each was last changed."""
    return holds_another_head(path for path, _ in files)


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def refuse_unprunable(config: PreTrainedConfig, location: Location) -> None:
    """Raise UsageError if the model is pruned already, or if its matrices are stored quantised."""
    if config.model_type not in FAMILIES:
        raise location.error(
            "this checkpoint is pruned already; prune the dense model to the sparsity that you want instead"
        )
    refuse_quantised(config, location)


def refuse_quantised(config: PreTrainedConfig, location: Location) -> None:
    """Raise UsageError if the model's matrices are stored quantised."""
    if getattr(config, "quantization_config", None) is not None:
        raise location.error("this checkpoint is quantised; give the one that it was quantised from")


def count_dense_parameters(location: Location, config: PreTrainedConfig) -> dict[str, int]:
    """`count_parameters` of the dense model of `config`; no weight is read or made.

    Raises:
        UsageError: transformers cannot build a model of it.
    """
    with location.in_words("its configuration describes no model that can be built"):
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        return count_parameters(without_weights(lambda: AutoModelForCausalLM.from_config(config)))


def describe_source(location: Location, config: PreTrainedConfig) -> dict:
    """What a record says of a model: its name, what it is, where it was read, and the hub's revision if from there."""
    return {
        "name": location.name,
        "description": _description(location),
        "source": location.gguf_file or location.path,
        "revision": location.revision,
        "model_type": config.model_type,
    }


def _description(location: Location) -> str:
    """What a model is, for readers: its name, its quantisation if it had one, and what of its folder is left out."""
    name = Path(location.path).resolve().name if location.is_local else location.path
    if location.gguf_file:
        name = describe_file(location)
    if location.name == PACKAGED_MODEL_NAME:
        name += f" (package {PACKAGED_MODEL} {metadata.version(PACKAGED_MODEL)})"
    return name + (", without the adapter beside it" if has_adapter(location) else "")
