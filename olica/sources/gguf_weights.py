"""Weights of a GGUF file under the names of transformers, dequantised a few at a time.

What comes out is bit for bit what transformers reads of the file, which it can as a whole only.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .gguf import header_of
from .gguf_header import GgufTensor
from .locate import Location
from .weight_files import StoredWeight

# What llama.cpp changes of a family's weights when it writes them: the order of the rows of queries and keys, or the
# norms, to which it adds the 1 that the family's code adds.
PERMUTED = ("llama",)
OFFSET_NORMS = ("gemma2", "gemma3")
UNCHANGED = ("qwen2", "qwen3", "phi3")
# Values that are dequantised at a time, on the way to the dtype that is asked for.
VALUES = 1 << 22


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


def gguf_weights(location: Location, model: PreTrainedModel) -> GgufWeights:
    """The weights of a GGUF file, as far as they are those of `model`, which needs none of its own.

    Raises:
        UsageError: we do not know how the format holds the model's family; or the file holds more than the model does,
            biases of a llama for example, of which it does not say that the model has them.
    """
    header = header_of(location)
    if header.family not in PERMUTED + OFFSET_NORMS + UNCHANGED:
        raise location.error(
            f"we do not know how GGUF files hold the weights of {header.family}; give the model's folder of safetensors"
        )
    (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.family)
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    keys = {name: table.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}
    if more := sorted(header.tensors.keys() - keys.values()):
        raise location.error(
            f"the file holds {len(more)} tensors for which its settings have no place, such as {more[0]}; give the "
            "model's folder of safetensors"
        )
    counts = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    heads = {
        name: count for name in keys for part, count in counts.items() if header.family in PERMUTED and part in name
    }
    tensors = {name: header.tensors[key] for name, key in keys.items() if key in header.tensors}
    return GgufWeights(location.weight_files[0], tensors, heads, int(header.family in OFFSET_NORMS))


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
