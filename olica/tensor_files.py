"""Files of tensors in the format of safetensors, written as other files are.

A file is the length of its header, eight bytes, little end first; the header, JSON that gives for every tensor its
dtype, its shape and where its bytes begin and end; and these bytes, one tensor after the other.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor

LENGTH = struct.Struct("<Q")  # of the header
METADATA, OF_WEIGHTS = "__metadata__", {"format": "pt"}  # the latter is what transformers wants of weights
BLOCK = 1 << 24  # bytes that are copied at a time


class TensorEntry(NamedTuple):
    """A tensor of a file: its dtype by the name that the format has for it, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int = 0  # where in the file they begin; of no concern to a file that is yet to be written

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return self.size // max(1, prod(self.shape))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file of safetensors, readable for whom the umask says.

    safetensors itself makes files that only their owner reads, and puts one in the place of what is there.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def entry_of(shape: tuple[int, ...], dtype: torch.dtype) -> TensorEntry:
    """What a file would say of a tensor."""
    described, _ = _header(save({"none": torch.empty(0, dtype=dtype)}))
    return TensorEntry(described["none"]["dtype"], tuple(shape), prod(shape) * dtype.itemsize)


def entries_of(path: Path) -> dict[str, TensorEntry]:
    """What a file of safetensors holds, by the names of the tensors."""
    with path.open("rb") as file:
        start = file.read(LENGTH.size)
        described, data = _header(start + file.read(*LENGTH.unpack(start)))
    entries = {}
    for name, row in described.items():
        begin, end = row["data_offsets"]
        entries[name] = TensorEntry(row["dtype"], tuple(row["shape"]), end - begin, data + begin)
    return entries


def _header(content: bytes) -> tuple[dict, int]:
    """The tensors that the header of a file describes, and where their bytes begin."""
    (length,) = LENGTH.unpack_from(content)
    end = LENGTH.size + length
    described = json.loads(content[LENGTH.size : end])
    described.pop(METADATA, None)
    return described, end


def write_pieces(path: Path, entries: Mapping[str, TensorEntry], pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file of tensors whose bytes come piece by piece, in the order of `entries`: none has to be in memory.

    Raises:
        RuntimeError: the pieces are more or fewer bytes than the entries say.
    """
    header: dict = {METADATA: OF_WEIGHTS}
    size = 0
    for name, entry in entries.items():
        header[name] = dict(dtype=entry.dtype, shape=entry.shape, data_offsets=(size, size + entry.size))
        size += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH.size)  # so that what follows begins at a multiple of eight
    with path.open("wb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        written = sum(file.write(piece) for piece in pieces)
    if written != size:
        raise RuntimeError(f"{written} bytes of tensors came for {path}, not {size}")


def bytes_in(path: Path, entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor of a file, block by block.

    Raises:
        EOFError: the file ends before them.
    """
    left = entry.size
    with path.open("rb") as file:
        file.seek(entry.start)
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise EOFError(f"{path} ends within a tensor")
            yield block
            left -= len(block)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the host, as files have them."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
