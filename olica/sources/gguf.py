"""GGUF files: the configuration that one holds, what transformers would lose of it, and what one says of itself."""

import copy
from functools import cache
from pathlib import Path

from gguf import LlamaFileType
from transformers import AutoConfig, PreTrainedConfig

from ..model.configuration_olica import head_dim
from .gguf_header import GgufHeader, read_header
from .locate import ONE_PART, PACKAGED_MODEL_NAME, PACKAGED_MODEL_TITLE, Location

UNQUANTISED = ("F32", "F16", "BF16")


def read_gguf_config(location: Location) -> PreTrainedConfig:
    """The configuration that transformers reads from a GGUF file.

    Raises:
        ValueError: as `read_header`.
    """
    header_of(location)  # whose errors are the clearer ones
    return copy.deepcopy(_config_of(_state(location)))


def header_of(location: Location) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ValueError: as `read_header`.
    """
    return _header_of(_state(location))


def _state(location: Location) -> tuple[Location, int, int]:
    """What a file that has not changed since is known by: it is read once, for it takes transformers 20 seconds."""
    (path,) = location.weight_files
    return location, path.stat().st_mtime_ns, path.stat().st_size


@cache
def _config_of(state: tuple[Location, int, int]) -> PreTrainedConfig:
    location, *_ = state
    return AutoConfig.from_pretrained(location.path, **location.arguments)


@cache
def _header_of(state: tuple[Location, int, int]) -> GgufHeader:
    (path,) = state[0].weight_files
    return read_header(path)


def add_defaults(location: Location, config: PreTrainedConfig) -> None:
    """Put into `config` what a GGUF file may leave unsaid where transformers takes another default than the format.

    Without a number of key/value heads there are as many as query heads.

    Raises:
        UsageError: the file does not say how many query heads there are.
    """
    header = header_of(location)
    if f"{header.family}.attention.head_count" not in header.fields:
        raise location.error(
            "the file does not say how many attention heads the model has; download or convert it anew"
        )
    if f"{header.family}.attention.head_count_kv" not in header.fields:
        config.num_key_value_heads = config.num_attention_heads


def refuse_lost_settings(location: Location, config: PreTrainedConfig) -> None:
    """Check that transformers reads a GGUF file's settings as those of the model that it holds, and as the whole of it.

    It takes neither the scaling of rotary embeddings nor their width nor Gemma's attention scale from the file.

    Raises:
        UsageError: it would lose one of these, or the file is one part of a split model.
    """
    header = header_of(location)
    fields, family, width = header.fields, header.family, head_dim(config)
    if fields.get("split.count", 1) > 1:
        raise location.error(ONE_PART)
    scaling = [fields.get(f"{family}.rope.{key}", 1) for key in ("scaling.factor", "scale_linear")]
    lost = {
        "rope scaling": fields.get(f"{family}.rope.scaling.type", "none") != "none"
        or any(factor not in (0, 1) for factor in scaling)
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in header.tensors),
        "rope width": fields.get(f"{family}.rope.dimension_count", width) != width,
        "head width": fields.get(f"{family}.attention.key_length", width) != width,
        # Files do not say the scale. It is the head width in every Gemma but those of 27B, whose heads are narrower.
        "attention scale": getattr(config, "query_pre_attn_scalar", width) != width,
    }
    if any(lost.values()):
        names = ", ".join(name for name, is_lost in lost.items() if is_lost)
        raise location.error(
            f"transformers does not take the model's {names} from a GGUF file; give the model's folder of safetensors"
        )


def describe_file(location: Location) -> str:
    """The name that a GGUF file, or its package, gives the model, and its quantisation if it had one."""
    fields = header_of(location).fields
    name = fields.get("general.name") or Path(location.gguf_file).stem
    if location.name == PACKAGED_MODEL_NAME:
        name = PACKAGED_MODEL_TITLE
    kinds = {kind.value: kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in LlamaFileType}
    kind = kinds.get(fields.get("general.file_type"), "GGUF")
    return name if kind in UNQUANTISED else f"{name}, dequantised from {kind}"
