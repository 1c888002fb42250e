"""What is finished of a cut, on disk: a run that was killed goes on where it was.

Hidden states are the bulk of what is written, and they follow from the finished layers: they are kept every SAVED_EVERY
seconds only, and a run that goes on sends them through the layers that were finished since.

Every layer is a shard until all are finished. Then the shards are gathered into the files of the checkpoint, copied
block by block; a shard is removed when all that it holds is in files that the journal names.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from safetensors.torch import load_file
from torch import Tensor, nn

from ..machine import BatchSize
from ..pruning.progress import Progress
from ..tensor_files import bytes_in, entries_of, write_pieces
from .journal import Journal
from .weight_shards import cut_into_files

CHECKPOINT = "checkpoint"
SAVED_EVERY = 20.0


@dataclass(frozen=True)
class Shards:
    """In which files the weights are kept until all are there: the embedding, every decoder layer, and all else.

    Attributes:
        prefix: of the names of the decoder layers' weights, their index follows.
        layers: number of decoder layers.
    """

    prefix: str
    layers: int

    def name(self, number: int) -> str:
        """Shard `number`, from 1 on; the decoder layers' begin with 2."""
        return f"shard-{number:05}.safetensors"

    @property
    def names(self) -> list[str]:
        """Those of all shards."""
        return [self.name(number + 1) for number in range(self.layers + 2)]


class RunProgress(Progress):
    """The progress of a run, which a journal holds.

    Attributes:
        shards: in which files the weights are kept.
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

    def is_due(self) -> bool:
        """See `Progress`."""
        self.wait()
        # A batch that became smaller on the way to them changes the rounding: then the layers do not give them again.
        has_halved = self._batch_size.size != self._journal.facts["batch_size"]
        return has_halved or monotonic() - self._saved_at > SAVED_EVERY

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """See `Progress`; hidden states are written when it returns, the layer may be written later."""
        self.wait()
        # Copies of what is on a device, whose memory the next layer needs.
        weights = {f"{self.shards.prefix}{index}.{name}": weight.cpu() for name, weight in layer.state_dict().items()}
        facts: dict = {"batch_size": self._batch_size.size}
        if hidden is not None:
            facts |= self._kept(index + 1, hidden)
        elif index + 1 == self.shards.layers:
            facts |= {"hidden": None, "entered": 0}
        self._writing = self._writer.submit(self._save_layer, index, weights, facts)
        if "hidden" in facts or not self._in_background:
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
        """Write shard `number`.

        Raises:
            UsageError: it cannot be written.
        """
        self._journal.write(self.shards.name(number), weights)

    @property
    def is_gathering(self) -> bool:
        """Whether all shards were there, so that some may be in the checkpoint by now."""
        return "files" in self._journal.facts

    def gather(self, largest: int) -> None:
        """Put the shards, which are all there, into the checkpoint's files, or go on with it.

        Args:
            largest: bytes that a file has at most, unless a single tensor has more.

        Raises:
            UsageError: the disk is full or fails.
        """
        if not self.is_gathering:
            held = {
                name: (shard, entry.size)
                for shard in self.shards.names
                for name, entry in entries_of(self._path(shard)).items()
            }
            cut = cut_into_files({name: size for name, (_, size) in held.items()}, largest)
            self._journal.commit({"files": {file: {name: held[name][0] for name in cut[file]} for file in cut}})
        files = self._journal.facts["files"]
        left = {file: {*shards.values()} for file, shards in files.items()}
        for file, shards in files.items():
            emptied = left.pop(file).difference(*left.values())
            name = f"{CHECKPOINT}/{file}"
            if name not in self._journal.files:
                self._journal.add(name, partial(self._write_file, shards))
                self._journal.commit({}, without=emptied)

    def _write_file(self, shards: dict[str, str], path: Path) -> None:
        """Write a file of tensors, given in which shard each of them is."""
        held = {shard: entries_of(self._path(shard)) for shard in {*shards.values()}}
        entries = {name: held[shard][name] for name, shard in shards.items()}
        # The widest numbers first, as safetensors has it: each then begins at a multiple of its width.
        order = sorted(entries, key=lambda name: -entries[name].width)
        pieces = (piece for name in order for piece in bytes_in(self._path(shards[name]), entries[name]))
        write_pieces(path, {name: entries[name] for name in order}, pieces)

    def _path(self, name: str) -> Path:
        return self._journal.path.parent / name

    def _hidden(self) -> Tensor | None:
        name = self._journal.facts["hidden"]
        return read_tensors(self._path(name))["hidden"] if name else None

    def _kept(self, layers: int, hidden: Tensor) -> dict:
        """Write the hidden states that enter the layer behind so many; returns what the journal is to say of them."""
        name = f"hidden-pruned-{layers}.safetensors"
        self._journal.write(name, {"hidden": hidden})
        self._saved_at = monotonic()
        return {"hidden": name, "entered": layers}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file: not mapped from it, since it may be removed, but in memory of their own, aligned as before."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
