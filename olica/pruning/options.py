"""What the passes over the layers work on, and how."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..machine import BatchSize
from ..methods.recipe import Method
from ..processes import ALONE, Processes
from ..sources.dense_model import DenseModel


@dataclass(frozen=True)
class PruningOptions:
    """What the machine is asked for.

    Attributes:
        batch_size: samples that go through a layer at a time.
        device: where layers run.
        cache_device: where the hidden states (N, T, D) of the calibration set live.
        processes: that work together, each on a share of the samples.
    """

    batch_size: BatchSize
    device: torch.device
    cache_device: torch.device
    processes: Processes = ALONE


@dataclass(frozen=True)
class Work:
    """What both passes share.

    Attributes:
        dense: the model; one that is in memory as a whole is pruned in place.
        calibration_ids: (N, T), of all samples.
        method: what is measured, decided and computed.
        options: how layers are worked on.
    """

    dense: DenseModel
    calibration_ids: Tensor
    method: Method
    options: PruningOptions

    @property
    def own_ids(self) -> Tensor:
        """Those of this process's samples."""
        processes = self.options.processes
        rows = processes.rows_of(processes.index, len(self.calibration_ids))
        return self.calibration_ids[rows.start : rows.stop]
