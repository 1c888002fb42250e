"""Methods beside each other: tables for each mix of calibration texts.

The runs are those of scripts/methods.sh: `methods/dense`, or `methods/MIX/dense` where a mix has one of its own,
`methods/MIX/...` and, where tasks were scored, the same below `tasks`; where decoding was timed, its records lie beside
the runs.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..evaluation.paired import compare
from ..outputs.names import RECIPES_OWN, recipe_in_words
from ..terminal import named_device
from .runs import Results, Run, drawn_by, on_times, protocol, text_name
from .tables import Measured, markdown, mean_accuracy, percent, perplexity

FOLDER = "methods"
# What others are measured by: the better of these, at the same size and with the same text.
FOUNDING = ("olica", "olica-grouped")
# Two models are of one size when their parameters differ by less than this share.
ALIKE = 0.005
# What is said of the mixes that scripts name, beside their texts; of others their names.
MIXES = {"paper": "", "web": "", "of_model": ", shares of the whole model", "dial": ", other repairs"}
# What is done with what stays, in words.
REPAIRS = {RECIPES_OWN: "own repair", "none": "none", "least-squares": "least squares"}


@dataclass(frozen=True)
class Point:
    """A recipe at a sparsity, with one text: the runs of all seeds.

    Attributes:
        runs: by seed, ascending.
        scored: those of which the tasks were scored.
        ratios: by text, of every seed: the logarithm of the ratio of its perplexity to the dense one, its paired
            error and the ratio; of the texts that were measured by the same windows.
    """

    runs: list[Run]
    scored: list[Run]
    ratios: dict[str, list[dict]]

    @property
    def recipe(self) -> str:
        """Its name."""
        return self.runs[0].recipe

    @property
    def size(self) -> tuple[float, str]:
        """The sparsity that was asked for, and of what."""
        settings = self.runs[0].pruning["settings"]
        return settings["sparsity"], settings["sparsity_of"]

    @property
    def parameters(self) -> int:
        """Of the whole pruned model."""
        return self.runs[0].pruning["parameters"]["after"]

    @property
    def layers_left(self) -> float:
        """Share of the decoder layers' parameters that are left."""
        return 1 - self.runs[0].pruning["measured_sparsity_of_layers"]

    def is_alike(self, other: "Point") -> bool:
        """Whether both are of about one size."""
        return abs(self.parameters / other.parameters - 1) < ALIKE

    def gap(self, text: str) -> float | None:
        """Mean logarithm of the `ratios` over the seeds; None where there are none."""
        rows = self.ratios.get(text)
        return sum(row["difference"] for row in rows) / len(rows) if rows else None


@dataclass(frozen=True)
class Mix:
    """All points of one mix of calibration texts, beside the dense model.

    Attributes:
        name: of the mix.
        dense: the dense model, and with scores of the tasks where there are some.
        timed: records of decoding, the dense model and pruned ones in one process each.
    """

    name: str
    points: list[Point]
    dense: Run
    dense_scored: Run | None
    timed: list[dict]

    @cached_property
    def decoding(self) -> dict[tuple[str, ...], float]:
        """The time of a token as a share of the dense model's, by the last two parts of a checkpoint's path."""
        models = (row for record in self.timed for row in record["models"].items())
        return {Path(name).parts[-2:]: row["decode"]["ratio"] for name, row in models}

    @property
    def words(self) -> str:
        """What is said of it."""
        sources = (run.pruning["calibration"]["sources"] for point in self.points for run in point.runs)
        texts = dict.fromkeys(" + ".join(text_name(source["name"]) for source in of_run) for of_run in sources)
        return f"calibrated on {' or '.join(texts)}{MIXES.get(self.name, f' ({self.name})')}"

    @cached_property
    def texts(self) -> list[str]:
        """The corpora that were measured."""
        return list(self.dense.result["perplexity"])

    def is_best(self, point: Point, text: str) -> bool:
        """Whether none of its size has a lower perplexity, and some have one."""
        gaps = [gap for other in self.points if _size(other) == _size(point) and (gap := other.gap(text)) is not None]
        return len(gaps) > 1 and point.gap(text) == min(gaps)

    def share(self, point: Point, text: str) -> float | None:
        """Its gap as a share of that of the better founding recipe, each the mean over its seeds; None without one.

        Of the founding recipes' points of about its size, each recipe's nearest counts.
        """
        gaps = []
        for recipe in FOUNDING:
            near = [other for other in self.points if other.recipe == recipe and other.is_alike(point)]
            nearest = min(near, key=lambda other: abs(other.parameters - point.parameters), default=None)
            if nearest and (gap := nearest.gap(text)) is not None:
                gaps.append(gap)
        ours = point.gap(text)
        return ours / min(gaps) if gaps and ours is not None and min(gaps) > 0 else None


def mixes(results: Results) -> list[Mix]:
    """The mixes of which runs are recorded, in order of their names."""
    root, found = results.folder / FOLDER, []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        dense = results.run(f"{FOLDER}/{folder.name}/dense") or results.run(f"{FOLDER}/dense")
        runs = [run for run in results.runs(f"{FOLDER}/{folder.name}") if run.pruning]
        if not runs or dense is None or folder.name == "tasks":
            continue
        scored = {run.folder.name: run for run in results.runs(f"{FOLDER}/{folder.name}/tasks")}
        grouped: dict[tuple, list[Run]] = {}
        for run in sorted(runs, key=lambda run: (run.sparsity, run.pruning["settings"]["seed"])):
            settings = run.pruning["settings"]
            grouped.setdefault((settings["sparsity_of"], run.sparsity, run.recipe), []).append(run)
        points = [
            Point(alike, [scored[run.folder.name] for run in alike if run.folder.name in scored], _ratios(alike, dense))
            for alike in grouped.values()
        ]
        points.sort(key=lambda point: (_size(point), _gap_of_the_first(point), point.recipe, -point.size[0]))
        timed = [
            json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("generation_speed_*.json"))
        ]
        of_tasks = results.run(f"{FOLDER}/{folder.name}/tasks/dense") or results.run(f"{FOLDER}/tasks/dense")
        found.append(Mix(folder.name, points, dense, of_tasks, timed))
    return found


def _size(point: Point) -> tuple[str, float]:
    """Of what and how much was asked for, to a hundredth: such points stand together in a table."""
    sparsity, of = point.size
    return of, round(sparsity, 2)


def _gap_of_the_first(point: Point) -> float:
    """The gap on the first text, by which points of one size are in order."""
    return next(map(point.gap, point.ratios), math.inf)


def _ratios(runs: list[Run], dense: Run) -> dict[str, list[dict]]:
    """See `Point`."""
    found: dict[str, list[dict]] = {}
    for run in runs:
        for text, row in compare(run.result, dense.result)["perplexity"].items():
            found.setdefault(text, []).append(row)
    return found


def tables(results: Results) -> str | None:
    """Tables for each mix; None where nothing is recorded."""
    made = [make(mix) for mix in mixes(results) for make in (_quality, _shares, _costs, _repairs)]
    return "\n\n".join(filter(None, made)) or None


def _quality(mix: Mix) -> str:
    """Perplexity on every text and accuracy on the tasks, and how all of it was made."""
    has_scores = any(point.scored for point in mix.points)
    header = ["removed", "recipe", "parameters", *map(text_name, mix.texts)]
    header += ["mean accuracy, %", "to dense"] if has_scores else []
    measured = [str(perplexity(mix.dense, text)) for text in mix.texts]
    scores = [str(mean_accuracy(mix.dense_scored)) if mix.dense_scored else "", ""]
    rows = [["0%", "dense", f"{mix.dense.result['parameters']['total']:,}", *measured, *scores[: 2 * has_scores]]]
    for point in mix.points:
        ratios = [_ratio(point, text) for text in mix.texts]
        cells = [
            f"**{ratio}**" if ratio and mix.is_best(point, text) else ratio
            for ratio, text in zip(ratios, mix.texts, strict=True)
        ]
        names = [asked(point.size), point.recipe, f"{point.parameters:,}"]
        rows.append([*names, *cells, *(_scores(mix, point) if has_scores else [])])
    runs = {_name(point, run): run for point in mix.points for run in point.runs}
    about = (
        "Dense: perplexity. Others: its ratio to the dense model's, with the paired error; of several seeds of the "
        "calibration set the geometric mean, then the least and the greatest. The best of each size is in bold."
    )
    notes = protocol({"dense": mix.dense} | runs, drawn_by)
    return markdown(f"Methods beside each other, {mix.words}", header, rows, notes, about)


def _shares(mix: Mix) -> str | None:
    """The gap of each point to the dense model beside that of the founding recipes; None without these."""
    others = [point for point in mix.points if point.recipe not in FOUNDING]
    found = [(point, [mix.share(point, text) for text in mix.texts]) for point in others]
    rows = [
        [asked(point.size), point.recipe, *("" if share is None else f"{share:.2f}" for share in shares)]
        for point, shares in found
        if any(share is not None for share in shares)
    ]
    if not rows:
        return None
    about = (
        "The logarithm of a ratio above, as a share of that of the better of `olica` and `olica-grouped`, with the "
        f"same text and, within {ALIKE:.1%}, the same size: the lower, the better, and 1 is no gain. (The corrections "
        "of these two come on top of the size that was asked for.)"
    )
    return markdown(
        f"Share of Olica's gap, {mix.words}", ["removed", "recipe", *map(text_name, mix.texts)], rows, [], about
    )


def _costs(mix: Mix) -> str:
    """What each pruning took, and what decoding takes where it was timed."""
    header = ["removed", "recipe", "layers' parameters kept", "pruned on", "minutes", "peak memory, GB"]
    header += ["decoding"] if mix.decoding else []
    rows = []
    for point in mix.points:
        first, made = point.runs[0], point.runs[0].pruning["environment"]
        device = named_device(made["device"], made["cpu_threads"])
        took = [device, f"{first.seconds / 60:.1f}", f"{first.peak_bytes / 1e9:.2f}"]
        if mix.decoding:
            ratio = mix.decoding.get(Path(first.evaluation["settings"].get("checkpoint") or "").parts[-2:])
            took.append("" if ratio is None else f"{ratio:.2f}")
        rows.append([asked(point.size), point.recipe, f"{point.layers_left:.1%}", *took])
    notes = on_times({_name(point, point.runs[0]): point.runs[0] for point in mix.points})
    notes += dict.fromkeys(map(_timing, mix.timed))
    about = (
        "Of the first seed. Memory is the device's where there is one. Times of different machines say nothing about "
        "the recipes, and on CPUs other work ran beside most of them: "
        "[what pruning takes](docs/measurements.md#what-pruning-takes) was measured alone."
    )
    return markdown(f"Cost, {mix.words}", header, rows, notes, about)


def _name(point: Point, run: Run) -> str:
    """What notes call a run."""
    seed = run.pruning["settings"]["seed"]
    return f"{point.recipe} {percent(point.size[0])}{f' (seed {seed})' if seed else ''}"


def _timing(record: dict) -> str:
    """How decoding was timed, by its record."""
    settings, machine = record["settings"], record["environment"]
    return (
        "Decoding: the time of a token as a share of the dense model's, one sequence at a time, all models in turns in "
        f"one process; {settings['prompt_tokens']} tokens continued by {settings['new_tokens']}, medians of "
        f"{settings['repeats']} rounds, {settings['dtype']}, {machine['device']}, {machine['cpu_threads']} threads, "
        f"commit {machine['git_commit']}."
    )


def _repairs(mix: Mix) -> str | None:
    """Each recipe's choice with its own repair, with none and with least squares; None where no dial was turned."""
    found: dict[tuple, dict[str, Point]] = {}
    for point in mix.points:
        settings = point.runs[0].pruning["settings"]
        recipe = recipe_in_words(settings, dials=("layout",))
        found.setdefault((point.size, recipe), {})[settings.get("refit", RECIPES_OWN)] = point
    turned = {key: points for key, points in found.items() if len(points) > 1}
    if not turned:
        return None
    header = ["removed", "choice", *(f"{text_name(text)}, {name}" for text in mix.texts for name in REPAIRS.values())]
    rows = [
        [asked(size), recipe]
        + [_ratio(points[repair], text) if repair in points else "" for text in mix.texts for repair in REPAIRS]
        for (size, recipe), points in turned.items()
    ]
    about = (
        "The same choice of what stays, at the same number of parameters, and then what the recipe does with it, "
        "nothing, or the refit of `olica-plus`. Figures are those of the first table."
    )
    return markdown(f"Choice and repair, {mix.words}", header, rows, [], about)


def asked(size: tuple[float, str]) -> str:
    """The sparsity that was asked for, in words."""
    sparsity, of = size
    share = percent(sparsity)
    return share if of == "model" else f"{share} of the layers"


def _ratio(point: Point, text: str) -> str:
    """See `ratio_in_words`; empty where the text was not measured by the same windows."""
    return "" if point.gap(text) is None else ratio_in_words(point.ratios[text])


def ratio_in_words(rows: list[dict]) -> str:
    """A ratio to the dense model and its paired error; of several seeds the geometric mean, the least and the greatest.

    Args:
        rows: of every seed, as `Point.ratios` has them.
    """
    ratio = math.exp(sum(row["difference"] for row in rows) / len(rows))
    errors = [row["standard_error"] for row in rows]
    error = None if None in errors else ratio * max(errors)
    spread = f", {min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}"
    return f"{Measured(ratio, error)}{spread if len(rows) > 1 else ''}"


def _scores(mix: Mix, point: Point) -> list[str]:
    """Mean accuracy of the first seed that was scored, and its paired difference to the dense model's."""
    if not point.scored:
        return ["", ""]
    run = point.scored[0]
    difference = compare(run.result, mix.dense_scored.result).get("paper_rule") if mix.dense_scored else None
    paired = Measured(difference["difference"], difference["standard_error"], sign="+") if difference else ""
    return [str(mean_accuracy(run)), str(paired)]
