"""A sweep over the sparsity: prune to several, measure each beside the dense model, and write a record and a page.

A folder LABEL_sweep under --save_dir has

    sweep.json     the record: all points so far, from which the same command goes on
    sweep.html     the page, written anew after every point
    checkpoints/   those of the points at work, unless checkpoints are kept

Several processes take as many points at a time, each of which one prunes and measures by itself; the first one writes
record and page. So a point has the same bits whatever their number, and another number of them may go on.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checks import as_kind, check_room, refuse_twice
from ..command_line import memory_advice
from ..errors import UsageError, memory_in_words
from ..evaluation.evaluate import make_protocol
from ..evaluation.measures import Measures, measure
from ..evaluation.paired import compare
from ..evaluation.subject import TestWindows
from ..evaluation.subject import prepare as prepare_subject
from ..jobs import Job
from ..machine import full_precision, pick_device
from ..model.skeleton import count_by_part
from ..outputs import checkpoint, records
from ..outputs.locks import locked
from ..processes import ALONE, Processes, working_together
from ..progress_bar import no_bars
from ..report.sweep_page import page
from ..run import draw_calibration_set, finished, run
from ..settings import Settings
from ..sources.calibration_set import CalibrationSet, hash_tokens
from ..sources.configuration import describe_source
from ..sources.locate import Location, locate
from ..sources.tokenizers import read_tokenizer
from .bisection import Target, bracket, next_trial
from .commands import command_of, sweep_command
from .held_back_text import draw_held_back
from .plan import CHECKPOINTS, PAGE, RECORD, SweepPlan, evaluation_settings, jobs_of_points, plan_sweep
from .record import identity_of, read_record

LOCK = ".sweep.lock"
# What the held-back windows are called beside the texts of other evaluations.
HELD_BACK = "held-back text"


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

    The processes of an initialised process group (torch.distributed) all call it, and share the points.

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
    refuse_twice("base_model", "sweep", settings)
    given = {"base_model": as_kind("base_model", model, str)} | settings
    with working_together(pick_device(given.get("device", Settings.device))) as processes:
        return run_sweep(plan_sweep(given, processes), processes=processes)


def run_sweep(plan: SweepPlan, tell: Callable[[dict], None] = lambda _: None, processes: Processes = ALONE) -> Swept:
    """Do a sweep, or what is left of it: measure the dense model and every point, then find the target.

    Args:
        plan: of the sweep.
        tell: is given every point of the record, those that were there already first.
        processes: that share the points.

    Raises:
        UsageError: memory or disk does not suffice, another sweep is there or at work, or no sparsity meets the target.
    """
    with ExitStack() as stack:

        def begin() -> None:
            checkpoint.check_folder(plan.folder)
            check_room(plan.folder, plan.disk_bytes(processes.count), "--save_dir", "the sweep")
            stack.enter_context(locked(plan.folder / LOCK, partial(_refuse, plan.folder)))
            for job in plan.jobs if plan.wanted.keep else ():  # before anything is measured
                if not finished(job):
                    checkpoint.check_place(job.folder, 0, plan.settings.overwrite)

        processes.on_main(begin)
        stack.enter_context(full_precision())
        stack.enter_context(memory_in_words(memory_advice))
        return _Sweep(plan, processes).run(tell)


def _refuse(folder: Path) -> None:
    raise UsageError(f"--save_dir: another sweep is at work on {folder}; wait for its end, or give another --save_dir")


class _Sweep:
    """A sweep at work, in one of its processes; all of them have the same record, and the main one writes it."""

    def __init__(self, plan: SweepPlan, processes: Processes):
        """Draw the texts, and take up the record that lies in the folder, which is these processes' alone."""
        self._plan, self._settings, self._wanted = plan, plan.settings, plan.wanted
        self._processes, self._job = processes, plan.jobs[0]
        tokenizer = read_tokenizer(self._job.location)

        def draw() -> tuple[CalibrationSet, Tensor, list[dict]]:
            calibration = draw_calibration_set(self._settings, tokenizer, self._job.config)
            return calibration, *draw_held_back(plan, tokenizer, calibration)

        calibration, ids, sources = processes.on_main(draw)
        windows = TestWindows(HELD_BACK, ids, " + ".join(source["origin"] for source in sources))
        asked = evaluation_settings(plan)
        self._protocol = make_protocol(asked, asked.dtype, [windows])
        self._identity = processes.on_main(lambda: identity_of(plan, asked, self._protocol, calibration))
        record = processes.on_main(self._taken_up)
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

    def _taken_up(self) -> dict:
        """What the record in the folder says of the models; without one, what a sweep left there goes."""
        record = read_record(self._plan.folder, self._identity, self._settings.overwrite)
        if record is None:
            for left in (self._plan.folder / CHECKPOINTS, *self._plan.folder.glob(".*.measures")):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        return record or {"dense": None, "points": []}

    def run(self, tell: Callable[[dict], None]) -> Swept:
        """See `run_sweep`."""
        try:
            if self._processes.is_main:  # so that what is stopped before a model is measured is taken up too
                records.write_record(self._plan.folder / RECORD, self.record)
            for point in self.record["points"]:
                tell(point)
            there = {point["sparsity"] for point in self.record["points"]}
            jobs, count = self._plan.jobs, self._processes.count
            # One looks for all: another would see what is made meanwhile.
            is_missing = self._processes.on_main(lambda: [self._is_missing(job) for job in jobs])
            dense = [] if self.record["dense"] else [None]
            missing = [*dense, *compress(jobs, is_missing)]
            for first in range(0, len(missing), count):
                self._round(missing[first : first + count])
                for job in missing[first : first + count]:
                    if job and job.settings.sparsity not in there:
                        tell(self._recorded(job))
            self.record["answer"] = self._found(tell)
        except KeyboardInterrupt as stopped:
            if self.record["dense"]:
                done = f"of the sweep the dense model and {len(self.record['points'])} of the points are measured"
                stopped.add_note(f"the same command goes on: {done}")
            raise
        finally:
            self._write()
        self._processes.all_of(None)  # each has removed its own
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
            sought = jobs_of_points(self._settings, self._wanted, self._plan.folder, [trial], self._processes)
            self._round(sought)
            tell(self._recorded(sought[0]))
        near, far = bracket(self._sides(target))
        sparsity = far if target.flag == "max_params" else near
        ends = {point["sparsity"]: point for point in self.record["points"]}
        if far is None:
            last = self.record["points"][-1]
            raise UsageError(
                f"{target.text}: even --sparsity {last['sparsity']:g} leaves "
                f"{last['parameters']['total']:,} parameters and {last['ratio']:.4g} times the dense perplexity; give "
                "--sparsity that goes further"
            )
        if not sparsity:
            raise UsageError(
                f"{target.text}: already --sparsity {far:g} has {ends[far]['ratio']:.4g} times the "
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

    def _recorded(self, job: Job) -> dict | None:
        sparsity = job.settings.sparsity
        return next((point for point in self.record["points"] if point["sparsity"] == sparsity), None)

    def _is_missing(self, job: Job) -> bool:
        """Whether there is something to do for a point: it may have been measured when checkpoints were not kept."""
        return not self._recorded(job) or (self._wanted.keep and not finished(job))

    def _round(self, jobs: Sequence[Job | None]) -> None:
        """Have the points of some jobs in the record, no more than there are processes; None: the dense model.

        What the others have made is recorded before a process that has failed says so.
        """
        index, made, failure = self._processes.index, None, None
        try:
            with nullcontext() if self._processes.is_main else no_bars():
                made = self._made(jobs[index]) if index < len(jobs) else None
        except UsageError as error:
            failure = error
        for job, found in zip(jobs, self._processes.all_of(made), strict=False):
            if found:
                self._record(job, found)
        if failure:
            raise failure
        self._processes.all_of(None)  # all is recorded, and nobody has failed
        if index < len(jobs):
            name, job = _name(jobs[index]), jobs[index]
            Measures.remove(self._plan.folder, name)
            if job and not self._wanted.keep:
                shutil.rmtree(job.folder)

    def _record(self, job: Job | None, found: dict) -> None:
        """Have what was found of a point, or of the dense model, in the record."""
        if job is None:
            self.record["dense"] = found
        elif self.record["dense"]:
            points = [*self.record["points"], found | self._beside_dense(found)]
            self.record["points"] = sorted(points, key=lambda point: point["sparsity"])
        self._write()

    def _made(self, job: Job | None) -> dict | None:
        """Prune to a sparsity, and measure what comes of it, or the dense model; None where the record has it."""
        if job is None:
            plan = [layer.dense_shape for layer in self._job.sizes]
            return self._measure(None, self._job.location) | {"layers": count_by_part(self._job.config, plan)}
        done = finished(job) or run(job)
        if self._recorded(job):
            return None
        return {
            "sparsity": job.settings.sparsity,
            "command": command_of("model_pruning.py", self._settings, sparsity=f"{job.settings.sparsity:g}"),
            "measured_sparsity": done.record["measured_sparsity"],
            "measured_sparsity_of_layers": done.record["measured_sparsity_of_layers"],
            **self._measure(job, locate(str(done.folder), "--save_dir")),
            "plan": [shape.to_dict() for shape in done.plan],
            "layers": count_by_part(job.config, done.plan),
            "damage": done.record["damage"],
            "pruning_seconds": sum(records.seconds_of_stages(done.record).values()),
        }

    def _beside_dense(self, point: dict) -> dict:
        """How a point compares with the dense model."""
        compared = compare(point, self.record["dense"])
        row = compared["perplexity"][HELD_BACK]
        error = row["standard_error"]
        return {
            "ratio": row["ratio"],
            "ratio_error": None if error is None else row["ratio"] * error,
            "to_dense": compared,
        }

    def _measure(self, job: Job | None, location: Location) -> dict:
        """Sizes, perplexity and scores of a model; what a stopped sweep had measured of it is taken up."""
        stages, name = records.Stages(self._job.options.device), _name(job)
        measures = Measures(self._plan.folder, name, self._identity, stages, ALONE)
        result = measure(prepare_subject(name, location, self._protocol), self._protocol, measures, stages, ALONE)
        del result["model"]  # a place that is left soon
        return result | {"measuring_seconds": 60 * sum(stage["minutes"] for stage in stages.rows.values())}

    def _write(self) -> None:
        if not (self._processes.is_main and self.record["dense"]):
            return
        self.record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        records.write_record(self._plan.folder / RECORD, self.record)
        records.write_text(self._plan.folder / PAGE, page(self.record))

    def _tidy(self) -> None:
        """Remove what a stopped sweep had recorded and not removed yet, and what it was killed writing."""
        shutil.rmtree(self._plan.folder / CHECKPOINTS, ignore_errors=True)
        for pattern in (".*.measures", f".{RECORD}.*.partial", f".{PAGE}.*.partial"):
            for left in self._plan.folder.glob(pattern):
                left.unlink(missing_ok=True)  # another process may have


def _name(job: Job | None) -> str:
    """What measures of a point, or of the dense model, are called on disk."""
    return f"{job.settings.sparsity:g}" if job else "dense"
