"""A pruning from its settings to its checkpoint: the one composition, which users, command lines and tests call."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .errors import UsageError, memory_in_words
from .machine import BatchSize, pick_device
from .methods.allocation import describe_plan, largest_possible
from .methods.recipe import Findings, Method, Recipe
from .methods.recipes import RECIPES, recipe_name
from .methods.sizes import Budget, Sizes
from .model.configuration_olica import LayerShape
from .model.skeleton import count_parameters, pruned_skeleton, try_out
from .outputs import checkpoint, identity, records
from .outputs.model_card import write_card
from .outputs.run_folder import RunFolder
from .outputs.run_progress import Shards
from .outputs.survey_store import StoredSurvey
from .progress_bar import one_bar
from .pruning.layers import prune_layers
from .pruning.memory import Task, expected_peaks, fit_batch_size
from .pruning.options import PruningOptions, Work
from .pruning.progress import SurveyProgress
from .pruning.survey import survey_layers
from .sources.calibration_set import CalibrationSet, Draw, build_calibration_set, calibration_shape, is_token_file
from .sources.configuration import count_dense_parameters, describe_source, read_config, refuse_unprunable
from .sources.dense_model import is_streamed, open_dense_model
from .sources.locate import Location, locate
from .sources.model_files import weight_files
from .sources.tokenizers import read_tokenizer
from .sources.weights import DTYPES, bytes_per_weight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What a pruning is asked for: the flags of the command line, by their names, with their defaults.

    Attributes:
        base_model: name, hub id, folder or .gguf file.
        dtype: to run and save in.
        datasets: texts joined by +, or a token file.
        data_dir: folder searched first for named texts; drawn tokens and surveys are kept there.
        num_samples: samples drawn from each text.
        seqlen: tokens in each.
        seed: of the draw.
        recipe: name of the method.
        sparsity: share of the parameters to remove, in [0, 1).
        sparsity_of: what it is a share of: the whole "model" or its decoder "layers".
        round_to: sizes become multiples of it.
        device: where layers run.
        cache_dev: where hidden states live.
        batch_size: samples that go through a layer at a time, or "auto".
        save_dir: folder that receives the checkpoint's folder.
        overwrite: replace an existing checkpoint.
        parameters: those of the recipe that are not left at their defaults, by name.
    """

    base_model: str = "7b"
    dtype: str = "auto"
    datasets: str = "bookcorpus+alpaca"
    data_dir: str = "./data"
    num_samples: int = 128
    seqlen: int = 128
    seed: int = 0
    recipe: str = "olica"
    sparsity: float = 0.2
    sparsity_of: str = checkpoint.SPARSITY_OF[0]
    round_to: int = 1
    device: str = "auto"
    cache_dev: str = "auto"
    batch_size: int | str = 16
    save_dir: str = "./pruned_models"
    overwrite: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise UsageError(f"--recipe {self.recipe} is none of {', '.join(RECIPES)}")
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity:g} is outside [0, 1): it is the share of parameters to remove")
        if self.sparsity_of not in checkpoint.SPARSITY_OF:
            raise UsageError(f"--sparsity_of {self.sparsity_of} is neither {' nor '.join(checkpoint.SPARSITY_OF)}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is none of auto, {', '.join(DTYPES)}")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"--batch_size {self.batch_size} must be at least 1")

    def flat(self) -> dict[str, Any]:
        """All settings by the names of their flags, the recipe's parameters at their values."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parameters"}
        return own | asdict(RECIPES[self.recipe].with_parameters(self.parameters))


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
        plan: sizes of all layers; which get a correction is not known yet. None where the survey decides them.
        notes: what the user should know of the plan.
        parameters: before, and of the plan.
        bytes_per_weight: in the dtype that is saved.
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
    plan: list[LayerShape] | None
    notes: list[str]
    parameters: Parameters
    bytes_per_weight: int
    disk_bytes: int
    memory: dict[str, int | None]
    folder: Path

    @property
    def sizes(self) -> list[Sizes]:
        """Of all dense layers."""
        return [Sizes.of(self.config)] * self.config.num_hidden_layers


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
    datasets: str = Settings.datasets,
    sparsity: float | Sequence[float] = Settings.sparsity,
    recipe: str = Settings.recipe,
    save_dir: str | Path = Settings.save_dir,
    **settings: Any,
) -> Pruned | list[Pruned]:
    """Prune a model and save it, as `model_pruning.py` does.

    Args:
        model: name (7b, llama2-7b, smollm2, ...), hub id, folder or .gguf file.
        datasets: texts to calibrate on, joined by +: names or paths; or one token file.
        sparsity: share of the parameters to remove, in [0, 1); or several, which share one survey where they can.
        recipe: a name of `RECIPES`.
        save_dir: folder that receives the checkpoint's folder.
        **settings: further fields of `Settings`, or parameters of the recipe, by the names of their flags.

    Returns:
        What was done; of several sparsities a list of it.

    Raises:
        UsageError: wrong input, or too little memory or disk; the message says what to do.
    """
    wanted = {"base_model": str(model), "datasets": datasets, "recipe": recipe_name(recipe), "save_dir": str(save_dir)}
    several = not isinstance(sparsity, int | float)
    jobs = prepare(settings_of(wanted | settings), list(sparsity) if several else [sparsity])
    done = [run(job) for job in jobs]
    return done if several else done[0]


def settings_of(given: dict[str, Any]) -> Settings:
    """Settings, some of which are parameters of the recipe.

    Raises:
        UsageError: a name that is neither, or a value that cannot be.
    """
    names = {f.name for f in fields(Settings)} - {"parameters"}
    own = {name: value for name, value in given.items() if name in names}
    parameters = {name: value for name, value in given.items() if name not in names}
    settings = Settings(**own, parameters=parameters)
    RECIPES[settings.recipe].with_parameters(parameters)
    return settings


def prepare(settings: Settings, sparsities: Sequence[float]) -> list[Job]:
    """Check all that can be checked without weights, and plan, for every sparsity.

    Raises:
        UsageError: what was asked for is impossible.
    """
    if not sparsities:
        raise UsageError("--sparsity: give a share, or several joined by commas")
    return [_prepare(replace(settings, sparsity=sparsity)) for sparsity in dict.fromkeys(sparsities)]


def _prepare(settings: Settings) -> Job:
    recipe = RECIPES[settings.recipe]
    method = recipe.method(recipe.with_parameters(settings.parameters))
    location = locate(settings.base_model)
    config = read_config(location)
    refuse_unprunable(config, location)
    ids_shape = calibration_shape(settings.datasets, settings.num_samples, settings.seqlen)
    check_seqlen(ids_shape[1], "--datasets" if is_token_file(settings.datasets) else "--seqlen", config)
    dense = count_dense_parameters(location, config)
    whole = dense["total" if settings.sparsity_of == "model" else "decoder_layers"]
    budget = Budget(whole, settings.sparsity, settings.round_to)
    sizes = [Sizes.of(config)] * config.num_hidden_layers
    plan = plan_before_survey(recipe, method, sizes, budget)
    device = pick_device(settings.device)
    options = PruningOptions(
        batch_size=BatchSize(1 if settings.batch_size == "auto" else settings.batch_size),
        device=device,
        cache_device=device if settings.cache_dev == "auto" else pick_device(settings.cache_dev, "--cache_dev"),
    )
    shapes = plan or [dense_shape(sizes[0])] * len(sizes)
    itemsize = bytes_per_weight(location, config, settings.dtype)
    task = Task(config, dense["total"], frozenset(shapes), ids_shape, itemsize, method, is_streamed(location))
    if settings.batch_size == "auto":
        fit_batch_size(task, options)
    with location.in_words("its configuration describes no model that can be pruned and run"):
        pruned = pruned_skeleton(config, shapes)
        try_out(pruned)
    planned = count_parameters(pruned) if plan else None
    expected = planned["total"] if planned else dense["total"] - int(budget.sparsity * budget.whole)
    return Job(
        settings=settings,
        recipe=recipe,
        method=method,
        location=location,
        config=config,
        options=options,
        budget=budget,
        plan=plan,
        notes=method.allocate.notes(sizes, budget),
        parameters=Parameters(dense, planned),
        bytes_per_weight=itemsize,
        disk_bytes=expected * itemsize + 2 * task.states,  # two, while one takes the place of the other
        memory=expected_peaks(task, options),
        folder=checkpoint.checkpoint_folder(
            settings.save_dir, location.label, settings.sparsity, recipe.name, settings.sparsity_of
        ),
    )


def plan_before_survey(recipe: Recipe, method: Method, sizes: list[Sizes], budget: Budget) -> list[LayerShape] | None:
    """The plan as far as it does not need the survey.

    Raises:
        UsageError: impossible for this model; names the largest sparsity that is possible.
    """
    width = sizes[0].head_dim
    if not 1 <= budget.round_to <= width:
        raise UsageError(f"--round_to {budget.round_to} is outside 1 to {width}, the width of this model's heads")
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


def dense_shape(layer: Sizes) -> LayerShape:
    """Sizes of a layer that loses nothing."""
    return LayerShape(0, 0, layer.head_dim, layer.intermediate_size)


def check_seqlen(seqlen: int, flag: str, config: PreTrainedConfig) -> None:
    """Raise UsageError, naming the flag that decides it, if a sample is longer than the model's positions."""
    positions = config.max_position_embeddings
    if seqlen > positions:
        raise UsageError(f"{flag}: samples of {seqlen} tokens do not fit the model's {positions} positions")


def run(job: Job) -> Pruned:
    """Do a job: draw the calibration set, survey, prune and save.

    Raises:
        UsageError: memory or disk does not suffice, another run is at work or finished there, or numbers overflow.
    """
    checkpoint.check_folder(job.folder)
    with RunFolder.locked(job.folder) as folder:
        needed = 0 if folder.is_published else job.disk_bytes - folder.written_bytes
        checkpoint.check_room(job.folder, needed, job.settings.overwrite or folder.is_published)
        with memory_in_words(partial(memory_advice, job.settings)):
            record = _prune_and_save(job, folder)
    return Pruned(job.folder, [LayerShape(**shape) for shape in record["plan"]], record)


def measure_and_decide(work: Work, budget: Budget, progress: SurveyProgress) -> tuple[list[LayerShape], list[Findings]]:
    """Survey the dense layers, and allocate; returns the plan and the findings of all layers."""
    sizes = [Sizes.of(work.dense.config)] * work.dense.config.num_hidden_layers
    allocate = work.method.allocate
    findings = survey_layers(work, allocate.before_survey(sizes, budget), progress)
    return allocate(sizes, budget, findings), findings


def _prune_and_save(job: Job, folder: RunFolder) -> dict:
    """Draw the calibration set, survey, prune and save; returns the record, which lies beside the checkpoint."""
    settings, options, stages = job.settings, job.options, records.Stages(job.options.device)
    with stages.stage("calibration set"):
        tokenizer = read_tokenizer(job.location)
        calibration = draw_calibration_set(settings, tokenizer, job.config)
    with stages.stage("open model"):
        dense = open_dense_model(job.location, settings.dtype)
        before = count_parameters(dense.model)
    if before != job.parameters.before:  # the plan was made before the hub gave the weights
        raise UsageError(
            f"{job.location.flag} {job.location.name}: its weights hold another model than its configuration; give the "
            "same command again, which plans by the weights, now that they are here"
        )
    progress = folder.begin(
        identity.of_run(settings.flat(), job.location, calibration.token_hash, options.device),
        settings.overwrite,
        Shards(dense.layers_prefix, len(job.sizes)),
        options.batch_size,
        in_background=options.device.type == "cuda",  # on the CPU it competes for the cores
    )
    if folder.is_complete:
        return records.read_pruning_record(job.folder)
    if job.plan:
        checkpoint.check_description(folder, dense, job.plan, tokenizer)
    work, layers = Work(dense, calibration.ids, job.method, options), len(job.sizes)
    surveying = BatchSize(folder.began_with)  # a run that goes on may have smaller batches by now
    with one_bar(2 * layers if job.method.survey else layers) as bar:
        with stages.stage("survey"), _kept_survey(job, surveying, calibration.token_hash) as survey:
            if survey.is_complete:
                bar.skip(layers)
            work_of_survey = replace(work, options=replace(options, batch_size=surveying))
            plan, findings = measure_and_decide(work_of_survey, job.budget, survey)
        options.batch_size.size = min(options.batch_size.size, surveying.size)
        logger.info("survey: %d of %d layers were there already", survey.layers_before, layers)
        logger.info("sizes of all layers:\n%s", describe_plan(plan))
        if not job.plan:
            checkpoint.check_description(folder, dense, plan, tokenizer)
        with stages.stage("prune"):
            prune_layers(work, plan, findings, progress)
    with stages.stage("write"):
        after = checkpoint.complete(folder, progress, dense, plan, tokenizer)
    record = _make_record(job, calibration, plan, {"before": before, "after": after}) | {
        "multiple_correlation": [found["correlation"].item() if "correlation" in found else None for found in findings],
        "survey": survey.described(),
        "went_on_after": folder.interruptions,
        "stages": stages.rows,
        "weight_bytes_on_disk": sum(path.stat().st_size for path in weight_files(folder.checkpoint)),
    }
    with folder.explained():
        records.write_record(folder.checkpoint / records.PRUNING_RECORD, record)
        write_card(folder.checkpoint, record)
    folder.publish()
    return record


@contextmanager
def _kept_survey(job: Job, batch_size: BatchSize, token_hash: str) -> Iterator[SurveyProgress]:
    """The survey that this job needs, as far as it lies under the data folder, where it is going to be kept."""
    settings = job.settings
    with ExitStack() as stack:
        survey = SurveyProgress()
        if job.method.survey:
            decides = {"dtype": settings.dtype, "batch_size": batch_size.size, "recipe": settings.recipe}
            decides |= job.method.survey.decided_by
            if job.method.survey.reads_plan:
                decides["plan"] = [shape.to_dict() for shape in job.plan]
            what = identity.of_run(decides, job.location, token_hash, job.options.device)
            try:
                survey = stack.enter_context(StoredSurvey.locked(Path(settings.data_dir), what, batch_size))
            except OSError as error:
                logger.warning("the survey is not kept for other runs: %s", error)
        yield survey


def draw_calibration_set(settings: Settings, tokenizer, config: PreTrainedConfig) -> CalibrationSet:
    """The calibration set that the settings describe."""
    return build_calibration_set(
        settings.datasets,
        tokenizer,
        Draw(settings.num_samples, settings.seqlen, settings.seed),
        data_dir=Path(settings.data_dir),
        cache_dir=Path(settings.data_dir) / "calibration",
        vocab_size=config.vocab_size,
    )


def _make_record(
    job: Job, calibration: CalibrationSet, plan: list[LayerShape], counted: dict[str, dict[str, int]]
) -> dict:
    """What a run was asked, expected to do and did; `counted` are the parameters of the models before and after."""
    before, after = counted["before"], counted["after"]
    planned = job.parameters.planned or after
    return {
        "kind": "pruning",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": job.settings.flat(),
        "recipe": {
            "name": job.recipe.name,
            "about": job.recipe.about,
            "parameters": job.recipe.parameter_names,
        },
        "model": describe_source(job.location, job.config),
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
