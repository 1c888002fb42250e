"""What is finished of a cut, on disk: a run that was killed goes on where it was.

Hidden states are the bulk of what is written, and they follow from the finished layers: they are kept every SAVED_EVERY
seconds only, and a run that goes on sends them through the layers that were finished since.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from safetensors.torch import load_file
from torch import Tensor, nn

from ..machine import BatchSize
from ..pruning.progress import Progress
from .journal import Journal

CHECKPOINT = "checkpoint"
SAVED_EVERY = 20.0


@dataclass(frozen=True)
class Shards:
    """How a checkpoint is cut into files: the embedding, one for every decoder layer, and all else.

    Attributes:
        prefix: of the names of the decoder layers' weights, their index follows.
        layers: number of decoder layers.
    """

    prefix: str
    layers: int

    def name(self, number: int) -> str:
        """Shard `number`, from 1 on; the decoder layers' begin with 2."""
        return f"{CHECKPOINT}/model-{number:05}-of-{self.layers + 2:05}.safetensors"


class RunProgress(Progress):
    """The progress of a run, which a journal holds.

    Attributes:
        shards: how the checkpoint is cut into files.
    """

    def __init__(self, journal: Journal, shards: Shards, batch_size: BatchSize, in_background: bool):
        """See `RunFolder.begin`."""
        self.shards = shards
        self._journal, self._batch_size, self._in_background = journal, batch_size, in_background
        self._saved_at = monotonic()
        self._writer = ThreadPoolExecutor(1, "write")
        self._writing: Future | None = None

    def pruned(self) -> tuple[int, int, Tensor | None]:
        """See `Progress`."""
        facts = self._journal.facts
        return facts["pruned"], facts["entered"], self._hidden()

    def weights(self, index: int) -> dict[str, Tensor]:
        """See `Progress`."""
        prefix, weights = f"{self.shards.prefix}{index}.", read_tensors(self._path(self.shards.name(index + 2)))
        return {name.removeprefix(prefix): weight for name, weight in weights.items()}

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """See `Progress`; hidden states are written when it returns, the layer may be written later."""
        self.wait()
        # Copies of what is on a device, whose memory the next layer needs.
        weights = {f"{self.shards.prefix}{index}.{name}": weight.cpu() for name, weight in layer.state_dict().items()}
        size, states = self._batch_size.size, {}
        # A batch that became smaller on the way to them changes the rounding: then the layers do not give them again.
        is_due = monotonic() - self._saved_at > SAVED_EVERY
        if hidden is None or size != self._journal.facts["batch_size"] or is_due:
            states = self._kept(index + 1, hidden)
        self._writing = self._writer.submit(self._save_layer, index, weights, {"batch_size": size} | states)
        if states or not self._in_background:
            self.wait()

    def _save_layer(self, index: int, weights: dict[str, Tensor], facts: dict) -> None:
        self.save_shard(index + 2, weights)
        replaced = self._journal.facts["hidden"] if "hidden" in facts else None
        without = {replaced} - {None, facts.get("hidden")}
        self._journal.commit({"pruned": index + 1, **facts}, without)

    def wait(self) -> None:
        """See `Progress`.

        Raises:
            UsageError: what was to be kept cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """End the thread that writes, when it has written."""
        self._writer.shutdown()

    def save_shard(self, number: int, weights: dict[str, Tensor]) -> None:
        """Write shard `number` of the checkpoint.

        Raises:
            UsageError: it cannot be written.
        """
        self._journal.write(self.shards.name(number), weights)

    def _path(self, name: str) -> Path:
        return self._journal.path.parent / name

    def _hidden(self) -> Tensor | None:
        name = self._journal.facts["hidden"]
        return read_tensors(self._path(name))["hidden"] if name else None

    def _kept(self, layers: int, hidden: Tensor | None) -> dict:
        """Write the hidden states that enter the layer behind so many; returns what the journal is to say of them."""
        if hidden is None:
            return {"hidden": None, "entered": 0}
        name = f"hidden-pruned-{layers}.safetensors"
        self._journal.write(name, {"hidden": hidden})
        self._saved_at = monotonic()
        return {"hidden": name, "entered": layers}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file: not mapped from it, since it may be removed, but in memory of their own, aligned as before."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
