"""Whether a model's head is its embedding: its weights decide, since its configuration may say otherwise.

A head that was trained apart, in an adapter that was merged since or by whoever wrote a file, leaves the configuration
as it was: tied. transformers then reads both matrices, and does not tie them.

    V entries in the vocabulary, D hidden size
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from .weight_files import mapped, stored_weights

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# Rows that are compared at a time, so that no copy of a matrix is in memory as a whole.
ROWS = 4096


def holds_another_head(files: Iterable[Path]) -> bool:
    """Whether weight files, safetensors or .bin, hold a head (V, D) that is another matrix than the embedding (V, D).

    False where one of the two is missing, or the head is a copy of the embedding.
    """
    stored = stored_weights(files)
    pair = [next((name for name in stored if name.endswith(end)), "") for end in (HEAD, EMBEDDING)]
    if not all(pair):
        return False
    head, embedding = (stored[name] for name in pair)
    if head.shape != embedding.shape:
        return True
    with mapped(head.path) as of_head, mapped(embedding.path) as of_embedding:
        rows = zip(of_head(pair[0]).split(ROWS), of_embedding(pair[1]).split(ROWS), strict=True)
        return not all(torch.equal(ours.float(), theirs.float()) for ours, theirs in rows)
