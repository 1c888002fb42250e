"""Write a model as a GGUF file, which llama.cpp and what is built on it run: whole or not at all."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..checks import check_record_path, check_room
from ..errors import UsageError
from ..model.configuration_olica import PREFIX
from ..sources.configuration import read_config, refuse_quantised
from ..sources.locate import Location, locate
from ..sources.opening import open_dense_model
from ..sources.tokenizers import read_tokenizer
from .gguf_layout import GgufLayout, Shapes
from .gguf_vocabulary import vocabulary_of
from .output_path import in_place_of

logger = logging.getLogger(__name__)

# The forms of matrices, and what the file says of itself.
FORMS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
LARGEST = torch.finfo(torch.float16).max
# Rows that are converted at a time, so that no float32 copy of a matrix is in memory as a whole.
ROWS = 1024


@dataclass(frozen=True)
class Weights:
    """The weights of a model, wherever they are.

    Attributes:
        shapes: theirs, by their names, tied ones once.
        read: gives the one of a name.
    """

    shapes: Shapes
    read: Callable[[str], Tensor]


def write_gguf(folder: str | Path, path: str | Path, form: str = "f16", overwrite: bool = False) -> int:
    """Write the model and tokenizer in `folder` as a GGUF file, tensor by tensor.

    Args:
        folder: of a dense model, or a pruned one in its family's own architecture; names and GGUF files as well.
        path: of the file.
        form: of the matrices, a key of FORMS; vectors are float32.
        overwrite: whether a file that is there may be replaced.

    Returns:
        Bytes of the file.

    Raises:
        UsageError: the model, the tokenizer or the form of its matrices has no place in GGUF; unreadable files; no
            room.
    """
    location, path = locate(str(folder), "CHECKPOINT"), Path(path).expanduser()
    _check_path(path, overwrite)
    config = read_config(location)
    _refuse_unwritable(location, config)
    tokenizer = read_tokenizer(location)
    if tokenizer is None:
        raise location.error("the folder has no tokenizer, which a GGUF file has to have")
    dense = open_dense_model(location)
    shapes = {name: tuple(parameter.shape) for name, parameter in dense.model.named_parameters()}
    weights = Weights(shapes, lambda name: dense.read([name])[name])
    write_model(dense.config, weights, tokenizer, path, form, name=location.label)
    return path.stat().st_size


def write_model(
    config: PreTrainedConfig,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    form: str,
    *,
    name: str,
) -> None:
    """Write a model whose layers may have different sizes, which are those of its weights.

    Args:
        config: of its family; heads and channels are not taken from it.
        weights: by the names of the family.
        tokenizer: of the model.
        path: of the file.
        form: of the matrices, a key of FORMS.
        name: of the model, for who reads the file.

    Raises:
        UsageError: as `write_gguf`.
    """
    kind, file_type = FORMS[form]
    layout, vocabulary = GgufLayout(config, weights.shapes), vocabulary_of(tokenizer, config)
    if layout.context_length < config.max_position_embeddings:
        logger.warning(
            "llama.cpp's %s has no attention windows: the file says that the model takes %d tokens, not %d",
            layout.name,
            layout.context_length,
            config.max_position_embeddings,
        )
    computed = layout.computed()
    kinds = {name: _kind(name, shape, kind) for name, shape in weights.shapes.items()}
    sizes = {name: _bytes(shape, kinds[name]) for name, shape in weights.shapes.items()}
    check_room(path, sum(sizes.values()), "--output_path", "the file")
    with in_place_of(path) as partial, _writer(layout.name) as writer:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        layout.add_to(writer)
        vocabulary.add_to(writer)
        for computed_name, tensor in computed.items():
            f32 = GGMLQuantizationType.F32
            writer.add_tensor_info(computed_name, tensor.shape, np.dtype(np.float32), tensor.numpy().nbytes, f32)
        for source, shape in weights.shapes.items():
            # With the kind given, the type of numbers does not count.
            writer.add_tensor_info(
                layout.names[source], shape, np.dtype(np.float32), sizes[source], raw_dtype=kinds[source]
            )
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in computed.values():
            writer.write_tensor_data(tensor.numpy())
        for source in weights.shapes:
            weight = layout.arranged(source, weights.read(source))
            writer.write_tensor_data(_converted(source, weight, kinds[source]))


def _check_path(path: Path, overwrite: bool) -> None:
    check_record_path(path, "--output_path")
    if path.suffix.lower() != ".gguf":
        raise UsageError(f"--output_path {path}: give a name that ends in .gguf, or --layout for a folder")
    if path.exists() and not overwrite:
        raise UsageError(f"--output_path {path} exists already; give --overwrite to replace it, or another name")


def _refuse_unwritable(location: Location, config: PreTrainedConfig) -> None:
    if config.model_type.startswith(PREFIX):
        raise location.error(
            "the sizes of this pruned checkpoint are of the layout olica, which GGUF cannot hold: factors and "
            "narrowed heads; give what --layout dense makes of it, or one pruned in its family's own architecture"
        )
    refuse_quantised(config, location)


def _kind(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """How a weight is stored: matrices as `kind`."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block = GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
        raise UsageError(
            f"--gguf {kind.name.lower()} wants rows that are multiples of {block}, and those of {name} have "
            f"{shape[-1]}; give f16 or bf16, or prune with --round_to {block}"
        )
    return kind


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def _converted(name: str, weight: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a weight, (rows, bytes of a row) for matrices."""
    parts = weight.split(ROWS)
    if kind == GGMLQuantizationType.F16 and max(part.abs().max().item() for part in parts) > LARGEST:
        raise UsageError(f"--gguf f16: {name} has values beyond {LARGEST:g}, the largest of float16; give bf16")
    row = (_bytes(weight.shape[1:], kind),) if weight.dim() > 1 else ()
    converted = np.empty((len(weight), *row), np.uint8) if row else np.empty(len(weight), np.float32)
    for start, part in zip(range(0, len(weight), ROWS), parts, strict=True):
        # A copy: the quantisation of gguf goes on views that numpy does not make of others.
        numbers = quantize(np.ascontiguousarray(part.float().numpy()), kind)
        converted[start : start + ROWS] = numbers.view(np.uint8) if row else numbers
    return converted


@contextmanager
def _writer(architecture: str) -> Iterator[GGUFWriter]:
    writer = GGUFWriter(None, architecture)
    try:
        yield writer
    finally:
        writer.close()
