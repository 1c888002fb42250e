"""Weights of a GGUF file under the names of transformers, dequantised a few at a time.

What comes out is bit for bit what transformers reads of the file, which it can as a whole only.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from os import SEEK_CUR
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers.integrations.gguf import read_gguf_metadata

from .weight_files import StoredWeight

# What llama.cpp changes of a family's weights when it writes them: the order of the rows of queries and keys, or the
# norms, to which it adds the 1 that the family's code adds.
PERMUTED = ("llama",)
OFFSET_NORMS = ("gemma2", "gemma3")
UNCHANGED = ("qwen2", "qwen3", "phi3")
# Values that are dequantised at a time, on the way to the dtype that is asked for.
VALUES = 1 << 22
SCALARS = {int(kind): np.dtype(number) for kind, number in gguf.GGUFReader.gguf_scalar_to_np.items()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: how it is quantised, its sizes in PyTorch's order, the byte at which it begins."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int


class GgufWeights:
    """The weights of a GGUF file.

    Attributes:
        stored: what it holds, by the model's own names.
    """

    def __init__(self, path: Path, tensors: dict[str, GgufTensor], heads: dict[str, int], norm_offset: int):
        """Take what lies at `path`.

        Args:
            path: of the file.
            tensors: the tensors of the file, by the names of the weights that they are.
            heads: of those weights whose rows are in another order, how many heads they have.
            norm_offset: what is added to the norms in the file.
        """
        self.path, self.tensors, self.heads, self.norm_offset = path, tensors, heads, norm_offset
        self.stored = {name: StoredWeight(path, tensor.shape, torch.float32) for name, tensor in tensors.items()}

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """As `WeightFiles.read`."""
        with self.path.open("rb") as file:
            return {name: self._weight(file, name, dtype) for name in names}

    def _weight(self, file: BinaryIO, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.tensors[name]
        offset = self.norm_offset if name.endswith("norm.weight") else 0
        weight = _dequantised(file, tensor, dtype, offset)
        if name not in self.heads:
            return weight
        pairs = weight.unflatten(0, (self.heads[name], -1, 2))  # llama.cpp rotates neighbours, transformers halves
        return pairs.transpose(1, 2).reshape(tensor.shape)


def gguf_weights(path: Path, names: Iterable[str], layers: int) -> GgufWeights | None:
    """The weights of the GGUF file at `path`, or None unless we know of each of its tensors which weight it is.

    Args:
        path: of a file whose architecture transformers reads.
        names: of the model's weights, tied ones once.
        layers: how many decoder layers the model has.
    """
    fields, _ = read_gguf_metadata(str(path))
    family = fields["general.architecture"]
    if family not in PERMUTED + OFFSET_NORMS + UNCHANGED:
        return None
    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    table = gguf.get_tensor_name_map(architecture, layers)
    found = {name: table.get_name(name, (".weight", ".bias")) for name in names}
    tensors = tensors_of(path)
    if sorted(map(str, found.values())) != sorted(tensors):
        return None
    heads = {}
    if family in PERMUTED:
        for part, key in ((".q_proj.", "head_count"), (".k_proj.", "head_count_kv")):
            if (count := fields.get(f"{family}.attention.{key}")) is None:
                return None  # transformers leaves the order as it is
            heads |= {name: count for name in found if part in name}
    return GgufWeights(path, {name: tensors[key] for name, key in found.items()}, heads, int(family in OFFSET_NORMS))


def _dequantised(file: BinaryIO, tensor: GgufTensor, dtype: torch.dtype, offset: int) -> Tensor:
    """A tensor in `dtype` less `offset`; only a part of it is in single precision at a time."""
    *_, width = tensor.shape
    values, size = gguf.GGML_QUANT_SIZES[tensor.kind]
    row_bytes = width // values * size
    weight = torch.empty(tensor.shape, dtype=dtype)
    file.seek(tensor.start)
    for rows in weight.view(-1, width).split(max(1, VALUES // width)):
        # Not mapped: what is read of a mapped file counts as memory of this process.
        raw = np.fromfile(file, np.uint8, len(rows) * row_bytes).reshape(len(rows), row_bytes)
        single = torch.from_numpy(gguf.dequantize(raw, tensor.kind))
        rows.copy_(single - offset if offset else single)
    return weight


def tensors_of(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file by their names in it; its metadata are passed over.

    gguf's own reader makes arrays of every token: for a vocabulary of 150,000, seconds and half a gigabyte.
    """
    with path.open("rb") as file:
        magic, version, count, fields = _numbers(file, "IIQQ")
        if magic != gguf.GGUF_MAGIC or version not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        for _ in range(fields):
            name, (kind,) = _string(file), _numbers(file, "I")
            value = _value(file, kind)
            if name == gguf.Keys.General.ALIGNMENT:
                alignment = value
        described = []
        for _ in range(count):
            name, (dimensions,) = _string(file), _numbers(file, "I")
            *sizes, kind, start = _numbers(file, f"{dimensions}QIQ")
            described.append((name, gguf.GGMLQuantizationType(kind), tuple(sizes[::-1]), start))
        first = -(-file.tell() // alignment) * alignment
    return {name: GgufTensor(kind, shape, first + start) for name, kind, shape, start in described}


def _numbers(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))


def _string(file: BinaryIO) -> str:
    (length,) = _numbers(file, "Q")
    return file.read(length).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    """A number or a string of the metadata; of a list nothing is kept."""
    if kind == gguf.GGUFValueType.STRING:
        return _string(file)
    if kind != gguf.GGUFValueType.ARRAY:
        return np.fromfile(file, SCALARS[kind], 1).item()
    kind, count = _numbers(file, "IQ")
    if kind in SCALARS:
        file.seek(SCALARS[kind].itemsize * count, SEEK_CUR)
    else:
        for _ in range(count):
            _value(file, kind)
    return None
