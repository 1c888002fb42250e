"""The dense model as pruning sees it: its decoder layers one at a time, wherever the weights are.

This is the only place that moves weights between disk, host and device.
"""

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import get_checkpoint_shard_files

from ..checks import all_finite
from ..machine import hand_back_memory
from ..model.modeling_olica import separate_projections
from ..progress_bar import counted
from .configuration import read_config
from .gguf_weights import gguf_weights
from .locate import Location
from .model_files import WEIGHT_FORMS
from .tied_head import HEAD
from .weight_files import MappedFiles, WeightFiles, can_be_mapped, stored_weights
from .weights import DTYPES, IGNORED_WEIGHTS, read_model, refuse_weights

logger = logging.getLogger(__name__)


class DenseModel:
    """A dense model that is in host memory as a whole; pruning a layer changes it in place.

    Attributes:
        model: the causal language model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the dense model."""
        return self.model.config

    @property
    def decoder(self) -> nn.Module:
        """The base model: embedding, decoder layers, final norm."""
        return self.model.get_decoder()

    @property
    def layers_prefix(self) -> str:
        """What the names of the decoder layers' weights begin with; the index of the layer follows."""
        return f"{self.model.base_model_prefix}.layers."

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the weights of the embedding in host memory meanwhile."""
        yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Have the final norm and the head in host memory meanwhile, so the embedding too only if it is the head."""
        yield

    def layers(self, device: torch.device, title: str, first: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Yield the decoder layers from the one of index `first` on, each on `device` while it is worked on.

        Fused projections are separated for good: what is measured and pruned is what they hold.
        """
        for index in counted(title, first, len(self.decoder.layers)):
            layer = self.decoder.layers[index]
            home = next(layer.parameters()).device
            separate_projections(layer, self.config)
            yield index, layer.to(device)
            layer.to(home)

    def other_names(self) -> tuple[list[str], list[str]]:
        """Names of the weights that are in no decoder layer, tied ones once: the embedding's, and all else."""
        parameters = self.model.named_parameters()  # tied ones once, under their first name
        names = [name for name, _ in parameters if not name.startswith(self.layers_prefix)]
        embedding = [name for name in names if "embed_tokens" in name]
        return embedding, [name for name in names if name not in embedding]

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The weights of these names, in host memory."""
        state = self.model.state_dict()
        return {name: state[name] for name in names}


class StreamedModel(DenseModel):
    """A dense model that stays on disk: what is not worked on has no weights, and no work on a layer changes it."""

    def __init__(self, model: PreTrainedModel, location: Location, files: WeightFiles):
        """Wrap `model`, whose parameters are on the meta device and lie under their names in `files`."""
        super().__init__(model)
        self.location = location
        self.files = files

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Have the weights of the embedding in host memory meanwhile."""
        module = self.decoder.embed_tokens
        empty, (name,) = module.weight, self.other_names()[0]
        module.weight = nn.Parameter(self.read([name])[name], requires_grad=False)
        try:
            yield
        finally:
            module.weight = empty

    @contextmanager
    def head(self) -> Iterator[None]:
        """Have the final norm and the head in host memory meanwhile, so the embedding too only if it is the head."""
        embedding, names = self.other_names()
        if self.model.get_output_embeddings().weight is self.decoder.embed_tokens.weight:
            names = embedding + names
        empty, read = dict(self.model.named_parameters()), self.read(names)
        filled = {name: nn.Parameter(weight, requires_grad=False) for name, weight in read.items()}
        self._replace({empty[name]: weight for name, weight in filled.items()})
        try:
            yield
        finally:
            self._replace({weight: empty[name] for name, weight in filled.items()})

    def _replace(self, parameters: dict[nn.Parameter, nn.Parameter]) -> None:
        """Put other parameters in the place of some, tied ones wherever they are."""
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter in parameters:
                    setattr(module, name, parameters[parameter])

    def layers(self, device: torch.device, title: str, first: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Yield the decoder layers from the one of index `first` on, each on `device` and gone afterwards.

        While a GPU works on one the next is read. On the CPU they would compete for its cores: measured on two of
        them, with a fast disk, that took a fifth longer.
        """
        with ThreadPoolExecutor(1, "read") as reader:
            weights = self._read_ahead(first, reader) if device.type == "cuda" else self._read_in_turn(first)
            for index in counted(title, first, len(self.decoder.layers)):
                # A copy, since work on it changes its modules.
                layer = copy.deepcopy(self.decoder.layers[index])
                layer.load_state_dict(next(weights), assign=True)
                layer.to(device)
                separate_projections(layer, self.config)
                yield index, layer
                layer.to_empty(device="meta")  # whoever worked on it may hold it still
                hand_back_memory()

    def _read_in_turn(self, first: int) -> Iterator[dict[str, Tensor]]:
        return map(self._read_layer, range(first, len(self.decoder.layers)))

    def _read_ahead(self, first: int, reader: ThreadPoolExecutor) -> Iterator[dict[str, Tensor]]:
        count = len(self.decoder.layers)
        coming = reader.submit(self._read_layer, first)
        for following in range(first + 1, count + 1):
            read = [coming.result()]
            coming = reader.submit(self._read_layer, following) if following < count else None
            yield read.pop()  # not to be held here while the layer is worked on

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.layers_prefix}{index}."
        names = [name for name in self.files.stored if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor for name, tensor in self.read(names).items()}

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The weights of these names, from the disk."""
        with self.location.in_words("its weights cannot be read"):
            weights = self.files.read(names, self.model.dtype)
        bad = (name for name, weight in weights.items() if not all_finite(weight))
        refuse_weights(self.location, "holds NaN or infinite values in", bad)
        return weights


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
        "%s: names that only transformers understands, or a .bin file of the oldest form, so it is read into memory as "
        "a whole",
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
        files: WeightFiles | None
        if location.gguf_file:
            model = _skeleton(location, config, DTYPES.get(dtype, torch.float32))
            names = [name for name, _ in model.named_parameters()]
            files = gguf_weights(location.weight_files[0], names, config.num_hidden_layers)
        else:
            if not all(can_be_mapped(path) for path in location.weight_files):
                return None
            stored = stored_weights(location.weight_files)
            stored = {name: weight for name, weight in stored.items() if not name.endswith(IGNORED_WEIGHTS)}
            if not stored:
                return None
            model = _skeleton(location, config, DTYPES.get(dtype) or config.dtype or next(iter(stored.values())).dtype)
            if model.config.tie_word_embeddings:
                stored.pop(HEAD, None)  # a copy
            files = MappedFiles(stored)
        sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if files is None or sizes != {name: weight.shape for name, weight in files.stored.items()}:
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


def _skeleton(location: Location, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, but with the buffers that it computes, in `dtype`."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which the context undoes
    if location.gguf_file:
        return model.eval()  # what lies beside the file says nothing of it
    try:
        model.generation_config = GenerationConfig.from_pretrained(location.path)
    except OSError:  # there is none: what an old config.json says of generation
        model.generation_config = GenerationConfig.from_pretrained(
            location.path, config_file_name="config.json", _from_model_config=True
        )
    return model.eval()
