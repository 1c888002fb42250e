"""What pruning takes in memory, from the model's sizes alone, and the batch that fits into what is free.

n tokens of a batch, D hidden size, H query heads, K key/value heads, d head width, F intermediate channels
"""

from dataclasses import dataclass
from math import prod

import psutil
from transformers import PreTrainedConfig

from ..machine import free_memory
from ..methods.allocation import Sizes
from ..methods.linalg import DOUBLE_BLOCK
from ..methods.moments import TAPS, Statistic, full
from ..methods.recipes import Recipe
from ..model.configuration_olica import LayerShape, head_dim
from .options import PruningOptions

# What `auto` takes at most, in tokens: on two CPU cores 1,024 were 5 % faster than 2,048; a GPU wants more.
MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
# Of the memory that is free, the share that `auto` plans with: others may want some, and an estimate may be low.
USABLE = 0.8
SINGLE, DOUBLE = 4, 8  # bytes
# What the libraries take once they work: threads, buffers and code that is loaded when it is first run.
RUNTIME_BYTES = 60_000_000


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
        recipe: what is computed.
        is_streamed: whether the weights are read layer by layer, not as a whole.
    """

    config: PreTrainedConfig
    total: int
    shape: LayerShape
    ids_shape: tuple[int, int]
    itemsize: int
    recipe: Recipe
    is_streamed: bool

    @property
    def states(self) -> int:
        """Bytes of the hidden states of the calibration set."""
        return prod(self.ids_shape) * self.config.hidden_size * self.itemsize


def estimate(task: Task, options: PruningOptions) -> Demand:
    """The demand of a task."""
    hidden = task.config.hidden_size
    tokens = min(options.batch_size.size, task.ids_shape[0]) * task.ids_shape[1]
    calibrated = options.mlp_num > 0
    surveyed, summed = task.recipe.survey_needs(calibrated), task.recipe.calibration_needs(calibrated)
    fit = DOUBLE * 6 * hidden**2 if calibrated else 0  # Cholesky's factor, both sides, the solution, its eigenvectors
    return Demand(
        embedding=task.config.vocab_size * hidden * task.itemsize,
        layer=Sizes.of(task.config, task.total).layer * task.itemsize,
        states=task.states,
        survey=_sums(task, surveyed) + max(tokens * _per_token(task, surveyed), _residual(task, surveyed) + fit),
        prune=max(
            _sums(task, summed) + max(tokens * _per_token(task, summed), _residual(task, summed)),
            SINGLE * hidden**2 + fit,  # the other sums are dropped by then
            _attention(task),
        ),
    )


def _widths(task: Task) -> dict[str, int]:
    config = task.config
    heads = config.num_attention_heads * head_dim(config)
    return dict.fromkeys(TAPS, config.hidden_size) | {"heads": heads, "intermediate": config.intermediate_size}


def _sums(task: Task, statistics: set[Statistic]) -> int:
    """Bytes of the sums of a layer."""
    widths, sizes = _widths(task), 0
    for statistic in statistics:
        width = widths[statistic.tap]
        match statistic.kind:
            case "full" | "cross":
                sizes += SINGLE * width * widths[statistic.other or statistic.tap]
            case "per_head":
                sizes += SINGLE * width * head_dim(task.config)
            case _:
                sizes += DOUBLE * width
    return sizes


def _per_token(task: Task, statistics: set[Statistic]) -> int:
    """Bytes of activations for each token of a batch: those that are kept for the sums, and those of the forward."""
    widths, itemsize = _widths(task), task.itemsize
    kept = [widths[tap] for tap in {tap for s in statistics for tap in (s.tap, s.other) if tap}]
    forward = 2 * widths["mlp_input"] + 3 * widths["intermediate"]  # the MLP's are the most
    # Sums are taken of copies about their centres, in single precision, and of the squares of the widest.
    summing = SINGLE * (sum(kept) + max(kept, default=0))
    return sum(kept) * itemsize + max(forward * itemsize, summing)


def _residual(task: Task, statistics: set[Statistic]) -> int:
    """Bytes of the float64 work on the residual of a pruned MLP, where `statistics` are those of its regression."""
    if full("intermediate") not in statistics:
        return 0
    hidden, channels = task.config.hidden_size, task.config.intermediate_size
    removed = channels - task.shape.intermediate_size
    blocks = min(DOUBLE_BLOCK, removed) * (DOUBLE * (hidden + 2 * removed) + SINGLE * channels)
    return DOUBLE * (hidden**2 + 2 * hidden * removed) + blocks


def _attention(task: Task) -> int:
    """Bytes of the float64 work on the attention: the factors of q, then k's W, W C W^T, its eigenvectors and what
    finding them takes. The rotation of v and o takes less."""
    heads = task.config.num_attention_heads * head_dim(task.config)
    return DOUBLE * (2 * task.config.hidden_size * heads + 4 * heads**2)


def expected_peaks(task: Task, options: PruningOptions) -> dict[str, int | None]:
    """Peak memory that a task is going to see in this process: `host_bytes`, and `device_bytes` on a GPU."""
    demand = estimate(task, options)
    working = max(demand.survey, demand.prune)
    on_gpu, on_host = options.device.type == "cuda", options.cache_device.type == "cpu"
    if on_gpu:
        free_memory(options.device)  # starts CUDA, whose own memory on the host is then counted
    # The layer at work and its pruned form; beside a GPU the next layer, which is read meanwhile, and the last one,
    # which is written.
    layers = 2 * demand.layer
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
    while 2 * size * task.ids_shape[1] <= MOST_TOKENS[options.device.type] and size < task.ids_shape[0]:
        size *= 2
    free = USABLE * free_memory(options.device)
    while True:
        options.batch_size.size = size
        peaks = expected_peaks(task, options)
        if size == 1 or (peaks["device_bytes"] or peaks["host_bytes"] - psutil.Process().memory_info().rss) <= free:
            return
        size //= 2
