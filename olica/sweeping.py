"""A sweep over the sparsity: prune to several, measure each beside the dense model, and write a record and a page.

A folder LABEL_sweep under --save_dir has

    sweep.json     the record: all points so far, from which the same command goes on
    sweep.html     the page, written anew after every point
    checkpoints/   that of the point at work, unless checkpoints are kept

Dimensions: M windows of held-back text, T tokens in each.
"""

import json
import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from torch import Tensor

from .bisection import FINEST, Target, as_parameters, as_ratio, as_sparsities, bracket, next_trial
from .checks import as_kind, check_room
from .command_line import memory_advice
from .errors import UsageError, memory_in_words
from .evaluation.evaluate import make_protocol
from .evaluation.measures import Measures, measure
from .evaluation.paired import compare
from .evaluation.settings import EvaluationSettings
from .evaluation.subject import TestWindows
from .evaluation.subject import prepare as prepare_subject
from .jobs import Job, Settings, check_seqlen, dense_shape, prepare, settings_of
from .machine import full_precision
from .methods.recipes import recipe_name
from .model.skeleton import count_by_part
from .outputs import checkpoint, identity, records
from .outputs.names import NAMED, sweep_folder
from .processes import ALONE, are_several
from .pruning.memory import RUNTIME_BYTES
from .report.sweep_page import page
from .run import draw_calibration_set, finished, run
from .sources.calibration_set import CalibrationSet, calibration_shape, hash_tokens, held_back, is_token_file, without
from .sources.configuration import describe_source
from .sources.locate import Location, locate
from .sources.tokenizers import read_tokenizer

RECORD, PAGE, CHECKPOINTS, LOCK = "sweep.json", "sweep.html", "checkpoints", ".sweep.lock"
# What the held-back windows are called beside the texts of other evaluations.
HELD_BACK = "held-back text"


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
        if not isinstance(self.keep, bool):
            raise UsageError(f"--keep {self.keep}: give True or False")
        if self.target_ppl_ratio is not None and self.max_params is not None:
            raise UsageError("--target_ppl_ratio and --max_params are both given: a sparsity is sought for one of them")
        if self.target_ppl_ratio is not None:
            as_ratio("target_ppl_ratio", self.target_ppl_ratio)
        if self.max_params is not None:
            as_parameters("max_params", self.max_params)

    @property
    def target(self) -> Target | None:
        """What the sparsity that is sought has to meet; None: none is sought."""
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

    @property
    def disk_bytes(self) -> int:
        """What the sweep takes at the most while it is at work, trials not counted."""
        return self.kept_bytes + max(job.disk_bytes for job in self.jobs)

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
        own = psutil.Process().memory_info().rss + RUNTIME_BYTES if is_host else 0
        return own + job.parameters.before["total"] * job.bytes_per_weight + logits


@dataclass(frozen=True)
class Swept:
    """What a sweep has done.

    Attributes:
        record: what `sweep.json` says: the dense model, the `points`, and the `answer` where a sparsity was sought.
        page: file of the page; the record lies beside it.
    """

    record: dict
    page: Path


def sweep(model: str | Path, **settings: Any) -> Swept:
    """Prune a model to several sparsities and measure each, as `model_sweep.py` does.

    Args:
        model: name (7b, llama2-7b, smollm2, ...), hub id, folder or .gguf file.
        **settings: fields of `SweepSettings` and of `Settings`, or parameters of the recipe, by the names of their
            flags.

    Returns:
        The record, and where the page is.

    Raises:
        UsageError: wrong input, too little memory or disk, or no sparsity meets the target; the message says what to
            do.
    """
    return run_sweep(plan_sweep({"base_model": as_kind("base_model", model, str)} | settings))


def plan_sweep(given: dict[str, Any]) -> SweepPlan:
    """Check all that can be checked without weights, and plan.

    Args:
        given: fields of `SweepSettings` and `Settings`, or parameters of the recipe.

    Raises:
        UsageError: what was asked for is impossible.
    """
    own = {f.name for f in fields(SweepSettings)}
    wanted = SweepSettings(**{name: value for name, value in given.items() if name in own})
    others = {name: value for name, value in given.items() if name not in own}
    if "recipe" in others:
        others["recipe"] = recipe_name(as_kind("recipe", others["recipe"], str))
    settings = settings_of(others)
    if wanted.held_back_datasets is None and is_token_file(settings.datasets):
        raise UsageError(
            f"--datasets {settings.datasets} is a token file, which has no further text to hold back: give "
            "--held_back_datasets"
        )
    location = locate(settings.base_model)
    folder = sweep_folder(settings.save_dir, location.label, **{name: getattr(settings, name) for name in NAMED})
    jobs = prepare(_settings_of_points(settings, wanted, folder), wanted.sparsity)
    _, tokens = held_back_shape(settings, wanted)
    check_seqlen(tokens, "--held_back_datasets" if wanted.held_back_datasets else "--seqlen", jobs[0].config)
    plan = SweepPlan(settings, wanted, jobs, folder)
    evaluation_settings(plan)
    if wanted.max_params is not None:
        _check_reachable(plan)
    return plan


def _settings_of_points(settings: Settings, wanted: SweepSettings, folder: Path) -> Settings:
    """Where checkpoints are kept they go where a pruning by itself would put them."""
    return settings if wanted.keep else replace(settings, save_dir=str(folder / CHECKPOINTS))


def held_back_shape(settings: Settings, wanted: SweepSettings) -> tuple[int, int]:
    """The (M, T) of the held-back text, but for windows that turn out to be the calibration set's.

    Raises:
        UsageError: a token file that cannot be read.
    """
    return calibration_shape(wanted.held_back_datasets or settings.datasets, wanted.held_back, settings.seqlen)


def expected_parameters(job: Job) -> int:
    """Parameters that a job leaves of the model: those of its plan, or else of its budget."""
    if job.parameters.planned:
        return job.parameters.planned["total"]
    return job.parameters.before["total"] - round(job.budget.to_remove)


def _check_reachable(plan: SweepPlan) -> None:
    """Raise UsageError if --max_params lies beyond the sparsities that are asked for, or asks for nothing."""
    most, dense = plan.wanted.target.value, plan.jobs[0].parameters.before["total"]
    if most >= dense:
        raise UsageError(f"--max_params {plan.wanted.max_params}: the dense model has no more, {dense:,}")
    if (fewest := expected_parameters(plan.jobs[-1])) > most:
        raise UsageError(
            f"--max_params {plan.wanted.max_params}: the largest --sparsity, {plan.wanted.sparsity[-1]:g}, leaves "
            f"{fewest:,}; give --sparsity that goes further"
        )


def describe_sweep(plan: SweepPlan) -> str:
    """Lines that say what a sweep is going to do: its points, and the memory and the disk that it takes."""
    jobs, wanted = plan.jobs, plan.wanted
    before = jobs[0].parameters.before["total"]
    lines = [f"{'sparsity':>10}  {'parameters':>15}  {'weights':>10}"]
    for sparsity, left, about in [
        (0.0, before, ""),
        *((job.budget.sparsity, expected_parameters(job), "" if job.plan else "about ") for job in jobs),
    ]:
        weights = f"{left * jobs[0].bytes_per_weight / 1e9:.3f} GB"
        lines.append(f"{sparsity or 'dense':>10}  {f'{about}{left:,}':>15}  {weights:>10}")
    lines += [f"note         {note}" for note in dict.fromkeys(note for job in jobs for note in job.notes)]
    if wanted.target:
        lines.append(f"search       {wanted.target.in_words}, to {wanted.tolerance:g}: "
                     f"at most {plan.most_trials} points more")  # fmt: skip
    samples, tokens = held_back_shape(plan.settings, wanted)
    source = wanted.held_back_datasets or f"what is left of {plan.settings.datasets}"
    host = max(job.memory["host_bytes"] for job in jobs)
    devices = [job.memory["device_bytes"] for job in jobs if job.memory["device_bytes"]]
    device = f", device {max(devices) / 1e9:.2f} GB" if devices else ""
    stays = f"{plan.kept_bytes / 1e9:.3f} GB of checkpoints stay" if wanted.keep else "no checkpoint stays"
    return "\n".join([
        *lines,
        f"measured on  {samples} samples of {tokens} tokens from {source}" + (f"; {wanted.tasks}" * bool(wanted.tasks)),
        f"peak memory  host {host / 1e9:.2f} GB{device} (expected) while pruning, about "
        f"{plan.measuring_bytes / 1e9:.2f} GB while measuring",
        f"disk         {plan.disk_bytes / 1e9:.3f} GB at the most; {stays}",
        f"page         {plan.folder / PAGE}",
    ])  # fmt: skip


def command_of(script: str, settings: Settings, **more: Any) -> str:
    """The command of a script with these settings: what is at its default is left out, but for model and recipe.

    Args:
        script: name of the script.
        settings: of the pruning, whose sparsity is left out.
        more: flags beside them, by name; a switch is True.
    """
    plain, flags = Settings(recipe=settings.recipe), {"base_model": settings.base_model, **more}
    flags["recipe"] = settings.recipe
    if settings.datasets != plain.datasets:  # other texts have another number of samples by default
        plain = Settings(recipe=settings.recipe, datasets=settings.datasets)
        flags["datasets"] = settings.datasets
    for f in fields(Settings):
        value = getattr(settings, f.name)
        if f.name not in ("sparsity", "overwrite", "parameters", *flags) and value != getattr(plain, f.name):
            flags[f.name] = value
    words = ["python", script]
    for name, value in (flags | settings.parameters).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def run_sweep(plan: SweepPlan, tell: Callable[[dict], None] = lambda _: None) -> Swept:
    """Do a sweep, or what is left of it: measure the dense model, then every point, then find the target.

    Args:
        plan: of the sweep.
        tell: is given every point of the record, those that were there already first.

    Raises:
        UsageError: memory or disk does not suffice, another sweep is there or at work, or no sparsity meets the target.
    """
    if are_several():
        raise UsageError("a sweep is the work of one process: start it without a launcher")
    checkpoint.check_folder(plan.folder)
    check_room(plan.folder, plan.disk_bytes, "--save_dir", "the sweep")
    with full_precision(), _locked(plan.folder), memory_in_words(memory_advice):
        for job in plan.jobs if plan.wanted.keep else ():  # before anything is measured
            if not finished(job):
                checkpoint.check_place(job.folder, 0, plan.settings.overwrite)
        return _Sweep(plan).run(tell)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep, which goes again where nothing came into it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UsageError(
            f"--save_dir: another sweep is at work on {folder}; wait for its end, or give another --save_dir"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


class _Sweep:
    """A sweep at work."""

    def __init__(self, plan: SweepPlan):
        """Draw the texts, and take up the record that lies in the folder; `plan`'s folder is this process's alone."""
        self._plan, self._settings, self._wanted = plan, plan.settings, plan.wanted
        self._job = plan.jobs[0]
        tokenizer = read_tokenizer(self._job.location)
        calibration = draw_calibration_set(self._settings, tokenizer, self._job.config)
        ids, sources = draw_held_back(plan, tokenizer, calibration)
        windows = TestWindows(HELD_BACK, ids, " + ".join(source["origin"] for source in sources))
        asked = evaluation_settings(plan)
        self._protocol = make_protocol(asked, asked.dtype, [windows])
        self._identity = self._identify(asked, calibration)
        record = _record_at(plan.folder, self._identity, self._settings.overwrite)
        if record is None:
            for left in (plan.folder / CHECKPOINTS, *plan.folder.glob(".*.measures")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            record = {"dense": None, "points": []}
        self.record = {
            "kind": "sweep",
            "date": None,
            "settings": self._settings.flat() | asdict(self._wanted),
            "command": sweep_command(plan),
            "recipe": {"name": self._job.recipe.name, "about": self._job.recipe.about},
            "model": describe_source(self._job.location, self._job.config),
            "calibration": {**vars(calibration), "ids": list(calibration.ids.shape)},
            "held_back": {"sources": sources, "ids": list(ids.shape), "token_hash": hash_tokens(ids)},
            "identity": self._identity,
            "dense": record["dense"],
            "points": record["points"],
            "answer": None,
            "environment": records.environment(self._job.options.device),
        }

    def _identify(self, asked: EvaluationSettings, calibration: CalibrationSet) -> dict:
        """What decides a point: one of another sweep is not taken up."""
        job = self._job
        settings = {name: value for name, value in self._settings.flat().items() if name != "sparsity"}
        decides = identity.of_run(settings, job.location, calibration.token_hash, job.options.device)
        measured = identity.of_evaluation(
            {"tasks": asked.tasks, "limit": asked.limit, "seed": asked.seed},
            {},
            self._protocol.data,
            job.options.device,
        )
        decides |= {f"--{name}": value for name, value in measured["settings"].items()}
        decides |= {f"digest of {name}": value for name, value in measured["data"].items()}
        return json.loads(json.dumps(decides | {"version of the code that measures": measured["code"]}))

    def run(self, tell: Callable[[dict], None]) -> Swept:
        """See `run_sweep`."""
        try:
            if self.record["dense"] is None:
                plan = [dense_shape(layer) for layer in self._job.sizes]
                layers = {"layers": count_by_part(self._job.config, plan)}
                self.record["dense"] = self._measure("dense", self._job.location) | layers
                self._write()
            for job in self._plan.jobs:
                self._point(job, tell)
            self.record["answer"] = self._found(tell)
        except KeyboardInterrupt as stopped:
            if self.record["dense"]:
                done = f"of the sweep the dense model and {len(self.record['points'])} of the points are measured"
                stopped.add_note(f"the same command goes on: {done}")
            raise
        finally:
            if self.record["dense"]:
                self._write()
        self._tidy()
        return Swept(self.record, self._plan.folder / PAGE)

    def _found(self, tell: Callable[[dict], None]) -> dict | None:
        """The sparsity that meets the target, after as many points more as it takes; None where none is sought.

        Raises:
            UsageError: no sparsity meets it.
        """
        target, tolerance = self._wanted.target, self._wanted.tolerance
        if target is None:
            return None
        guess = self._interpolated(target.value) if target.flag == "max_params" else None
        while (trial := next_trial(self._sides(target), tolerance, guess)) is not None:
            settings = _settings_of_points(self._settings, self._wanted, self._plan.folder)
            self._point(prepare(settings, [trial])[0], tell)
        near, far = bracket(self._sides(target))
        sparsity = far if target.flag == "max_params" else near
        ends = {point["sparsity"]: point for point in self.record["points"]}
        if far is None:
            last = self.record["points"][-1]
            raise UsageError(
                f"{target.in_words}: even --sparsity {last['sparsity']:g} leaves "
                f"{last['parameters']['total']:,} parameters and {last['ratio']:.4g} times the dense perplexity; give "
                "--sparsity that goes further"
            )
        if not sparsity:
            raise UsageError(
                f"{target.in_words}: already --sparsity {far:g} has {ends[far]['ratio']:.4g} times the "
                "dense perplexity; give a higher ratio, or a finer --tolerance"
            )
        found = ends[sparsity]
        return {
            "flag": target.flag,
            "limit": target.value,
            "tolerance": tolerance,
            **{name: found[name] for name in ("sparsity", "ratio", "ratio_error", "parameters", "command")},
        }

    def _interpolated(self, most: float) -> float | None:
        """The sparsity that leaves so many parameters, by the points that were asked for: they lie nearly on a line.

        Not the budget's: what a recipe leaves may be more, such as its corrections. None where no point leaves so few.
        """
        left = {p["sparsity"]: p["parameters"]["total"] for p in self.record["points"]}
        curve = [(0.0, self.record["dense"]["parameters"]["total"]), *((s, left[s]) for s in self._wanted.sparsity)]
        for (near, more), (far, fewer) in zip(curve[:-1], curve[1:], strict=True):
            if more > most >= fewer:
                return near + (far - near) * (more - most) / (more - fewer)
        return None

    def _sides(self, target: Target) -> dict[float, bool]:
        points = self.record["points"]
        return {p["sparsity"]: target.is_beyond(p["ratio"], p["parameters"]["total"]) for p in points}

    def _point(self, job: Job, tell: Callable[[dict], None]) -> None:
        """Prune to a sparsity and measure what comes of it, unless the record has it."""
        sparsity = job.settings.sparsity
        point = next((point for point in self.record["points"] if point["sparsity"] == sparsity), None)
        if point is None:
            done = finished(job) or run(job)
            measured = self._measure(f"{sparsity:g}", locate(str(done.folder), "--save_dir"))
            compared = compare(measured, self.record["dense"])
            row = compared["perplexity"][HELD_BACK]
            error = row["standard_error"]
            point = {
                "sparsity": sparsity,
                "command": command_of("model_pruning.py", self._settings, sparsity=f"{sparsity:g}"),
                "measured_sparsity": done.record["measured_sparsity"],
                "measured_sparsity_of_layers": done.record["measured_sparsity_of_layers"],
                "ratio": row["ratio"],
                "ratio_error": None if error is None else row["ratio"] * error,
                **measured,
                "to_dense": compared,
                "plan": [shape.to_dict() for shape in done.plan],
                "layers": count_by_part(job.config, done.plan),
                "damage": done.record["damage"],
                "pruning_seconds": sum(records.seconds_of_stages(done.record).values()),
            }
            self.record["points"] = sorted([*self.record["points"], point], key=lambda point: point["sparsity"])
            self._write()
            if not self._wanted.keep:
                shutil.rmtree(done.folder)
        elif self._wanted.keep and not finished(job):  # measured when checkpoints were not kept
            run(job)
        tell(point)

    def _measure(self, name: str, location: Location) -> dict:
        """Sizes, perplexity and scores of a model; what a stopped sweep had measured of it is taken up."""
        stages = records.Stages(self._job.options.device)
        measures = Measures(self._plan.folder, name, self._identity, stages, ALONE)
        result = measure(prepare_subject(name, location, self._protocol), self._protocol, measures, stages, ALONE)
        measures.forget()
        del result["model"]  # a place that is left soon
        return result | {"measuring_seconds": 60 * sum(stage["minutes"] for stage in stages.rows.values())}

    def _write(self) -> None:
        self.record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        records.write_record(self._plan.folder / RECORD, self.record)
        records.write_text(self._plan.folder / PAGE, page(self.record))

    def _tidy(self) -> None:
        """Remove checkpoints that a stopped sweep had measured and not removed yet, and what one was killed writing."""
        shutil.rmtree(self._plan.folder / CHECKPOINTS, ignore_errors=True)
        for name in (RECORD, PAGE):
            for left in self._plan.folder.glob(f".{name}.*.partial"):
                left.unlink()


def sweep_command(plan: SweepPlan) -> str:
    """The command of a sweep."""
    plain = SweepSettings()
    asked = {name: value for name, value in asdict(plan.wanted).items() if value != getattr(plain, name)}
    asked["sparsity"] = ",".join(f"{sparsity:g}" for sparsity in plan.wanted.sparsity)
    return command_of("model_sweep.py", plan.settings, **asked)


def draw_held_back(plan: SweepPlan, tokenizer, calibration: CalibrationSet) -> tuple[Tensor, list[dict]]:
    """Windows (M, T) that no calibration window is among, from other rows, and where they come from.

    Raises:
        UsageError: there are none, or too few rows.
    """
    settings, wanted, config = plan.settings, plan.wanted, plan.jobs[0].config
    if wanted.held_back_datasets is not None:
        other = replace(settings, datasets=wanted.held_back_datasets, num_samples=wanted.held_back)
        flag = f"--held_back_datasets {wanted.held_back_datasets}"
    else:
        other = replace(settings, num_samples=settings.num_samples + wanted.held_back)
        flag = f"--held_back {wanted.held_back}, which goes on top of --num_samples"
    try:
        drawn = draw_calibration_set(other, tokenizer, config)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from error
    ids = without(drawn.ids, calibration.ids) if wanted.held_back_datasets else held_back(drawn, calibration)
    if not len(ids):
        raise UsageError(f"{flag}: all of its samples are in the calibration set; give other text")
    return ids, drawn.sources


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


def _record_at(folder: Path, wanted: dict, overwrite: bool) -> dict | None:
    """The record of a sweep in a folder; None where there is none, or one that is to be replaced.

    Raises:
        UsageError: it is that of another sweep, and is not to be replaced.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        before = record["identity"]
        record["dense"], record["points"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if overwrite:
            return None
        raise UsageError(f"--save_dir: {path} is no record of a sweep; give --overwrite to replace it") from error
    other = [name for name in before | wanted if before.get(name) != wanted.get(name)]
    if not other:
        return record
    if overwrite:
        return None
    raise UsageError(
        f"--save_dir: the sweep in {folder} was made with another {other[0]} ({before.get(other[0])}, now "
        f"{wanted.get(other[0])}); give --overwrite to replace it, or another --save_dir"
    )
