"""The files that the weights of a checkpoint are in, named and indexed as transformers has it."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..sources.weight_files import StoredWeight

# What commands take for `--max_shard_size`, and how they say what it is.
LARGEST_FILE = "5GB"
ABOUT_LARGEST_FILE = "largest file of weights, such as 500MB or 5GB; a single weight that is larger has its own"


def cut_into_files(sizes: Mapping[str, int], largest: int) -> dict[str, list[str]]:
    """Which weights go into which file: in their order, as many as it holds.

    Args:
        sizes: bytes of the weights, by their names.
        largest: bytes of weights that a file has at most, unless it has a single one, which is not cut apart.

    Returns:
        The names of the weights, by the names of the files.
    """
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SAFE_WEIGHTS_NAME: groups[0]}
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    return {f"{stem}-{number:05}-of-{len(groups):05}.{suffix}": group for number, group in enumerate(groups, 1)}


def write_index(folder: Path, stored: Mapping[str, StoredWeight]) -> None:
    """Write what says in which file of a folder each weight is, unless they are all in one that needs no index."""
    files = {name: weight.path.name for name, weight in sorted(stored.items())}
    if {*files.values()} == {SAFE_WEIGHTS_NAME}:
        return
    counts = {name: prod(weight.shape) for name, weight in stored.items()}
    size = sum(counts[name] * weight.dtype.itemsize for name, weight in stored.items())
    index = {"metadata": {"total_parameters": sum(counts.values()), "total_size": size}, "weight_map": files}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
