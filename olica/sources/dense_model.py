"""The dense model as pruning sees it: its decoder layers one at a time, wherever the weights are.

This is the only place that moves weights between disk, host and device.
"""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..checks import all_finite
from ..machine import hand_back_memory
from ..model.modeling_olica import separate_projections
from ..progress_bar import counted
from .locate import Location
from .weight_files import WeightFiles
from .weights import refuse_weights


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
        """Have the final norm and the head in host memory meanwhile; the embedding too where it is the head."""
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
        """See `DenseModel`."""
        module = self.decoder.embed_tokens
        empty, (name,) = module.weight, self.other_names()[0]
        module.weight = nn.Parameter(self.read([name])[name], requires_grad=False)
        try:
            yield
        finally:
            module.weight = empty

    @contextmanager
    def head(self) -> Iterator[None]:
        """See `DenseModel`."""
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
