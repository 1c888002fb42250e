"""What pruning takes in memory, from the model's sizes alone, and the batch that fits into what is free.

n tokens of a batch, D hidden size, F intermediate channels
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import psutil
from transformers import PreTrainedConfig

from ..machine import free_memory
from ..methods.moments import DOUBLE, SINGLE, Statistic, tap_width
from ..methods.recipe import Method, TravellingSurvey, needs_of
from ..methods.sizes import Sizes
from ..model.configuration_olica import LayerShape
from ..processes import ALONE, Processes
from .options import PruningOptions

# What `auto` takes at most, in tokens: on two CPU cores 1,024 were 5 % faster than 2,048; a GPU wants more.
MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
# Of the memory that is free, the share that `auto` plans with: others may want some, and an estimate may be low.
USABLE = 0.8
# What the libraries take of the host once they work: threads, buffers and code that is loaded when it is first run. On
# an H200, where decompositions load most, it was 0.6 to 0.9 GB.
RUNTIME_BYTES = {"cpu": 60_000_000, "cuda": 750_000_000}


@dataclass(frozen=True)
class Demand:
    """Bytes that each part of the work holds when it holds most.

    Attributes:
        embedding: the largest weight beside the decoder layers.
        layer: a dense decoder layer.
        states: the hidden states of the calibration set, twice where those that leave a dense layer are kept apart; or,
            where that is more, those of the samples that the survey reads and of variants that travel.
        survey, prune: sums, activations of a batch and work of the stages of these passes, at their peak.
    """

    embedding: int
    layer: int
    states: int
    survey: int
    prune: int


@dataclass(frozen=True)
class Task:
    """What is asked for, as far as it decides the demand.

    Attributes:
        config: of the dense model.
        total: its parameters.
        shapes: the different sizes that pruned layers are to get.
        ids_shape: (N, T) of the calibration set.
        itemsize: bytes of a weight.
        method: what is computed.
        is_streamed: whether the weights are read layer by layer, not as a whole.
        is_mapped: whether a weight that is read is in memory twice, as a part of a mapped file and as a copy.
        processes: how many share the samples; all that is said is of the one with most of them.
    """

    config: PreTrainedConfig
    total: int
    shapes: frozenset[LayerShape]
    ids_shape: tuple[int, int]
    itemsize: int
    method: Method
    is_streamed: bool
    is_mapped: bool
    processes: Processes = ALONE

    @property
    def states(self) -> int:
        """Bytes of the hidden states of the calibration set, of all its samples."""
        return prod(self.ids_shape) * self.config.hidden_size * self.itemsize

    @property
    def own_samples(self) -> int:
        """How many of the samples one process has."""
        return self.processes.most_of(self.ids_shape[0])

    @property
    def own_states(self) -> int:
        """Bytes of their hidden states."""
        return self.own_samples * self.states // self.ids_shape[0]

    @property
    def sizes(self) -> Sizes:
        """Of a dense layer."""
        return Sizes.of(self.config)


def estimate(task: Task, options: PruningOptions) -> Demand:
    """The demand of a task."""
    tokens = min(options.batch_size.size, task.own_samples) * task.ids_shape[1]
    is_kept_twice = task.method.stream == "dense" and len(task.method.passes) > 1
    return Demand(
        embedding=task.config.vocab_size * task.config.hidden_size * task.itemsize,
        layer=task.sizes.layer * task.itemsize,
        states=max(task.own_states * (2 if is_kept_twice else 1), _survey_states(task)) if streams(task) else 0,
        survey=max(_survey(task, shape, tokens) for shape in task.shapes),
        prune=max(_cut(task, shape, tokens) for shape in task.shapes),
    )


def streams(task: Task) -> bool:
    """Whether any text goes through the layers."""
    return _survey_streams(task) or any(needs for shape in task.shapes for needs in task.method.needs(shape))


def _survey_streams(task: Task) -> bool:
    survey, layers = task.method.survey, task.config.num_hidden_layers
    return survey is not None and (
        isinstance(survey, TravellingSurvey) or any(survey.needs(index, layers) for index in range(layers))
    )


def survey_disk_bytes(task: Task) -> int:
    """Bytes of disk that an unfinished survey takes at most: hidden states, twice while one takes the other's place."""
    return 2 * _survey_states(replace(task, processes=ALONE))


def _survey(task: Task, shape: LayerShape, tokens: int) -> int:
    survey, layers = task.method.survey, task.config.num_hidden_layers
    if survey is None:
        return 0
    needs = frozenset().union(*(survey.needs(index, layers) for index in range(layers)))
    batch = tokens * _per_token(task, needs) if needs else 0
    return _sums(task, needs) + max(batch, survey.workspace(task.sizes, shape), _trials(task))


def _survey_states(task: Task) -> int:
    """Bytes of the hidden states of the samples that the survey reads, and of variants."""
    survey, samples = task.method.survey, task.ids_shape[0]
    if survey is None or not _survey_streams(task):
        return 0
    return task.processes.most_of(survey.reads(samples)) * task.states // samples + _travelling(task)


def _travelling(task: Task) -> int:
    """Bytes of the hidden states of all variants that travel to the end of the model."""
    survey, layers = task.method.survey, task.config.num_hidden_layers
    if not isinstance(survey, TravellingSurvey):
        return 0
    variants = survey.most_variants * len(survey.groups(layers))
    samples, tokens = task.processes.most_of(survey.samples(task.ids_shape[0])), task.ids_shape[1]
    return variants * samples * tokens * task.config.hidden_size * task.itemsize


def _trials(task: Task) -> int:
    """Bytes of the weights of a layer's variants, or of the logits of a sample when they are compared."""
    survey = task.method.survey
    if not isinstance(survey, TravellingSurvey):
        return 0
    # Those of variants, in parts and put together; those of the dense model, and three times as much to compare two.
    logits = task.ids_shape[1] // survey.stride * task.config.vocab_size * SINGLE
    logits *= 2 * survey.compared_together + 4
    return max(DOUBLE * task.sizes.layer, logits)


def _cut(task: Task, shape: LayerShape, tokens: int) -> int:
    """The peak over the passes: while a batch is summed, or in a stage, beside the sums that are not dropped yet."""
    peaks = [0]
    for stages, needs in zip(task.method.passes, task.method.needs(shape), strict=True):
        if needs:  # else no batch goes through the layer
            peaks.append(_sums(task, needs) + tokens * _per_token(task, needs))
        for number, stage in enumerate(stages):
            left = needs_of(stages[number:], shape)
            peaks.append(_sums(task, left) + stage.workspace(task.sizes, shape))
    return max(peaks)


def _sums(task: Task, statistics: Iterable[Statistic]) -> int:
    """Bytes of the sums of a layer."""
    return sum(statistic.bytes(task.sizes) for statistic in statistics)


def _per_token(task: Task, statistics: Iterable[Statistic]) -> int:
    """Bytes of activations for each token of a batch: those that are kept for the sums, and those of the forward."""
    sizes, itemsize = task.sizes, task.itemsize
    kept = [tap_width(tap, sizes) for tap in {tap for statistic in statistics for tap in statistic.taps}]
    forward = 2 * sizes.hidden_size + 3 * sizes.intermediate_size  # the MLP's are the most
    # Sums are taken of copies about their centres, in single precision, and of the squares of the widest.
    summing = SINGLE * (sum(kept) + max(kept, default=0))
    return sum(kept) * itemsize + max(forward * itemsize, summing)


def expected_peaks(task: Task, options: PruningOptions) -> dict[str, int | None]:
    """Peak memory that a task is going to see in this process: `host_bytes`, and `device_bytes` on a GPU."""
    if options.device.type == "cuda":
        free_memory(options.device)  # starts CUDA, whose own memory on the host is then counted
    return peaks_beside(psutil.Process().memory_info().rss, task, options)


def peaks_beside(resident: int, task: Task, options: PruningOptions) -> dict[str, int | None]:
    """The same, of a process that holds `resident` bytes before; the device need not be there."""
    demand = estimate(task, options)
    working = max(demand.survey, demand.prune)
    on_gpu, on_host = options.device.type == "cuda", options.cache_device.type == "cpu"
    # The layer at work and its pruned form; beside a GPU the next layer, which is read meanwhile, and the last one,
    # which is written.
    layers = 2 * demand.layer
    whole = 0 if task.is_streamed else task.total * task.itemsize
    passes = layers + whole + demand.states + (0 if on_gpu else working)  # states of a GPU come by to be written
    if task.processes.count > 1:  # the first gathers those of all, to write them
        passes += task.processes.count * demand.states
    embedding = (2 if task.is_mapped else 1) * demand.embedding
    edges = whole + embedding + (demand.states if on_host else 0)
    return {
        "host_bytes": resident + RUNTIME_BYTES[options.device.type] + max(passes, edges),
        "device_bytes": 2 * demand.layer + working + (0 if on_host else demand.states) if on_gpu else None,
    }


def fit_batch_size(task: Task, options: PruningOptions) -> None:
    """Set the batch size of `options` to the largest power of two of which the memory that is free has room."""
    sharing = options.processes.here if options.device.type == "cpu" else 1
    fit_into(free_memory(options.device) // sharing, task, options)


def fit_into(free: int, task: Task, options: PruningOptions) -> bool:
    """The same with `free` bytes of the device, which need not be there; returns whether they suffice."""
    size = 1
    while 2 * size * task.ids_shape[1] <= MOST_TOKENS[options.device.type] and size < task.own_samples:
        size *= 2
    while True:
        options.batch_size.size = size
        peaks = peaks_beside(0, task, options)
        fits = (peaks["device_bytes"] or peaks["host_bytes"]) <= USABLE * free
        if size == 1 or fits:
            return fits
        size //= 2
