"""Where the weights of a model lie that is streamed, and how some of them are read at a time."""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class StoredWeight:
    """Where a tensor is, and what it is once read."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles(Protocol):
    """Files that hold a model's weights."""

    @property
    def stored(self) -> Mapping[str, StoredWeight]:
        """What they hold, by the model's own names."""

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights of these names, in memory of their own and in `dtype`; nothing else of the files stays there."""


class MappedFiles:
    """Weights that safetensors or .bin files hold under the model's own names.

    Attributes:
        stored: what they hold, by these names.
    """

    def __init__(self, stored: Mapping[str, StoredWeight]):
        """Take what is `stored`, in files that can be mapped."""
        self.stored = stored

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """As `WeightFiles.read`."""
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.stored[name].path, []).append(name)
        weights = {}
        for path, held in by_path.items():
            # A file is mapped as a whole: opened anew, it does not pile up in memory what was read before.
            with _mapped(path) as get:
                for name in held:
                    weights[name] = get(name).to(dtype, copy=True, memory_format=torch.contiguous_format)
        return weights


def stored_weights(paths: Iterable[Path]) -> dict[str, StoredWeight]:
    """What safetensors or .bin files hold, by the names of the tensors."""
    stored = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no dict)
                    view = file.get_slice(name)
                    stored[name] = StoredWeight(path, tuple(view.get_shape()), view[:0].dtype)
        else:
            tensors = load_bin(path)
            stored |= {name: StoredWeight(path, tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return stored


def can_be_mapped(path: Path) -> bool:
    """Whether a file of weights can be read in part: the oldest .bin files of PyTorch are no archives."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def load_bin(path: Path) -> dict[str, Any]:
    """The tensors of a .bin file: views of the mapped file, if it can be mapped."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped(path))


@contextmanager
def _mapped(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """What gives the tensors of a file by their names: views of the file, which are good for as long as it is open."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    else:
        yield load_bin(path).__getitem__
