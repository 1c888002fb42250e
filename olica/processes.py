"""The processes of one `accelerate launch`, which share the work of an evaluation or of a pruning.

Each operation is the identity where there is one process only, so that what calls it is the same for one and several.
Those of a pruning go over a group of their own on the host (gloo), which is closed when a process leaves: the others
then learn at once that one is missing, and none waits for it. Tensors on GPUs go over NCCL where the processes have
it, each time after all have met on the host.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count as counting
from time import monotonic, sleep
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from .errors import UsageError

# How long a process waits for another one that is there: as long as a survey that another run is making, or a whole
# point of a sweep, may take. One that is gone is noticed at once.
PATIENCE = timedelta(days=7)
# Numbers that every process sends at a time when tensors are summed.
PIECE = 1 << 22
# How long the first process, with which what they have in common may go, waits for the others to learn that it fails:
# they do when they next meet, and may be in the middle of a layer.
GRACE = 60.0
# How long a process takes to answer, and one that is killed to close its connections.
ANSWERING, DYING = 5.0, 0.5

Value = TypeVar("Value")
_joined = counting()


class ProcessLost(UsageError):
    """Another of the processes has ended before its time."""


class _HostGroup:
    """A group on the host, whose connections close when nothing refers to it any more.

    Attributes:
        handle: torch's object; None once it is closed.
    """

    def __init__(self) -> None:
        self.handle: Any = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def close(self) -> None:
        """Have the others notice that this process is gone."""
        handle, self.handle = self.handle, None
        distributed.destroy_process_group(handle)


@dataclass(frozen=True)
class Processes:
    """The processes that work together, seen from one of them.

    Attributes:
        index: which of them this is.
        count: how many there are.
        here: how many of them are on this machine.
        device: where this one works.
        host: their group for objects and for tensors on the host; None where there is one process only.
    """

    index: int = 0
    count: int = 1
    here: int = 1
    device: torch.device = torch.device("cpu")
    host: "_HostGroup | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    @property
    def by_itself(self) -> "Processes":
        """This process for work that it does without the others, which take of the machine's memory all the same."""
        return replace(ALONE, here=self.here, device=self.device)

    def rows_of(self, index: int, samples: int) -> range:
        """Which of so many samples a process has: neighbours, and as many as any other or one less."""
        return range(samples * index // self.count, samples * (index + 1) // self.count)

    def most_of(self, samples: int) -> int:
        """How many of so many samples the process with most has."""
        return -(-samples // self.count)

    def from_main(self, value: Value) -> Value:
        """What the main process has, in all of them."""
        return self._from(0, value)

    def on_main(self, work: Callable[[], Value]) -> Value:
        """What `work` returns in the main process, which alone does it, in all of them."""
        return self._from(0, work() if self.is_main else None)  # type: ignore[arg-type]

    def all_of(self, value: Value) -> list[Value]:
        """What every process has, in all of them, by their indices."""
        if self.host is None:
            return [value]
        values: list[Any] = [None] * self.count
        with self._noticing_losses():
            distributed.all_gather_object(values, value, group=self.host.handle)
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Have every tensor, contiguous, become the sum of all processes' tensors in its place.

        The summands are added in the order of the processes, so that the bits are the same whenever as many work.
        """
        if self.host is None:
            return
        self._barrier()
        for tensor in tensors:
            for piece in tensor.view(-1).split(PIECE):
                sent, group = self._carried(piece)
                received = [torch.empty_like(sent) for _ in range(self.count)]
                with self._noticing_losses():
                    distributed.all_gather(received, sent, group=group)
                for other in received[1:]:
                    received[0] += other
                piece.copy_(received[0])

    def share_out(self, tasks: Sequence[Callable[[], dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
        """What the tasks give, in all processes; each is done by one of them, all at the same time."""
        done = {number: tasks[number]() for number in range(self.index, len(tasks), self.count)}
        return [self.tensors_of(number % self.count, done.get(number)) for number in range(len(tasks))]

    def tensors_of(self, index: int, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The tensors that the process `index` has (None in the others), the same bits in all of them."""
        if self.host is None:
            return tensors or {}
        described = {name: _described(tensor) for name, tensor in (tensors or {}).items()}
        held = dict(tensors or {})
        for name, description in self.all_of(described)[index].items():  # all of them meet, see `_barrier`
            tensor = held[name].contiguous() if self.index == index else self._empty(*description)
            held[name] = tensor
            if tensor.numel():
                sent, group = self._carried(_as_bytes(tensor))
                with self._noticing_losses():
                    distributed.broadcast(sent, index, group=group)
                _as_bytes(tensor).copy_(sent)
        return held

    def gathered(self, tensor: Tensor) -> Tensor | None:
        """The rows of all processes on the host, in their order, in the main one; None in the others.

        Where there is one process only the tensor itself, wherever it is.
        """
        if self.host is None:
            return tensor
        own = tensor.cpu().contiguous()
        rows = self.all_of(len(own))
        whole = torch.empty(sum(rows) if self.is_main else 0, *own.shape[1:], dtype=own.dtype)
        with self._noticing_losses():
            if not self.is_main:
                _send(own, 0, self.host.handle)
                return None
            for index, part in enumerate(whole.split(rows)):
                if index:
                    _receive(part, index, self.host.handle)
                else:
                    part.copy_(own)
        return whole

    def scattered(self, tensor: Tensor | None, rows: Sequence[int]) -> Tensor:
        """This process's rows of a tensor that the main one has (None in the others), on the host.

        Args:
            tensor: (sum of `rows`, ...).
            rows: how many of them every process gets, one after the other.
        """
        if self.host is None:
            assert tensor is not None
            return tensor
        parts = tensor.cpu().contiguous().split(list(rows)) if tensor is not None else None
        descriptions = self.from_main([_described(part) for part in parts] if parts else None)
        # A copy, since a part would keep all of them.
        own = parts[0].clone() if parts else self._empty(*descriptions[self.index])
        with self._noticing_losses():
            if not parts:
                _receive(own, 0, self.host.handle)
            for index, part in enumerate(parts[1:] if parts else [], 1):
                _send(part.contiguous(), index, self.host.handle)
        return own

    def _from(self, index: int, value: Value) -> Value:
        if self.host is None:
            return value
        values = [value]
        with self._noticing_losses():
            distributed.broadcast_object_list(values, index, group=self.host.handle)
        return values[0]

    def _empty(self, shape: torch.Size, dtype: torch.dtype, on_host: bool) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu" if on_host else self.device)

    def _carried(self, tensor: Tensor) -> "tuple[Tensor, distributed.ProcessGroup | None]":
        """A tensor where the processes can exchange it, and the group in which they do (None: that of all)."""
        if tensor.is_cuda and "nccl" in str(distributed.get_backend_config()):
            return tensor, None
        return tensor.cpu(), self.host.handle

    def _barrier(self) -> None:
        """Return when all are here: NCCL does not notice that one is missing."""
        self.all_of(None)

    @contextmanager
    def _noticing_losses(self) -> Iterator[None]:
        """Say that a process is missing: gloo, which has no exception of its own, notices when a connection closes."""
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, distributed.DistError) or "gloo/transport" in str(error)):
                raise
            raise ProcessLost(
                f"another of the {self.count} processes has ended before its time; the same command, with as many "
                "processes, goes on after what was finished"
            ) from error


ALONE = Processes()


def _described(tensor: Tensor) -> tuple[torch.Size, torch.dtype, bool]:
    return tensor.shape, tensor.dtype, tensor.device.type == "cpu"


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor: not every backend knows every dtype."""
    return tensor.detach().view(-1).view(torch.uint8)


def _send(tensor: Tensor, index: int, group: "distributed.ProcessGroup") -> None:
    if tensor.numel():
        distributed.send(_as_bytes(tensor), index, group=group)


def _receive(tensor: Tensor, index: int, group: "distributed.ProcessGroup") -> None:
    if tensor.numel():
        distributed.recv(_as_bytes(tensor), index, group=group)


def join_processes(device: torch.device) -> Processes:
    """The processes of this program's process group, or those that a launcher started; of GPUs each has its own.

    Raises:
        UsageError: there are fewer GPUs than processes that want one.
    """
    if not are_several():
        return replace(ALONE, device=device)
    _take_a_gpu(device)
    if not distributed.is_initialized():
        PartialState(cpu=device.type == "cpu")
    count = distributed.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    return Processes(distributed.get_rank(), count, here, device, _HostGroup())


def are_several() -> bool:
    """Whether a launcher, or the program itself, has made this one of several processes."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _take_a_gpu(device: torch.device) -> None:
    """Have the process use the GPU of its number on this machine, where the launcher gave it one.

    Raises:
        UsageError: there is none.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise UsageError(
            f"--device: process {local} of this machine has no GPU of its own, there are {there}; start as many "
            "processes, or give --device cpu"
        )
    torch.cuda.set_device(local)


@contextmanager
def working_together(device: torch.device) -> Iterator[Processes]:
    """As `join_processes`, until the work inside ends.

    Where it fails in one process, it ends in all: the others raise `ProcessLost` when they next meet. What is raised
    has the attribute `is_said_by_another` where another process has said in words why all end.
    """
    processes = join_processes(device)
    if processes.host is None:
        yield processes
        return
    end = _End(processes, f"olica/{next(_joined)}")
    try:
        yield processes
        processes._barrier()  # lest one closes what another still reads from
    except BaseException as error:
        end.announce(error)
        clear_frames(error.__traceback__)  # which may refer to the group
        raise
    finally:
        processes.host.close()
        end.wait()


class _End:
    """How the processes settle which of them says why all end: the first that comes."""

    def __init__(self, processes: Processes, name: str):
        self._processes, self._name = processes, name
        self._store = distributed.distributed_c10d._get_default_store()
        self._awaited = 0

    def announce(self, error: BaseException) -> None:
        """Note in `error` whether another process has said why all end."""
        processes, is_lost = self._processes, isinstance(error, ProcessLost)
        # Of those that a signal stops the main one prints a line: this one does not say why.
        says = not isinstance(error, KeyboardInterrupt) or processes.is_main
        try:
            if is_lost:
                _check_store()
            come = self._store.add(self._name, int(says))
        except (OSError, RuntimeError):  # it went with the main process: the next one says it
            come = int(says) if processes.index == 1 else 2
        error.is_said_by_another = come > int(says)  # type: ignore[attr-defined]
        if processes.is_main and isinstance(error, Exception):
            self._awaited = processes.count - is_lost

    def wait(self) -> None:
        """Return when the others have looked, or will not: the store may end with this process."""
        until = monotonic() + GRACE
        with suppress(RuntimeError):  # a launcher that is gone had it
            while self._awaited and self._store.add(self._name, 0) < self._awaited and monotonic() < until:
                sleep(0.01)


def _check_store() -> None:
    """Raise OSError if what the processes have in common, at the launcher's or the main one's address, is gone.

    torch would find out as well, and write the stack of the C++ functions that did. A process that is just dying may
    still take a connection, but closes it: what is there waits for a question.
    """
    if address := os.environ.get("MASTER_ADDR"):
        with socket.create_connection((address, int(os.environ["MASTER_PORT"])), timeout=ANSWERING) as asking:
            asking.settimeout(DYING)
            with suppress(TimeoutError):
                asking.recv(1)
                raise ConnectionResetError
