"""What a job is going to do, in words, before a weight is read: sizes, parameters, memory, disk and time."""

from pathlib import Path

import torch

from .duration import Pruning, nearest, read_timed
from .jobs import Job
from .methods.sizes import describe_plan
from .pruning.memory import survey_disk_bytes
from .settings import Settings
from .terminal import time_in_words

# Where a checkout has its records; an installed package has none.
RECORDS = Path(__file__).parents[1] / "results"
# Layers that lose so many times what was asked are warned of: the embedding, which is not pruned, has the rest.
WARNED_RATIO = 1.5


def describe(job: Job) -> str:
    """Lines that say what a job is going to do: sizes, parameters, what to know of them, what it is to take."""
    before, size = job.counts.before["total"], job.bytes_per_weight / 1e9
    after = before - round(job.budget.to_remove)
    if job.plan is None:
        of = "model" if job.settings.sparsity_of == "model" else "decoder layers"
        lines = [
            "sizes        the survey decides them",
            f"budget       {before - after:,} parameters of the {of} go: {before:,} -> about {after:,}",
        ]
    else:
        after = job.counts.planned["total"]
        lines = _sizes_of(job)
    device = f", device {job.memory['device_bytes'] / 1e9:.2f} GB" if job.memory["device_bytes"] else ""
    processes = job.options.processes.count
    if processes > 1:
        device += f", in each of {processes} processes"
    survey = survey_disk_bytes(job.task)
    under_data = f", {survey / 1e9:.2f} GB under --data_dir" if survey else ""
    return "\n".join([
        *lines,
        *(f"note         {note}" for note in job.notes),
        f"weights      {before * size:.3f} GB -> {after * size:.3f} GB",
        f"peak memory  host {job.memory['host_bytes'] / 1e9:.2f} GB{device} (expected)",
        f"disk         {job.disk_bytes / 1e9:.2f} GB under --save_dir{under_data} (at most, beside the dense model)",
        *_time_of(job),
        f"batch size   {job.options.batch_size.size}",
    ])  # fmt: skip


def _time_of(job: Job) -> list[str]:
    """How long one process on a GPU takes for a job by itself, where a run on a GPU of the same name is recorded.

    Records are of recipes as they are: nothing is known of other parameters or repairs.
    """
    options, settings = job.options, job.settings
    own = job.recipe.with_parameters(settings.parameters) == job.recipe.parameters()
    is_plain = own and settings.refit == Settings.refit
    if options.device.type != "cuda" or options.processes.count > 1 or not is_plain:
        return []
    device = torch.cuda.get_device_name(options.device)
    asked = as_timed(job, device)
    timed = nearest(asked, read_timed(RECORDS))
    if timed is None:
        return []
    return [
        f"time         about {time_in_words(timed.scaled(asked))} by itself, by what {timed.source} took on {device}"
    ]


def as_timed(job: Job, device: str) -> Pruning:
    """What decides how long a job takes on a device of that name."""
    before = job.counts.before
    return Pruning(
        device=device,
        recipe=job.recipe.name,
        itemsize=job.bytes_per_weight,
        layers=len(job.sizes),
        of_layers=before["decoder_layers"],
        total=before["total"],
        ids_shape=job.task.ids_shape,
    )


def _sizes_of(job: Job) -> list[str]:
    """A plan, and what it leaves of the parameters."""
    before, after = (counted["total"] for counted in (job.counts.before, job.counts.planned))
    ranks = [shape.correction_rank for shape in job.plan if shape.correction_rank]
    of_model, of_layers = job.counts.lost("total"), job.counts.lost("decoder_layers")
    lines = [describe_plan(job.plan, without=("correction_rank",))]
    if ranks:
        lines.append(f"and a correction of rank {ranks[0]} beside {len(ranks)} MLPs, which the survey chooses")
    lines.append(
        f"parameters   {before:,} -> {after:,}, sparsity {of_model:.4f} of the model, {of_layers:.4f} of its layers"
    )
    if of_layers > WARNED_RATIO * job.settings.sparsity:
        share = job.counts.before["decoder_layers"] / before
        lines.append(
            f"note         the decoder layers lose {of_layers:.0%}, since they are but {share:.0%} of the model and "
            "nothing else is pruned; --sparsity_of layers takes --sparsity as their share"
        )
    return lines
