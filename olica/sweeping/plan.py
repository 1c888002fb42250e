"""What a sweep is asked for, and what it is going to do, as far as that is decided before a weight is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil

from ..checks import as_kind, check_choice
from ..errors import UsageError
from ..evaluation.settings import EvaluationSettings
from ..jobs import Job, check_seqlen, prepare
from ..outputs.names import NAMED, sweep_folder
from ..processes import ALONE, Processes
from ..pruning.memory import RUNTIME_BYTES
from ..settings import Settings, settings_of
from ..sources.calibration_set import calibration_shape, is_token_file
from ..sources.locate import locate
from .bisection import FINEST, Target, as_parameters, as_ratio, as_sparsities

RECORD, PAGE, CHECKPOINTS = "sweep.json", "sweep.html", "checkpoints"


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep is asked for beside what every pruning is, by the names of the flags.

    Attributes:
        sparsity: START:END:STEP, a list joined by commas, or numbers; becomes a list of numbers, ascending.
        held_back: samples drawn from each text to measure on.
        held_back_datasets: texts to draw them from, or a token file; None: what the calibration set leaves of its own.
        tasks: zero-shot tasks of lm-eval, joined by commas; empty: none.
        limit: how many rows of every task count, or which share of them if below 1; None: all.
        target_ppl_ratio: find the largest sparsity whose perplexity is at most so many times the dense model's.
        max_params: find the smallest sparsity that leaves at most so many parameters.
        tolerance: of the sparsity that is found.
        keep: whether the points' checkpoints are kept.

    Raises:
        UsageError: a value that cannot be.
    """

    sparsity: Any = "0.1:0.5:0.1"
    held_back: int = 64
    held_back_datasets: str | None = None
    tasks: str = ""
    limit: int | float | None = None
    target_ppl_ratio: float | None = None
    max_params: str | int | None = None
    tolerance: float = 0.005
    keep: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", as_sparsities(self.sparsity))
        object.__setattr__(self, "held_back", as_kind("held_back", self.held_back, int))
        object.__setattr__(self, "tolerance", as_kind("tolerance", self.tolerance, float))
        if self.held_back < 1:
            raise UsageError(f"--held_back is {self.held_back}: give 1 or more")
        if not FINEST <= self.tolerance < 1:
            raise UsageError(
                f"--tolerance {self.tolerance:g} is outside [{FINEST:g}, 1): it is a difference of sparsities"
            )
        check_choice("keep", self.keep, (False, True))
        if self.target_ppl_ratio is not None and self.max_params is not None:
            raise UsageError("--target_ppl_ratio and --max_params are both given: a sparsity is sought for one of them")
        _ = self.target  # refuses what cannot be read

    @property
    def target(self) -> Target | None:
        """What the sparsity that is sought has to meet; None: none is sought.

        Raises:
            UsageError: its value cannot be read.
        """
        if self.target_ppl_ratio is not None:
            return Target("target_ppl_ratio", as_ratio("target_ppl_ratio", self.target_ppl_ratio))
        if self.max_params is not None:
            return Target("max_params", as_parameters("max_params", self.max_params))
        return None


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, as far as it is decided before a weight is read.

    Attributes:
        settings: of all prunings, but for the sparsity.
        wanted: what else was asked for.
        jobs: the prunings of the points that are asked for, ascending.
        folder: of the record and the page.
    """

    settings: Settings
    wanted: SweepSettings
    jobs: list[Job]
    folder: Path

    @property
    def most_trials(self) -> int:
        """Points more that finding the target takes at the most."""
        if self.wanted.target is None:
            return 0
        sparsities = [0.0, *self.wanted.sparsity]
        widest = max(high - low for low, high in zip(sparsities[:-1], sparsities[1:], strict=True))
        guesses = 2 if self.wanted.target.flag == "max_params" else 0
        return guesses + math.ceil(math.log2(max(widest / self.wanted.tolerance, 1)))

    @property
    def kept_bytes(self) -> int:
        """Of the checkpoints that stay and are not there yet, trials not counted."""
        missing = [job for job in self.jobs if self.wanted.keep and not job.folder.is_dir()]
        return sum(expected_parameters(job) * job.bytes_per_weight for job in missing)

    def disk_bytes(self, processes: int = 1) -> int:
        """What the sweep takes at the most while so many processes are at work, trials not counted."""
        return self.kept_bytes + sum(sorted(job.disk_bytes for job in self.jobs)[-processes:])

    @property
    def measuring_bytes(self) -> int:
        """Memory that measuring takes: the largest model, which is the dense one, and the logits of a batch.

        On the CPU that of the process itself is in it.
        """
        job, (_, tokens) = self.jobs[0], held_back_shape(self.settings, self.wanted)
        batch, vocabulary = job.options.batch_size.size, job.config.vocab_size
        # The logits in the model's dtype; of one window in float32, with their log-probabilities.
        logits = tokens * vocabulary * (batch * job.bytes_per_weight + 2 * 4)
        is_host = job.options.device.type == "cpu"
        own = psutil.Process().memory_info().rss + RUNTIME_BYTES["cpu"] if is_host else 0
        return own + job.counts.before["total"] * job.bytes_per_weight + logits


def plan_sweep(given: dict[str, Any], processes: Processes = ALONE) -> SweepPlan:
    """Check all that can be checked without weights, and plan.

    Args:
        given: fields of `SweepSettings` and `Settings`, or parameters of the recipe.
        processes: that are going to share the points.

    Raises:
        UsageError: what was asked for is impossible.
    """
    own = [f.name for f in fields(SweepSettings)]
    wanted = SweepSettings(**{name: value for name, value in given.items() if name in own})
    others = {name: value for name, value in given.items() if name not in own}
    settings = settings_of(others, own)
    if wanted.held_back_datasets is None and is_token_file(settings.datasets):
        raise UsageError(
            f"--datasets {settings.datasets} is a token file, which has no further text to hold back: give "
            "--held_back_datasets"
        )
    location = locate(settings.base_model)
    folder = sweep_folder(settings.save_dir, location.label, **{name: getattr(settings, name) for name in NAMED})
    jobs = jobs_of_points(settings, wanted, folder, wanted.sparsity, processes)
    _, tokens = held_back_shape(settings, wanted)
    check_seqlen(tokens, "--held_back_datasets" if wanted.held_back_datasets else "--seqlen", jobs[0].config)
    plan = SweepPlan(settings, wanted, jobs, folder)
    evaluation_settings(plan)
    if wanted.max_params is not None:
        _check_reachable(plan)
    return plan


def jobs_of_points(
    settings: Settings, wanted: SweepSettings, folder: Path, sparsities: Sequence[float], processes: Processes
) -> list[Job]:
    """The prunings of some points, each of one process, in batches of one size wherever they are made.

    Where checkpoints are kept they go where a pruning by itself would put them.
    """
    settings = settings if wanted.keep else replace(settings, save_dir=str(folder / CHECKPOINTS))
    several = processes if processes.count > 1 else None
    jobs = prepare(settings, sparsities, several.by_itself if several else None)
    for job in jobs if several else ():
        job.options.batch_size.size = min(processes.all_of(job.options.batch_size.size))
    return jobs


def held_back_shape(settings: Settings, wanted: SweepSettings) -> tuple[int, int]:
    """The (M, T) of the held-back text, but for windows that turn out to be the calibration set's.

    Raises:
        UsageError: a token file that cannot be read.
    """
    return calibration_shape(wanted.held_back_datasets or settings.datasets, wanted.held_back, settings.seqlen)


def expected_parameters(job: Job) -> int:
    """Parameters that a job leaves of the model: those of its plan, or else of its budget."""
    if job.counts.planned:
        return job.counts.planned["total"]
    return job.counts.before["total"] - round(job.budget.to_remove)


def _check_reachable(plan: SweepPlan) -> None:
    """Raise UsageError if --max_params lies beyond the sparsities that are asked for, or asks for nothing."""
    most, dense = plan.wanted.target.value, plan.jobs[0].counts.before["total"]
    if most >= dense:
        raise UsageError(f"--max_params {plan.wanted.max_params}: the dense model has no more, {dense:,}")
    if (fewest := expected_parameters(plan.jobs[-1])) > most:
        raise UsageError(
            f"--max_params {plan.wanted.max_params}: the largest --sparsity, {plan.wanted.sparsity[-1]:g}, leaves "
            f"{fewest:,}; give --sparsity that goes further"
        )


def evaluation_settings(plan: SweepPlan) -> EvaluationSettings:
    """What every model of the sweep is measured by.

    Raises:
        UsageError: a value of --tasks or --limit that cannot be.
    """
    settings, job = plan.settings, plan.jobs[0]
    same = {name: getattr(settings, name) for name in ("dtype", "add_bos_token", "data_dir", "seed", "device")}
    return EvaluationSettings.of(
        same
        | {"ppl": "none", "tasks": plan.wanted.tasks, "limit": plan.wanted.limit}
        | {"batch_size": job.options.batch_size.size}
    )


def describe_sweep(plan: SweepPlan, processes: int = 1) -> str:
    """Lines that say what a sweep of so many processes is going to do: its points, the memory and the disk it takes."""
    jobs, wanted = plan.jobs, plan.wanted
    before = jobs[0].counts.before["total"]
    lines = [f"{'sparsity':>10}  {'parameters':>15}  {'weights':>10}"]
    for sparsity, left, about in [
        ("dense", before, ""),
        *((job.budget.sparsity, expected_parameters(job), "" if job.plan else "about ") for job in jobs),
    ]:
        weights = f"{left * jobs[0].bytes_per_weight / 1e9:.3f} GB"
        lines.append(f"{sparsity:>10}  {f'{about}{left:,}':>15}  {weights:>10}")
    lines += [f"note         {note}" for note in dict.fromkeys(note for job in jobs for note in job.notes)]
    if wanted.target:
        lines.append(f"search       {wanted.target.text}, to {wanted.tolerance:g}: "
                     f"at most {plan.most_trials} points more")  # fmt: skip
    samples, tokens = held_back_shape(plan.settings, wanted)
    source = wanted.held_back_datasets or f"what is left of {plan.settings.datasets}"
    host = max(job.memory["host_bytes"] for job in jobs)
    devices = [job.memory["device_bytes"] for job in jobs if job.memory["device_bytes"]]
    device = f", device {max(devices) / 1e9:.2f} GB" if devices else ""
    each = f", in each of {processes} processes" if processes > 1 else ""
    stays = f"{plan.kept_bytes / 1e9:.3f} GB of checkpoints stay" if wanted.keep else "no checkpoint stays"
    return "\n".join([
        *lines,
        f"measured on  {samples} samples of {tokens} tokens from {source}" + (f"; {wanted.tasks}" * bool(wanted.tasks)),
        f"peak memory  host {host / 1e9:.2f} GB{device} (expected) while pruning, about "
        f"{plan.measuring_bytes / 1e9:.2f} GB while measuring{each}",
        f"disk         {plan.disk_bytes(processes) / 1e9:.3f} GB at the most; {stays}",
        f"page         {plan.folder / PAGE}",
    ])  # fmt: skip
