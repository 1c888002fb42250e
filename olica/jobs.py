"""All that is decided of a pruning before a weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from .checks import check_no_file
from .errors import UsageError
from .machine import BatchSize, pick_device
from .methods.recipe import Method, Recipe
from .methods.recipes import RECIPES
from .methods.sizes import Budget, Sizes
from .model.configuration_olica import LayerShape
from .model.layouts import LAYOUTS, OWN_LAYOUT, Layout, for_family
from .model.skeleton import count_parameters, pruned_skeleton, try_out
from .outputs.names import NAMED, RECIPES_OWN, checkpoint_folder
from .processes import ALONE, Processes
from .pruning.memory import Task, expected_peaks, fit_batch_size
from .pruning.options import PruningOptions
from .settings import REFITS, Settings
from .sources.calibration_set import calibration_shape, is_token_file
from .sources.configuration import count_dense_parameters, read_config, refuse_unprunable
from .sources.locate import Location, locate
from .sources.opening import is_streamed
from .sources.weights import bytes_per_weight


@dataclass(frozen=True)
class Parameters:
    """Parameters of the dense model and of the planned one: `total`, and `decoder_layers` alone.

    Attributes:
        before: counted.
        planned: counted of the plan; None where the survey decides it.
    """

    before: dict[str, int]
    planned: dict[str, int] | None

    def lost(self, part: str) -> float:
        """Share of the "total", or of the "decoder_layers", that the plan removes."""
        return 1 - self.planned[part] / self.before[part]


@dataclass(frozen=True)
class Job:
    """All that is decided before a weight is read.

    Attributes:
        settings: what was asked for.
        recipe: the row of the table.
        method: the recipe with its parameters.
        location: of the dense model.
        config: its configuration.
        options: what the machine is asked for.
        budget: how much is to go.
        layout: what the checkpoint can hold.
        plan: sizes of all layers; which get a correction is not known yet. None where the survey decides them.
        notes: what the user should know of the plan.
        counts: parameters before, and of the plan.
        bytes_per_weight: in the dtype that is saved.
        task: what decides the memory that it takes.
        disk_bytes: that the checkpoint, and what is kept meanwhile, take.
        memory: expected peaks.
        folder: of the checkpoint.
    """

    settings: Settings
    recipe: Recipe
    method: Method
    location: Location
    config: PreTrainedConfig
    options: PruningOptions
    budget: Budget
    layout: Layout
    plan: list[LayerShape] | None
    notes: list[str]
    counts: Parameters
    bytes_per_weight: int
    task: Task
    disk_bytes: int
    memory: dict[str, int | None]
    folder: Path

    @property
    def sizes(self) -> list[Sizes]:
        """Of all dense layers."""
        return Sizes.of_all(self.config)


def prepare(settings: Settings, sparsities: Sequence[float], processes: Processes | None = None) -> list[Job]:
    """Check all that can be checked without weights, and plan, for every sparsity.

    Args:
        settings: what is asked for.
        sparsities: in place of the one in the settings.
        processes: that are going to work together; None: this one alone, on the device that the settings say.

    Raises:
        UsageError: what was asked for is impossible.
    """
    if not sparsities:
        raise UsageError("--sparsity: give a share, or several joined by commas")
    processes = processes or replace(ALONE, device=pick_device(settings.device))
    jobs = [_prepare(replace(settings, sparsity=sparsity), processes) for sparsity in sparsities]
    folders = [job.folder for job in jobs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise UsageError(f"--sparsity: two of them would be {twice}")
    return jobs


def _prepare(settings: Settings, processes: Processes) -> Job:
    recipe = RECIPES[settings.recipe]
    for flag in ("data_dir", "save_dir"):
        check_no_file(Path(getattr(settings, flag)), f"--{flag}")
    location = locate(settings.base_model)
    config = read_config(location)
    refuse_unprunable(config, location)
    layout = for_family(LAYOUTS[settings.layout], config)
    method = method_of(recipe, settings, layout)
    ids_shape = _samples_of(settings, config, method, processes)
    dense = count_dense_parameters(location, config)
    whole = dense["total" if settings.sparsity_of == "model" else "decoder_layers"]
    budget = Budget(whole, settings.sparsity, settings.multiple)
    sizes = Sizes.of_all(config)
    plan = plan_before_survey(recipe, method, sizes, budget)
    device = processes.device
    options = PruningOptions(
        batch_size=BatchSize(1 if settings.batch_size == "auto" else settings.batch_size),
        device=device,
        cache_device=_cache_device(settings.cache_dev, device),
        processes=processes,
    )
    shapes = plan or [sizes[0].dense_shape] * len(sizes)
    itemsize = bytes_per_weight(location, config, settings.dtype)
    streamed = is_streamed(location)
    is_mapped = not location.gguf_file
    task = Task(config, dense["total"], frozenset(shapes), ids_shape, itemsize, method, streamed, is_mapped, processes)
    if settings.batch_size == "auto":
        fit_batch_size(task, options)
        options.batch_size.size = min(processes.all_of(options.batch_size.size))
    with location.in_words("its configuration describes no model that can be pruned and run"):
        pruned = pruned_skeleton(config, shapes, layout)
        try_out(pruned)
    planned = count_parameters(pruned) if plan else None
    expected = (planned["total"] if planned else dense["total"] - round(budget.to_remove)) * itemsize
    return Job(
        settings=settings,
        recipe=recipe,
        method=method,
        location=location,
        config=config,
        options=options,
        budget=budget,
        plan=plan,
        layout=layout,
        notes=([] if settings.layout == OWN_LAYOUT else [layout.about]) + method.allocate.notes(sizes, budget),
        counts=Parameters(dense, planned),
        bytes_per_weight=itemsize,
        task=task,
        # Two states, while one takes the place of the other; later a file of weights beside what it is made of.
        disk_bytes=expected + max(2 * task.states, min(expected, settings.shard_bytes)),
        memory=expected_peaks(task, options),
        folder=checkpoint_folder(
            settings.save_dir, location.label, settings.sparsity, **{name: getattr(settings, name) for name in NAMED}
        ),
    )


def _samples_of(settings: Settings, config: PreTrainedConfig, method: Method, processes: Processes) -> tuple[int, int]:
    """Shape (N, T) of the calibration set; raises UsageError if model or processes cannot take it."""
    samples, tokens = calibration_shape(settings.datasets, settings.num_samples, settings.seqlen)
    check_seqlen(tokens, "--datasets" if is_token_file(settings.datasets) else "--seqlen", config)
    shared = method.survey.reads(samples) if method.survey else samples
    if processes.count > shared:
        of_survey = " that the survey reads" if shared < samples else ""
        raise UsageError(
            f"--num_samples: {processes.count} processes cannot share {shared} samples{of_survey}; start fewer, or "
            "give more samples"
        )
    return samples, tokens


def _cache_device(name: str, device: torch.device) -> torch.device:
    """Where hidden states live: on the GPU where layers run, if on one."""
    picked = device if name == "auto" else pick_device(name, "--cache_dev")
    return device if picked.type == device.type else picked


def method_of(recipe: Recipe, settings: Settings, layout: Layout) -> Method:
    """The recipe with its parameters and the repair that was asked for, in a form that the layout holds.

    Raises:
        UsageError: the layout does not hold what it makes; says with which repair it would, and which recipes it does.
    """
    method, parameters = partial(_method, layout=layout), recipe.with_parameters(settings.parameters)
    try:
        return method(recipe, parameters, settings.refit)
    except ValueError as error:
        repairs = [refit for refit in REFITS if _is_possible(method, recipe, refit)]
        others = [other.name for other in RECIPES.values() if _is_possible(method, other, settings.refit)]
        ways = [f"--refit {' or '.join(repairs)}"] if repairs else []
        ways += [f"--recipe {', '.join(others)}"]
        raise UsageError(
            f"--layout {layout.name} cannot hold what --recipe {recipe.name} does: {error}; give {', or '.join(ways)}"
        ) from error


def _method(recipe: Recipe, parameters: Any, refit: str, layout: Layout) -> Method:
    """Raises ValueError where the layout does not hold what it makes."""
    by_units = recipe.units if layout.is_bare else None
    method = by_units(parameters, layout.kv_heads) if by_units else recipe.method(parameters)
    if refit != RECIPES_OWN:
        method = method.refitted(REFITS[refit](parameters))
    return method.of_units(layout.kv_heads, layout.is_alike) if layout.is_bare else method


def _is_possible(method: Callable[[Recipe, Any, str], Method], recipe: Recipe, refit: str) -> bool:
    try:
        method(recipe, recipe.parameters(), refit)
    except ValueError:
        return False
    return True


def plan_before_survey(recipe: Recipe, method: Method, sizes: list[Sizes], budget: Budget) -> list[LayerShape] | None:
    """The plan as far as it does not need the survey.

    Raises:
        UsageError: impossible for this model; names the largest sparsity that is possible.
    """
    channels = sizes[0].intermediate_size  # heads and ranks that have no such multiple stay whole
    if not 1 <= budget.round_to <= channels:
        raise UsageError(f"--round_to {budget.round_to} is outside 1 to {channels}, the channels of this model's MLPs")
    plan = partial(method.allocate.before_survey, sizes)
    try:
        return plan(budget)
    except UsageError:
        raise
    except ValueError as error:
        largest = largest_possible(lambda sparsity: plan(replace(budget, sparsity=sparsity)), budget.sparsity)
        rounding = f" with --round_to {budget.round_to}" if budget.round_to > 1 else ""
        raise UsageError(
            f"--sparsity {budget.sparsity:g} is impossible for this model and --recipe {recipe.name}{rounding}: "
            f"{error}; the largest possible is {largest:.3f}"
        ) from error


def check_seqlen(seqlen: int, flag: str, config: PreTrainedConfig) -> None:
    """Raise UsageError, naming the flag that decides it, if a sample is longer than the model's positions."""
    positions = config.max_position_embeddings
    if seqlen > positions:
        raise UsageError(f"{flag}: samples of {seqlen} tokens do not fit the model's {positions} positions")


def largest_possible(attempt: Callable[[float], object], below: float) -> float:
    """The largest sparsity under `below`, in steps of a thousandth, for which `attempt` raises no ValueError."""
    for thousandths in range(ceil(below * 1000) - 1, 0, -1):
        try:
            attempt(thousandths / 1000)
        except ValueError:
            continue
        return thousandths / 1000
    return 0.0
