"""Write a checkpoint that was pruned in the layout `olica` in another one, layer by layer."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..model.configuration_olica import PrunedConfig
from ..model.dense_form import filled, own_config, plan_of
from ..model.layouts import DENSE, EXPORTS, for_family
from ..model.skeleton import pruned_skeleton
from ..sources.configuration import read_config, refuse_quantised
from ..sources.dense_model import DenseModel
from ..sources.locate import Location, locate
from ..sources.model_files import folder_weight_bytes
from ..sources.opening import open_dense_model
from ..sources.tokenizers import read_tokenizer
from .model_card import write_card
from .records import PRUNING_RECORD, keep_vocabulary_record, read_pruning_record, understood, write_record
from .rewritten import Made, check_path, write_anew


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
    check_path(path, location, overwrite)
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

    def add_records(folder: Path) -> None:
        keep_vocabulary_record(location.path, folder)
        record = read_pruning_record(location.path)
        if record:
            record |= {"exported": layout, "weight_bytes_on_disk": folder_weight_bytes(folder)}
            with understood(location.path):
                write_record(folder / PRUNING_RECORD, record)
                write_card(folder, record)

    made = Made(target, tokenizer, _weights(source, target, location), add_records)
    return write_anew(path, location, source, made, largest)


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
