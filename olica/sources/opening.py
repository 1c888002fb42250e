"""How a dense model is opened: to be read layer by layer wherever its files allow it."""

import logging

from transformers.utils.hub import get_checkpoint_shard_files

from .configuration import read_config
from .dense_model import DenseModel, StreamedModel
from .locate import Location
from .model_files import WEIGHT_FORMS
from .tied_head import HEAD
from .weight_files import MappedFiles, WeightFiles, can_be_mapped, stored_weights
from .weights import DTYPES, IGNORED_WEIGHTS, empty_model, gguf_model, read_model

logger = logging.getLogger(__name__)


def open_dense_model(location: Location, dtype: str = "auto") -> DenseModel:
    """The dense model at `location`, read layer by layer where we know which weight each tensor of its files is.

    Otherwise (names or a tie that only transformers understands, the oldest .bin files) it is read into host memory as
    a whole.

    Args:
        location: from `locate`.
        dtype: a key of DTYPES, or "auto" for that of the checkpoint (float32 for GGUF).

    Raises:
        UsageError: as `read_model`.
    """
    if streamed := _streamed(location, dtype):
        return streamed
    dense = DenseModel(read_model(location, dtype))
    logger.warning(
        "%s: read into memory as a whole, for names that only transformers knows or a .bin file of the oldest form",
        location.name,
    )
    return dense


def is_streamed(location: Location) -> bool:
    """Whether `open_dense_model` reads layer by layer; of a model of the hub it is expected."""
    return not location.is_local or _streamed(location, "auto") is not None


def _streamed(location: Location, dtype: str) -> StreamedModel | None:
    """The model, if its files can be read in part and hold its weights, and no others, under names that we know."""
    with location.in_words("its weights cannot be read"):
        if not location.is_local:
            _download_weights(location)
        config = read_config(location)  # behind the download: weights that are here say whether the head is tied
        files: WeightFiles
        if location.gguf_file:
            model, files = gguf_model(location, config, dtype)
        else:
            if not all(can_be_mapped(path) for path in location.weight_files):
                return None
            stored = stored_weights(location.weight_files)
            stored = {name: weight for name, weight in stored.items() if not name.endswith(IGNORED_WEIGHTS)}
            if not stored:
                return None
            own = config.dtype or next(iter(stored.values())).dtype
            model = empty_model(location, config, DTYPES.get(dtype, own))
            if model.config.tie_word_embeddings:
                stored.pop(HEAD, None)  # a copy
            files = MappedFiles(stored)
        sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if sizes != {name: weight.shape for name, weight in files.stored.items()}:
            return None
        return StreamedModel(model, location, files)


def _download_weights(location: Location) -> None:
    """Have the weights of a model of the hub on this machine, in the first of the forms that it has."""
    for whole, index in WEIGHT_FORMS:
        if location.find(whole):
            return
        if found := location.find(index):
            get_checkpoint_shard_files(location.path, found)
            return
