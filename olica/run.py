"""A pruning from its plan to its checkpoint: the one composition, which users, command lines and tests call."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from .checks import as_kind, refuse_twice
from .errors import UsageError, memory_in_words
from .jobs import Job, prepare
from .machine import BatchSize, full_precision, pick_device
from .methods.recipe import Findings
from .methods.sizes import Budget, Sizes, describe_plan
from .model.configuration_olica import LayerShape
from .model.skeleton import count_parameters, pruned_skeleton
from .outputs import checkpoint, identity, records
from .outputs.model_card import write_card
from .outputs.run_folder import RunFolder
from .outputs.run_progress import RunProgress, Shards
from .outputs.survey_store import StoredSurvey
from .processes import working_together
from .progress_bar import one_bar
from .pruning.layers import prune_layers
from .pruning.options import Work
from .pruning.progress import Progress, SurveyProgress
from .pruning.survey import survey_layers
from .settings import Settings, settings_of
from .sources.calibration_set import CalibrationSet, Draw, build_calibration_set
from .sources.configuration import describe_source
from .sources.dense_model import DenseModel
from .sources.licence import licence_of
from .sources.model_files import folder_weight_bytes
from .sources.opening import open_dense_model
from .sources.tokenizers import read_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What a pruning has done.

    Attributes:
        folder: the checkpoint's.
        plan: sizes of all layers.
        record: what was asked, expected and done, as `olica_run.json` has it.
    """

    folder: Path
    plan: list[LayerShape]
    record: dict


def prune(
    model: str | Path,
    *,
    datasets: str | None = None,
    sparsity: float | Sequence[float] = Settings.sparsity,
    recipe: str = Settings.recipe,
    save_dir: str | Path = Settings.save_dir,
    **settings: Any,
) -> Pruned | list[Pruned]:
    """Prune a model and save it, as `model_pruning.py` does.

    The processes of an initialised process group (torch.distributed) all call it, and share the work.

    Args:
        model: name (7b, llama2-7b, smollm2, ...), hub id, folder or .gguf file.
        datasets: texts to calibrate on, joined by +: names or paths; or one token file; by default the recipe's own.
        sparsity: share of the parameters to remove, in [0, 1); or several, which share one survey where they can.
        recipe: a name of `RECIPES`.
        save_dir: folder that receives the checkpoint's folder.
        **settings: further fields of `Settings`, or parameters of the recipe, by the names of their flags.

    Returns:
        What was done; of several sparsities a list of it.

    Raises:
        UsageError: wrong input, or too little memory or disk; the message says what to do. Where it is raised in one of
            several processes, the others raise `ProcessLost`, which is one too.
    """
    refuse_twice("base_model", "prune", settings)
    texts = {"base_model": model, "save_dir": save_dir, "recipe": recipe}
    wanted = {name: as_kind(name, value, str) for name, value in texts.items()} | {"datasets": datasets}
    several = isinstance(sparsity, Sequence) and not isinstance(sparsity, str)
    asked = settings_of(wanted | settings)
    with working_together(pick_device(asked.device)) as processes:
        done = [*run_all(prepare(asked, sparsity if several else [sparsity], processes))]
    return done if several else done[0]


def run_all(jobs: list[Job]) -> Iterator[Pruned]:
    """Do jobs that were given together; of several, those that a stopped run has finished are left as they are."""
    for job in jobs:
        done = job.options.processes.on_main(partial(finished, job)) if len(jobs) > 1 else None
        yield done or run(job)


def finished(job: Job) -> Pruned | None:
    """What the same job has made before, if it has and it lies there."""
    record = records.read_pruning_record(job.folder)
    if not record or "identity" not in record:
        return None
    calibration = draw_calibration_set(job.settings, read_tokenizer(job.location), job.config)
    is_same = record["identity"] == identity.digest_of(_identity(job, calibration))
    is_whole = (job.folder / CONFIG_NAME).is_file()
    with records.understood(job.folder):
        is_whole &= folder_weight_bytes(job.folder) == record["weight_bytes_on_disk"]
        if not (is_same and is_whole):
            return None
        return Pruned(job.folder, [LayerShape(**shape) for shape in record["plan"]], record)


def _identity(job: Job, calibration: CalibrationSet) -> dict:
    """What decides the bits of a job's checkpoint."""
    options = job.options
    return identity.of_run(
        job.settings.flat(), job.location, calibration.token_hash, options.device, options.processes.count
    )


def run(job: Job) -> Pruned:
    """Do a job: draw the calibration set, survey, prune and save.

    Raises:
        UsageError: memory or disk does not suffice, another run is at work or finished there, or numbers overflow.
    """
    with _folder_of(job) as folder, full_precision(), memory_in_words(partial(memory_advice, job.settings)):
        record = _prune_and_save(job, folder)
    return Pruned(job.folder, [LayerShape(**shape) for shape in record["plan"]], record)


@contextmanager
def _folder_of(job: Job) -> Iterator[RunFolder | None]:
    """The folder of a run in the process that writes; None in the others."""
    if not job.options.processes.is_main:
        yield None
        return
    checkpoint.check_folder(job.folder)
    with RunFolder.locked(job.folder) as folder:
        needed = 0 if folder.is_published else job.disk_bytes - folder.written_bytes
        checkpoint.check_place(job.folder, needed, job.settings.overwrite or folder.is_published)
        yield folder


def measure_and_decide(work: Work, budget: Budget, progress: SurveyProgress) -> tuple[list[LayerShape], list[Findings]]:
    """Survey the dense layers, and allocate; returns the plan and the findings of all layers."""
    sizes = Sizes.of_all(work.dense.config)
    allocate = work.method.allocate
    findings = survey_layers(work, allocate.before_survey(sizes, budget), progress)
    return work.options.processes.on_main(lambda: allocate(sizes, budget, findings)), findings


def _prune_and_save(job: Job, folder: RunFolder | None) -> dict:
    """Draw the calibration set, survey, prune and save; returns the record, which lies beside the checkpoint.

    Of several processes all run this; what is done `on_main` the one that has the `folder` does for all.
    """
    settings, options, stages = job.settings, job.options, records.Stages(job.options.device)
    processes, on_main = options.processes, options.processes.on_main
    with stages.stage("calibration set"):
        tokenizer = read_tokenizer(job.location)
        calibration = on_main(lambda: draw_calibration_set(settings, tokenizer, job.config))
    with stages.stage("open model"):
        dense = open_dense_model(job.location, settings.dtype)
        before = count_parameters(dense.model)
    if before != job.counts.before:  # the plan was made before the hub gave the weights
        raise UsageError(
            f"{job.location.flag} {job.location.name}: its weights hold another model than its configuration; give the "
            "same command again, which plans by the weights, now that they are here"
        )
    # As they are now: what changes while the run is at work has no part in it.
    what, licence = on_main(lambda: (_identity(job, calibration), licence_of(job.location)))
    progress = Progress() if folder is None else _begin(job, folder, what, dense.layers_prefix)
    if on_main(lambda: folder.is_complete):
        return on_main(lambda: records.read_pruning_record(job.folder))
    options.batch_size.size = processes.from_main(options.batch_size.size)

    def check_description(plan: list[LayerShape]) -> None:
        on_main(lambda: checkpoint.check_description(folder, dense, _skeleton(job, dense, plan), tokenizer))

    if job.plan:
        check_description(job.plan)
    work, layers = Work(dense, calibration.ids, job.method, options), len(job.sizes)
    # A run that goes on may have smaller batches by now.
    surveying = BatchSize(on_main(lambda: folder.began_with))
    with one_bar(2 * layers if job.method.survey else layers, processes.is_main) as bar:
        with _kept_survey(job, surveying, calibration.token_hash) as survey, stages.stage("survey"):
            surveying.size = processes.from_main(surveying.size)
            if survey.is_complete:
                bar.skip(layers)
            work_of_survey = replace(work, options=replace(options, batch_size=surveying))
            plan, findings = measure_and_decide(work_of_survey, job.budget, survey)
        options.batch_size.size = min(options.batch_size.size, *processes.all_of(surveying.size))
        on_main(lambda: folder.bind(_digest_of_plan(plan, findings)))
        logger.info("survey: %d of %d layers were there already", survey.layers_before, layers)
        logger.info("sizes of all layers:\n%s", describe_plan(plan))
        if not job.plan:
            check_description(plan)
        with stages.stage("prune"):
            prune_layers(work, plan, findings, progress)

    def save() -> dict:
        with stages.stage("write"):
            skeleton = _skeleton(job, dense, plan)
            after = checkpoint.complete(folder, progress, dense, skeleton, tokenizer, settings.shard_bytes)
        record = _make_record(job, calibration, plan, {"before": before, "after": after}) | {
            "model": describe_source(job.location, job.config) | {"licence": licence},
            "identity": identity.digest_of(what),
            **_found(job, plan, findings),
            "survey": survey.described(),
            "stages": stages.rows,
        }
        return _publish(folder, record, job.location.path)

    return on_main(save)


def _found(job: Job, plan: list[LayerShape], findings: list[Findings]) -> dict:
    """What a record says of the findings."""
    correlations = [found["correlation"].item() if "correlation" in found else None for found in findings]
    damage = job.method.allocate.damage(job.sizes, plan, findings)
    return {"damage": damage, "multiple_correlation": correlations}


def _publish(folder: RunFolder, record: dict, dense: str) -> dict:
    """Put a complete checkpoint in its place, with its record, which is returned, and its card.

    `dense` is where the dense model lies, which may have lost tokens.
    """
    record |= {
        "went_on_after": folder.interruptions,
        "weight_bytes_on_disk": folder_weight_bytes(folder.checkpoint),
    }
    with folder.in_words():
        records.write_record(folder.checkpoint / records.PRUNING_RECORD, record)
        records.keep_vocabulary_record(dense, folder.checkpoint)
        write_card(folder.checkpoint, record)
    folder.publish()
    return record


def _begin(job: Job, folder: RunFolder, what: dict, layers_prefix: str) -> RunProgress:
    """Begin a run, of the identity `what`, in its folder, or go on with it."""
    return folder.begin(
        what,
        job.settings.overwrite,
        Shards(layers_prefix, len(job.sizes)),
        job.options.batch_size,
        in_background=job.options.device.type == "cuda",  # on the CPU it competes for the cores
    )


def _skeleton(job: Job, dense: DenseModel, plan: list[LayerShape]) -> PreTrainedModel:
    return pruned_skeleton(dense.config, plan, job.layout)


@contextmanager
def _kept_survey(job: Job, batch_size: BatchSize, token_hash: str) -> Iterator[SurveyProgress]:
    """The survey that this job needs, as far as it lies under the data folder, where the main process keeps it."""
    settings = job.settings
    with ExitStack() as stack:
        survey = SurveyProgress()
        if job.method.survey and job.options.processes.is_main:
            what = _identity_of_survey(job, batch_size.size, token_hash)
            try:
                survey = stack.enter_context(StoredSurvey.locked(Path(settings.data_dir), what, batch_size))
            except OSError as error:
                logger.warning("the survey is not kept, for this run or others to go on with: %s", error)
        yield survey


def _identity_of_survey(job: Job, batch_size: int, token_hash: str) -> dict:
    """What decides the findings of a job's survey."""
    survey, layers = job.method.survey, len(job.sizes)
    decides = {"dtype": job.settings.dtype, "recipe": job.settings.recipe}
    decides |= survey.decided_by(job.recipe.with_parameters(job.settings.parameters))
    if survey.reads_plan:  # all but corrections, which are decided later
        decides["plan"] = [replace(shape, correction_rank=0).to_dict() for shape in job.plan or []]
    if any(survey.needs(index, layers) for index in range(layers)):
        decides["batch_size"] = batch_size
    else:  # no text is read
        token_hash = ""
    return identity.of_run(decides, job.location, token_hash, job.options.device, job.options.processes.count)


def _digest_of_plan(plan: list[LayerShape], findings: list[Findings]) -> str:
    """The sha256 (hex) of what the cut goes by."""
    digest = hashlib.sha256(repr(plan).encode())
    for found in findings:
        for name in sorted(found):
            digest.update(name.encode() + found[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def draw_calibration_set(settings: Settings, tokenizer, config: PreTrainedConfig) -> CalibrationSet:
    """The calibration set that the settings describe."""
    return build_calibration_set(
        settings.datasets,
        tokenizer,
        Draw(settings.num_samples, settings.seqlen, settings.seed, settings.add_bos_token, settings.candidates),
        data_dir=Path(settings.data_dir),
        cache_dir=Path(settings.data_dir) / "calibration",
        vocab_size=config.vocab_size,
    )


def _make_record(
    job: Job, calibration: CalibrationSet, plan: list[LayerShape], counted: dict[str, dict[str, int]]
) -> dict:
    """What a run was asked, expected to do and did; `counted` are the parameters of the models before and after."""
    before, after = counted["before"], counted["after"]
    planned = job.counts.planned or after
    return {
        "kind": "pruning",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": job.settings.flat(),
        "recipe": {
            "name": job.recipe.name,
            "about": job.recipe.about,
            "parameters": job.recipe.parameter_names,
        },
        "calibration": {**vars(calibration), "ids": list(calibration.ids.shape)},
        "shares_removed": job.method.allocate.shares(job.sizes, job.budget),
        "plan": [shape.to_dict() for shape in plan],
        "dense_layer": {"v_head_dim": job.sizes[0].head_dim, "intermediate_size": job.sizes[0].intermediate_size},
        "corrected_layers": [index for index, shape in enumerate(plan) if shape.correction_rank],
        "parameters": {
            "before": before["total"],
            "planned": planned["total"],
            "after": after["total"],
            "decoder_layers_before": before["decoder_layers"],
            "decoder_layers_after": after["decoder_layers"],
        },
        "measured_sparsity": 1 - after["total"] / before["total"],
        "measured_sparsity_of_layers": 1 - after["decoder_layers"] / before["decoder_layers"],
        "batch_size": job.options.batch_size.size,
        "processes": job.options.processes.count,
        "expected_peak_memory": job.memory,
        "environment": records.environment(job.options.device),
    }


def memory_advice(settings: Settings, of_host: bool) -> str:
    """What to do when memory, the host's or a GPU's, runs out with a single sample at a time, or outside of batches."""
    ways = ["a --dtype of half the width", "a smaller calibration set (--num_samples, --seqlen)"]
    if pick_device(settings.device).type == "cuda":
        if of_host == (settings.cache_dev == "cpu"):  # hidden states live where there is no room
            ways.insert(0, f"--cache_dev {'cuda' if of_host else 'cpu'}")
        if not of_host:
            ways.append("--device cpu")
    return f"give {', '.join(ways[:-1])} or {ways[-1]}"
