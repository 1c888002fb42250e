"""A model's weights, read as a whole and checked one by one, and a model that has none yet."""

from collections.abc import Iterable

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .configuration import read_config
from .gguf_weights import GgufWeights, gguf_weights
from .locate import Location

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights of old checkpoints that today's models compute instead.
IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)
# Where peft is installed, transformers puts an adapter that lies beside a model into it. It finds none in this folder.
NO_ADAPTER = {"subfolder": "no-adapter"}


def read_model(location: Location, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """Read a dense or pruned model into host memory, every weight checked.

    Args:
        location: from `locate`.
        dtype: a key of DTYPES, or "auto" for that of the checkpoint (float32 for GGUF).
        device_map: "auto" spreads the layers over all GPUs, the host and at last the disk.

    Raises:
        UsageError: unreadable files; weights that are missing, of another size, not of this model, NaN or infinite.
    """
    config = read_config(location)  # which knows whether the head is tied
    how = dict(
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported below, by name
        device_map=device_map,
    )
    with location.in_words("its weights cannot be read"):
        if location.gguf_file:
            empty, files = gguf_model(location, config, dtype)
            how |= {"state_dict": files.read(files.stored, empty.dtype), "dtype": empty.dtype}
            model, info = type(empty).from_pretrained(None, **how)
        else:
            how |= {"adapter_kwargs": NO_ADAPTER, "dtype": DTYPES.get(dtype, dtype)}
            model, info = AutoModelForCausalLM.from_pretrained(location.path, **how)
    refuse_weights(location, "lacks", info["missing_keys"])
    refuse_weights(location, "holds in another size", (key[0] for key in info["mismatched_keys"]))
    refuse_weights(location, "holds, but its configuration has no place for,", info["unexpected_keys"])
    # Layers that a device map left on the disk are read when they are run.
    read = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta)
    bad = (name for name, parameter in read if not torch.isfinite(parameter).all())
    refuse_weights(location, "holds NaN or infinite values in", bad)
    return model.eval()


def gguf_model(location: Location, config: PreTrainedConfig, dtype: str) -> tuple[PreTrainedModel, GgufWeights]:
    """The model of a GGUF file without weights, and what reads them; the dtype "auto" stands for float32.

    Raises:
        UsageError: as `gguf_weights`.
    """
    model = empty_model(location, config, DTYPES.get(dtype, torch.float32))
    return model, gguf_weights(location, model)


def empty_model(location: Location, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, but with the buffers that it computes, in `dtype`."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which the context undoes
    if location.gguf_file:
        return model.eval()  # what lies beside the file says nothing of it
    try:
        model.generation_config = GenerationConfig.from_pretrained(location.path)
    except OSError:  # there is none: what an old config.json says of generation
        model.generation_config = GenerationConfig.from_pretrained(
            location.path, config_file_name="config.json", _from_model_config=True
        )
    return model.eval()


def refuse_weights(location: Location, fault: str, names: Iterable[str]) -> None:
    """Raise UsageError if there are any `names` of weights with this fault."""
    found = sorted(name for name in names if not name.endswith(IGNORED_WEIGHTS))
    if found:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise location.error(f"the checkpoint {fault} {len(found)} weights ({listed}); download or convert it anew")


def bytes_per_weight(location: Location, config: PreTrainedConfig, dtype: str) -> int:
    """Bytes of one weight once read; GGUF, and a configuration that names no dtype, are taken for float32."""
    if dtype != "auto":
        return DTYPES[dtype].itemsize
    named = None if location.gguf_file else config.dtype
    return named.itemsize if isinstance(named, torch.dtype) else torch.float32.itemsize
