"""Whether a model's head is its embedding: its weights decide, since its configuration may say otherwise.

A head that was trained apart, in an adapter that was merged since or by whoever wrote a file, leaves the configuration
as it was: tied. transformers then reads both matrices, and does not tie them.

    V entries in the vocabulary, D hidden size
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .weight_files import load_bin

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# Rows that are compared at a time, so that no copy of a matrix is in memory as a whole.
ROWS = 4096


def holds_another_head(files: Iterable[Path]) -> bool:
    """Whether weight files, safetensors or .bin, hold a head (V, D) that is another matrix than the embedding (V, D).

    False where one of the two is missing, or the head is a copy of the embedding.
    """
    found = {}
    for path in files:
        found |= _matrices(path)
    return found.keys() == {HEAD, EMBEDDING} and not _equal(found[HEAD], found[EMBEDDING])


def _matrices(path: Path) -> dict[str, Any]:
    """Those of the two that a file holds: tensors or, of safetensors, what reads them when it is sliced."""
    if path.suffix == ".safetensors":
        file = safe_open(path, framework="pt")
        names, get = file.keys(), file.get_slice
    else:
        tensors = load_bin(path)
        names, get = tensors.keys(), tensors.__getitem__
    return {end: get(name) for name in names for end in (HEAD, EMBEDDING) if name.endswith(end)}


def _equal(head, embedding) -> bool:
    shapes = [tuple(m.shape if isinstance(m, torch.Tensor) else m.get_shape()) for m in (head, embedding)]
    if shapes[0] != shapes[1]:
        return False
    starts = range(0, shapes[0][0], ROWS)
    parts = ((head[start : start + ROWS], embedding[start : start + ROWS]) for start in starts)
    return all(torch.equal(ours.float(), theirs.float()) for ours, theirs in parts)
