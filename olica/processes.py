"""The processes of one `accelerate launch`, which share the work of an evaluation."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


@dataclass(frozen=True)
class Processes:
    """The processes that evaluate a model together, seen from one of them.

    Attributes:
        index: which of them this is.
        count: how many there are.
        state: accelerate's; None where there is one only.
    """

    index: int = 0
    count: int = 1
    state: PartialState | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.index == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every process's tensor, in all of them."""
        if self.state is not None:
            torch.distributed.all_reduce(tensor)
        return tensor

    def from_main(self, value: Any) -> Any:
        """What the main process has, in all of them."""
        return value if self.state is None else broadcast_object_list([value])[0]


ALONE = Processes()


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """The processes that `accelerate launch` started, if it did, and the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, device
    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state), state.device
