"""What pruning takes in memory, from the model's sizes alone, and the batch that fits into what is free.

    n tokens of a batch, D hidden size, H query heads, K key/value heads, d head width, F intermediate channels
"""

from dataclasses import dataclass
from math import prod

import psutil
import torch
from transformers import PreTrainedConfig

from .allocation import Sizes
from .configuration_olica import LayerShape, head_dim
from .options import PruningOptions

# A batch of more tokens than this is no faster on any machine seen.
MOST_TOKENS = 8192
# Of the memory that is free, the share that `auto` plans with: others may want some, and an estimate may be low.
USABLE = 0.8
SINGLE, DOUBLE = 4, 8  # bytes
# What the libraries take once they work: threads, buffers and code that is loaded when it is first run.
RUNTIME_BYTES = 150_000_000


@dataclass(frozen=True)
class Demand:
    """Bytes that each part of the work holds when it holds most.

    Attributes:
        embedding: the largest weight beside the decoder layers.
        layer: a dense decoder layer.
        states: the hidden states of the calibration set.
        survey, prune: sums, activations of a batch and float64 work of these passes, at their peak.
    """

    embedding: int
    layer: int
    states: int
    survey: int
    prune: int


@dataclass(frozen=True)
class Task:
    """What a model is pruned to, as far as it decides the demand.

    Attributes:
        config: of the dense model.
        total: its parameters.
        shape: of a pruned layer.
        ids_shape: (N, T) of the calibration set.
        itemsize: bytes of a weight.
        is_streamed: whether the weights are read layer by layer, not as a whole.
    """

    config: PreTrainedConfig
    total: int
    shape: LayerShape
    ids_shape: tuple[int, int]
    itemsize: int
    is_streamed: bool


def estimate(task: Task, options: PruningOptions) -> Demand:
    """The demand of a task."""
    samples, seqlen = task.ids_shape
    hidden, channels = task.config.hidden_size, task.config.intermediate_size
    tokens = min(options.batch_size.size, samples) * seqlen
    calibrated = options.mlp_num > 0
    survey_sums = 2 * SINGLE * hidden**2 if calibrated else 0
    prune_sums = SINGLE * (hidden**2 + channels**2 + hidden * channels) if calibrated else 0
    survey_solve = 7 * DOUBLE * hidden**2 if calibrated else 0
    return Demand(
        embedding=task.config.vocab_size * hidden * task.itemsize,
        layer=Sizes.of(task.config, task.total).layer * task.itemsize,
        states=prod(task.ids_shape) * hidden * task.itemsize,
        survey=survey_sums + max(survey_solve, tokens * _per_token(task, survey=True)),
        prune=prune_sums + max(_solve(task, calibrated), tokens * _per_token(task, survey=False)),
    )


def _per_token(task: Task, survey: bool) -> int:
    """Bytes of activations for each token of a batch: those that are kept for the sums, and those of the forward."""
    hidden, channels, itemsize = task.config.hidden_size, task.config.intermediate_size, task.itemsize
    heads = task.config.num_attention_heads * head_dim(task.config)
    kept = 4 * hidden if survey else 2 * hidden + heads + channels
    forward = 2 * hidden + 3 * channels  # the MLP's are the most
    # Sums are taken of copies about their centres, in single precision, and of the squares of the widest.
    summing = SINGLE * (kept + max(hidden, channels))
    return kept * itemsize + max(forward * itemsize, summing)


def _solve(task: Task, calibrated: bool) -> int:
    """Bytes of the float64 work on one pruned layer."""
    hidden, channels = task.config.hidden_size, task.config.intermediate_size
    heads = task.config.num_attention_heads * head_dim(task.config)
    removed = channels - task.shape.intermediate_size
    # W, W D, W D W^T, its eigenvectors and LAPACK's work for them; the factors of both projections.
    attention = DOUBLE * (2 * hidden * heads + 4 * heads**2)
    importance = DOUBLE * 3 * hidden * channels
    correction = DOUBLE * (2 * removed**2 + 2 * removed * hidden + 6 * hidden**2) + SINGLE * removed * channels
    return max(attention, importance, correction if calibrated else 0)


def expected_peaks(task: Task, options: PruningOptions) -> dict[str, int | None]:
    """Peak memory that a task is going to see in this process: `host_bytes`, and `device_bytes` on a GPU."""
    demand = estimate(task, options)
    working = max(demand.survey, demand.prune)
    on_gpu, on_host = options.device.type == "cuda", options.cache_device.type == "cpu"
    # The layer at work, the next one, which is read meanwhile, and its pruned form, or that of the last one, which is
    # written meanwhile.
    layers = (2 if on_gpu else 3) * demand.layer
    whole = 0 if task.is_streamed else task.total * task.itemsize
    passes = layers + whole + demand.states + (0 if on_gpu else working)  # states of a GPU come by to be written
    edges = whole + 2 * demand.embedding + (demand.states if on_host else 0)
    return {
        "host_bytes": psutil.Process().memory_info().rss + RUNTIME_BYTES + max(passes, edges),
        "device_bytes": 2 * demand.layer + working + (0 if on_host else demand.states) if on_gpu else None,
    }


def fit_batch_size(task: Task, options: PruningOptions) -> None:
    """Set the batch size of `options` to the largest power of two of which the memory that is free has room."""
    size = 1
    while 2 * size * task.ids_shape[1] <= MOST_TOKENS and size < task.ids_shape[0]:
        size *= 2
    free = USABLE * free_memory(options.device)
    while True:
        options.batch_size.size = size
        peaks = expected_peaks(task, options)
        if size == 1 or (peaks["device_bytes"] or peaks["host_bytes"] - psutil.Process().memory_info().rss) <= free:
            return
        size //= 2


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; for the CPU those that the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
