"""How long a pruning takes, from what the stages of another one took on the same kind of device.

What a stage takes grows with one of six amounts, so that its seconds are multiplied by the ratio of the two prunings'
amounts:

    tokens      tokens x parameters of the layers: sending the text through, and the sums of what the layers see
    solves      layers x (parameters of a layer)^1.5, the cube of its width: decompositions and regressions
    read        the same as tokens, of the text that a survey reads
    variants    the same as tokens, of what the variants of a survey go through
    logits      variants x the tokens at which they are compared x parameters beside the layers
    files       parameters of the model: reading and writing

The records are those of benchmarks/pruning_speed.py, which names the stages.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean

from .methods.recipe import TravellingSurvey
from .methods.recipes import RECIPES
from .sources.weights import DTYPES
from .terminal import named_device

KIND = "pruning speed"
# What the time of a stage grows with.
STAGES = {
    "embed": "tokens",
    "survey: dense layers, sums": "read",
    "survey: regressions": "solves",
    "survey: errors by size": "solves",
    "survey: variants on their way": "variants",
    "survey: variants compared": "logits",
    "prune: dense layers, sums": "tokens",
    "prune: query, key": "solves",
    "prune: value, output": "solves",
    "prune: MLP, correction": "solves",
    "prune: pruned layers": "tokens",
    "all else: reading, writing, waiting": "files",
}


@dataclass(frozen=True)
class Pruning:
    """What decides how long a pruning takes.

    Attributes:
        device: its name; that of a CPU does not say which one it is.
        recipe: the method, with its own parameters.
        itemsize: bytes of a weight.
        layers: decoder layers.
        of_layers: their parameters.
        total: all parameters of the model.
        ids_shape: (N, T) of the calibration set.
    """

    device: str
    recipe: str
    itemsize: int
    layers: int
    of_layers: int
    total: int
    ids_shape: tuple[int, int]

    @property
    def layer(self) -> float:
        """Parameters of a layer."""
        return self.of_layers / self.layers

    @property
    def amounts(self) -> dict[str, float]:
        """What the stages' times grow with, by name; those that the recipe has."""
        recipe, (samples, tokens) = RECIPES[self.recipe], self.ids_shape
        found = {
            "tokens": self.of_layers * samples * tokens,
            "solves": self.layers * self.layer**1.5,
            "files": self.total,
        }
        survey = recipe.method(recipe.parameters()).survey
        found["read"] = self.of_layers * (survey.reads(samples) if survey else 0) * tokens
        if isinstance(survey, TravellingSurvey):
            groups = survey.groups(self.layers)
            seen = survey.most_variants * survey.samples(samples) * tokens
            entered = sum(self.layers - group.start for group in groups)  # layers, by the variants of all groups
            found["variants"] = entered * self.layer * seen
            found["logits"] = len(groups) * seen / survey.stride * (self.total - self.of_layers)
        return found

    def is_alike(self, other: "Pruning") -> bool:
        """Whether one's time says something of the other's."""
        return (self.device, self.recipe, self.itemsize) == (other.device, other.recipe, other.itemsize)

    def unlike(self, other: "Pruning") -> tuple[float, float]:
        """How far the sizes are from each other: of a layer, and then of the model."""
        return abs(log(self.layer / other.layer)), abs(log(self.of_layers / other.of_layers))


@dataclass(frozen=True)
class Timed:
    """A pruning that was timed.

    Attributes:
        pruning: what it was.
        seconds: of the stages, by their names.
        dense_pass: seconds of one forward of the calibration set through the dense layers.
        source: the record's file, in the folder of the records.
    """

    pruning: Pruning
    seconds: dict[str, float]
    dense_pass: float
    source: str

    @property
    def total(self) -> float:
        """Seconds of survey, cut and writing."""
        return sum(self.seconds.values())

    def scaled(self, asked: Pruning) -> float:
        """Seconds that another pruning, alike but for its sizes, is expected to take."""
        here, there = self.pruning.amounts, asked.amounts
        return sum(
            seconds * there[STAGES[name]] / here[STAGES[name]] for name, seconds in self.seconds.items() if seconds
        )


def read_timed(folder: Path, layers: Mapping[str, int] | None = None) -> list[Timed]:
    """The prunings whose times are recorded anywhere in a folder; none where there is no such folder.

    Args:
        folder: of the records.
        layers: how many decoder layers the models of old records have, which do not say so, by their files. Those of
            which it is not known either are left out.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        # A folder of records is the user's own too: what cannot be read there says nothing.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            record = json.loads(path.read_text(encoding="utf-8"))
            source = path.relative_to(folder).as_posix()
            if record["kind"] == KIND and (pruning := _pruning_of(record, (layers or {}).get(source))):
                seconds = {name: stage["seconds"] for name, stage in record["stages"].items() if name in STAGES}
                found.append(Timed(pruning, seconds, fmean(record["dense_pass_seconds"]), source))
    return found


def _pruning_of(record: dict, layers: int | None) -> Pruning | None:
    """What a record is of, a model of `layers` where it does not say so; None where that is not known."""
    settings, parameters, machine = record["settings"], record["parameters"], record["environment"]
    # Old records have the flags alone.
    layers = record.get("layers", settings["layers"] or layers)
    drawn = [settings["num_samples"], settings["seqlen"]]
    if layers is None:
        return None
    return Pruning(
        device=named_device(machine["device"], machine["cpu_threads"]),
        recipe=settings["recipe"],
        itemsize=DTYPES[settings["dtype"]].itemsize,
        layers=layers,
        of_layers=parameters["decoder_layers_before"],
        total=parameters["before"],
        ids_shape=tuple(record.get("calibration", drawn)),
    )


def nearest(asked: Pruning, timed: Iterable[Timed]) -> Timed | None:
    """The one of timed prunings, alike but for its sizes, whose sizes are nearest; None where there is none."""
    alike = [other for other in timed if asked.is_alike(other.pruning)]
    return min(alike, key=lambda other: asked.unlike(other.pruning), default=None)
