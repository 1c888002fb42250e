"""Write a checkpoint that was pruned in the layout `olica` in another one: layer by layer, and whole or not at all."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..checks import check_room, check_writable
from ..errors import UsageError
from ..model.configuration_olica import PrunedConfig
from ..model.dense_form import filled, own_config, plan_of
from ..model.layouts import DENSE, EXPORTS, for_family
from ..model.skeleton import pruned_skeleton, try_out
from ..sources.configuration import read_config, refuse_quantised
from ..sources.dense_model import DenseModel
from ..sources.locate import Location, locate
from ..sources.model_files import folder_weight_bytes
from ..sources.opening import open_dense_model
from ..sources.tokenizers import read_tokenizer
from ..sources.weight_files import stored_weights
from ..tensor_files import bytes_of, entry_of, write_pieces
from .checkpoint import describe
from .model_card import write_card
from .output_path import in_place_of, output_in_words
from .records import PRUNING_RECORD, read_pruning_record, understood, write_record
from .weight_shards import cut_into_files, write_index


def export(checkpoint: str | Path, path: str | Path, layout: str, largest: int, overwrite: bool = False) -> int:
    """Write a checkpoint of the layout `olica` in another one.

    Args:
        checkpoint: its folder.
        path: the folder of the new one.
        layout: a key of EXPORTS.
        largest: bytes of weights that a file has at most, unless a single one has more.
        overwrite: whether a checkpoint that is there may be replaced.

    Returns:
        Bytes of the files of weights.

    Raises:
        UsageError: the layout cannot hold the checkpoint; unreadable files; no room.
    """
    location, path = locate(str(checkpoint), "CHECKPOINT"), Path(path).expanduser()
    _check_path(path, location, overwrite)
    config = read_config(location)
    if not isinstance(config, PrunedConfig):
        raise location.error(
            "it is in its family's own architecture already, or in that of another layout; only checkpoints of the "
            "layout olica are made into others"
        )
    refuse_quantised(config, location)
    own, plan = own_config(config), plan_of(config)
    try:
        target = pruned_skeleton(own, plan, for_family(EXPORTS[layout], own))
    except UsageError:
        raise
    except ValueError as error:
        others = "" if layout == DENSE else "; give --layout dense, or prune with this one"
        raise location.error(f"{error}{others}") from error
    tokenizer, source = read_tokenizer(location), open_dense_model(location)
    dtype = source.model.dtype
    entries = {name: entry_of(weight.shape, dtype) for name, weight in target.named_parameters()}
    sizes = {name: entry.size for name, entry in entries.items()}
    check_room(path, sum(sizes.values()), "--output_path", "the checkpoint")
    with in_place_of(path) as partial:
        partial.mkdir()
        with location.in_words("what is made of it would not load"):
            try_out(describe(partial, source, target, tokenizer, lambda: output_in_words(path)))
        weights = _weights(source, target, location)
        for file, names in cut_into_files(sizes, largest).items():
            pieces = (bytes_of(weight.to(dtype)) for weight in islice(weights, len(names)))
            write_pieces(partial / file, {name: entries[name] for name in names}, pieces)
        write_index(partial, stored_weights(partial.glob("*.safetensors")))
        record = read_pruning_record(location.path)
        if record:
            record |= {"exported": layout, "weight_bytes_on_disk": folder_weight_bytes(partial)}
            with understood(location.path):
                write_record(partial / PRUNING_RECORD, record)
                write_card(partial, record)
    return folder_weight_bytes(path)


def _check_path(path: Path, location: Location, overwrite: bool) -> None:
    check_writable(path, "--output_path")
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_symlink() or not (path / CONFIG_NAME).is_file():
        raise UsageError(f"--output_path {path} is there and no folder of a checkpoint; give another name")
    if not overwrite:
        raise UsageError(f"--output_path {path} exists already; give --overwrite to replace it, or another name")
    if location.is_local and Path(location.path).resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--output_path {path} is or holds CHECKPOINT itself; give another name")


def _weights(source: DenseModel, target: PreTrainedModel, location: Location) -> Iterator[Tensor]:
    """The weights of `target`, in the order of its parameters, read and made a layer at a time."""
    embedding, others = source.other_names()
    for name in embedding:
        yield source.read([name])[name]
    own_layers = target.get_decoder().layers
    for index, layer in source.layers(torch.device("cpu"), "export"):
        try:
            weights = filled(layer, own_layers[index], target.config)
        except ValueError as error:
            raise location.error(f"layer {index}: {error}; prune the model in bfloat16 or float32") from error
        yield from weights.values()
        del weights  # before the next layer is read
    for name in others:
        yield source.read([name])[name]
