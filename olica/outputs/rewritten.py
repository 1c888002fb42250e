"""Write a checkpoint anew from another one: weight by weight, and whole or not at all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..checks import check_room, check_writable
from ..errors import UsageError
from ..model.skeleton import try_out
from ..sources.dense_model import DenseModel
from ..sources.locate import Location
from ..sources.model_files import folder_weight_bytes
from ..sources.weight_files import stored_weights
from ..tensor_files import bytes_of, entry_of, write_pieces
from .checkpoint import describe
from .output_path import in_place_of, output_in_words
from .weight_shards import cut_into_files, write_index


@dataclass(frozen=True)
class Made:
    """What is made of a checkpoint.

    Attributes:
        model: the new one, without weights.
        tokenizer: of the new one.
        weights: those of `model`, in the order of its parameters.
        add_records: writes records and a card into the folder that it is given, when the weights are there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    weights: Iterator[Tensor]
    add_records: Callable[[Path], None]


def check_path(path: Path, location: Location, overwrite: bool) -> None:
    """Raise UsageError unless a folder can be written at `path`, which is not that of the checkpoint at `location`."""
    check_writable(path, "--output_path")
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_symlink() or not (path / CONFIG_NAME).is_file():
        raise UsageError(f"--output_path {path} is there and no folder of a checkpoint; give another name")
    if not overwrite:
        raise UsageError(f"--output_path {path} exists already; give --overwrite to replace it, or another name")
    if location.is_local and Path(location.path).resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--output_path {path} is or holds CHECKPOINT itself; give another name")


def write_anew(path: Path, location: Location, source: DenseModel, made: Made, largest: int) -> int:
    """Write a checkpoint that is made of another one.

    Args:
        path: its folder.
        location: of the other one.
        source: the other one, opened.
        made: the new one.
        largest: bytes of weights that a file has at most, unless a single one has more.

    Returns:
        Bytes of the files of weights.

    Raises:
        UsageError: what is made would not load; no room; what reading raises.
    """
    dtype = source.model.dtype
    entries = {name: entry_of(weight.shape, dtype) for name, weight in made.model.named_parameters()}
    sizes = {name: entry.size for name, entry in entries.items()}
    check_room(path, sum(sizes.values()), "--output_path", "the checkpoint")
    with in_place_of(path) as partial:
        partial.mkdir()
        with location.in_words("what is made of it would not load"):
            try_out(describe(partial, source, made.model, made.tokenizer, lambda: output_in_words(path)))
        for file, names in cut_into_files(sizes, largest).items():
            pieces = (bytes_of(weight.to(dtype)) for weight in islice(made.weights, len(names)))
            write_pieces(partial / file, {name: entries[name] for name in names}, pieces)
        write_index(partial, stored_weights(partial.glob("*.safetensors")))
        made.add_records(partial)
    return folder_weight_bytes(path)
