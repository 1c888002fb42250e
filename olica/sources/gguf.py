"""GGUF files: what transformers would lose of one, and what one says of itself.

Their weights are read dequantised, in float32.
"""

from pathlib import Path

from gguf import LlamaFileType
from transformers import PreTrainedConfig
from transformers.integrations.gguf import read_gguf_metadata

from ..model.configuration_olica import head_dim
from .locate import ONE_PART, PACKAGED_MODEL_NAME, PACKAGED_MODEL_TITLE, Location

UNQUANTISED = ("F32", "F16", "BF16")


def refuse_lost_settings(location: Location, config: PreTrainedConfig) -> None:
    """Check that transformers reads a GGUF file as the model that it holds, and as the whole of it.

    It takes neither the scaling of rotary embeddings nor their width nor Gemma's attention scale from the file.

    Raises:
        UsageError: it would lose one of these, or the file is one part of a split model.
    """
    fields, tensors = _metadata(location)
    if fields.get("split.count", 1) > 1:
        raise location.error(ONE_PART)
    family, width = fields["general.architecture"], head_dim(config)
    scaling = [fields.get(f"{family}.rope.{key}", 1) for key in ("scaling.factor", "scale_linear")]
    lost = {
        "rope scaling": fields.get(f"{family}.rope.scaling.type", "none") != "none"
        or any(factor not in (0, 1) for factor in scaling)
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in tensors),
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


def refuse_unread_tensors(location: Location, read: int) -> None:
    """Raise UsageError if a GGUF file holds more tensors than were `read` of it: biases of a llama, for example."""
    _, tensors = _metadata(location)
    if len(tensors) > read:
        raise location.error(
            f"the file holds {len(tensors)} tensors, of which transformers reads {read}; "
            "give the model's folder of safetensors"
        )


def describe_file(location: Location) -> str:
    """The name that a GGUF file, or its package, gives the model, and its quantisation if it had one."""
    fields, _ = _metadata(location)
    name = fields.get("general.name") or Path(location.gguf_file).stem
    if location.name == PACKAGED_MODEL_NAME:
        name = PACKAGED_MODEL_TITLE
    kinds = {kind.value: kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in LlamaFileType}
    kind = kinds.get(fields.get("general.file_type"), "GGUF")
    return name if kind in UNQUANTISED else f"{name}, dequantised from {kind}"


def _metadata(location: Location) -> tuple[dict, dict]:
    """The fields of a GGUF file and its tensors' descriptions, by their names."""
    (file,) = location.weight_files
    return read_gguf_metadata(str(file))
