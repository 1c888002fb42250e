"""What a GGUF file says of itself: settings, and the table of its tensors, without a weight being read.

gguf's own reader makes arrays of every token: for a vocabulary of 150,000, seconds and half a gigabyte.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf

MAGIC, VERSIONS = b"GGUF", (2, 3)
CUT_SHORT = "it is cut short; download or convert it anew"
# How `struct` calls the numbers of the format.
NUMBERS: dict[int, str] = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.BOOL: "?",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: how it is quantised, its sizes in PyTorch's order, the byte at which it begins."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """The byte behind its last."""
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.start + prod(self.shape) // values * size


@dataclass(frozen=True)
class GgufHeader:
    """The settings of a GGUF file, without lists, and its tensors, both by their names in the file."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def family(self) -> str:
        """The format's name of the model's family."""
        return self.fields[gguf.Keys.General.ARCHITECTURE]


def read_header(path: Path) -> GgufHeader:
    """The header of the GGUF file at `path`.

    Raises:
        ValueError: no GGUF file, one of another version, or one that is cut short.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.take(len(MAGIC)) != MAGIC:
            raise ValueError("it is no GGUF file")
        if (version := reader.number("I")) not in VERSIONS:
            raise ValueError(f"its GGUF version is {version}, of which we read {' and '.join(map(str, VERSIONS))} only")
        tensor_count, field_count = reader.number("Q"), reader.number("Q")
        fields = {reader.text(): reader.value(reader.number("I")) for _ in range(field_count)}
        if gguf.Keys.General.ARCHITECTURE not in fields:
            raise ValueError("it does not say of which architecture it is")
        described = [_tensor(reader) for _ in range(tensor_count)]
        alignment = fields.get(gguf.Keys.General.ALIGNMENT, gguf.GGUF_DEFAULT_ALIGNMENT)
        first = -(-reader.at // alignment) * alignment
        tensors = {name: GgufTensor(kind, shape, first + start) for name, kind, shape, start in described}
        if any(tensor.end > len(data) for tensor in tensors.values()):
            raise ValueError(CUT_SHORT)
    return GgufHeader(fields, tensors)


def _tensor(reader: "_Reader") -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    """Name, kind, sizes, and the distance from the first tensor."""
    name = reader.text()
    shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
    return name, gguf.GGMLQuantizationType(reader.number("I")), shape, reader.number("Q")


class _Reader:
    """Takes values from a file, one after the other.

    Attributes:
        at: the byte that comes next.
    """

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise ValueError(CUT_SHORT)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """A number or a text of the settings; of a list nothing is kept."""
        if kind == gguf.GGUFValueType.STRING:
            return self.text()
        if kind != gguf.GGUFValueType.ARRAY:
            return self.number(NUMBERS[gguf.GGUFValueType(kind)])
        kind, count = self.number("I"), self.number("Q")
        if form := NUMBERS.get(kind):
            self.take(count * struct.calcsize(f"<{form}"))
        else:
            for _ in range(count):
                self.value(kind)
        return None
