"""Write docs/sizing.md: what pruning takes in time, memory and disk, by the size of the model and of the card.

python scripts/write_sizing.py
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from textwrap import fill

import torch

from olica.described import as_timed
from olica.duration import KIND, Pruning, Timed, nearest, read_timed
from olica.jobs import Job, prepare
from olica.machine import BatchSize
from olica.pruning.memory import USABLE, Task, fit_into, peaks_beside, survey_disk_bytes
from olica.pruning.options import PruningOptions
from olica.settings import settings_of
from olica.sweeping.plan import expected_parameters
from olica.terminal import time_in_words, two_digits

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "sizing.md", ROOT / "results"
# Where the shapes are.
BENCHMARK = run_path(str(ROOT / "benchmarks" / "pruning_speed.py"))
MODELS = {
    "llama3.2-1b": "Llama-3.2-1B",
    "llama3.2-3b": "Llama-3.2-3B",
    "7b": "LLaMA-7B",
    "llama3-8b": "Llama-3-8B",
    "qwen3-8b": "Qwen3-8B",
    "13b": "LLaMA-13B",
    "30b": "LLaMA-30B",
    "llama3-70b": "Llama-3-70B",
}
RECIPES = ("olica", "olica-plus")
CARDS = (16, 24, 80)
DTYPE, SPARSITY = torch.bfloat16, 0.2
# Bytes that a process holds before it reads a weight: on two CPU cores (docs/measurements.md), and beside an H200, what
# the expected peaks in results/gpu/smollm2/ leave when the weights are taken off.
RESIDENT = {"cpu": 480_000_000, "cuda": 1_480_000_000}
# Of records that do not say how many decoder layers their model has.
LAYERS = {"smollm2/pruning_speed.json": 30}
# Expected and measured may differ by so much of what was measured before a row is marked.
TOLERANCE = 0.25
NOT_RUN = "not run"
# The model by which flags are explained.
EXAMPLE = "Llama-3-8B"
# What records call models that have no shape.
NAMES = {"smollm2": "SmolLM2", "plain": "SmolLM2 made plain"}
HEAD = """# What a run takes

Written by `python scripts/write_sizing.py` from the program's own expectations and the records in `results/`; nothing
here is written by hand. Of every model {sparsity} is removed, in bfloat16, with the recipe's own calibration text in
samples of 128 tokens: {drawn}. One GB is 10^9 bytes. A figure is one of these:

- *expected*: computed from the model's sizes, as `--dry_run` does (`olica/pruning/memory.py`);
- *measured*: taken from a record of such a run;
- *extrapolated*: a record of another model, scaled by the [formula](#time);
- *not run*: nothing is known.

[Below](#expected-beside-measured) expected and extrapolated figures stand beside measured ones; what is more than
{tolerance} off is marked there.
"""
CARD_TEXT = """## What a card can do

Expected, in an empty card. *Device* and *host* say where hidden states live (`--cache_dev`), the number is the batch
that `--batch_size auto` takes. It plans with {share} of the card and leaves the rest for what the estimate does not
see; *no* is followed by the least that is wanted, which a card may hold all the same.
"""
MEMORY_TEXT = """## Memory and disk

GB, all of them expected, in batches of 16 samples. Of the device: with hidden states there, and on the host. Of the
host beside a GPU: with hidden states on the host. A process on the CPU is taken to hold {cpu} GB before it reads a
weight, one beside a GPU {cuda} GB. Disk: the dense model; what the run writes beside it, the pruned model included; and
what of that stays. A run that is stopped leaves no more than it writes at most, and the same command goes on from
there; what a survey leaves under `--data_dir` after the run is small.
"""
TIME_TEXT = """## Time

The stages of a pruning grow with different things, so that a record's seconds are scaled stage by stage
(`olica/duration.py`): passes over the text by tokens x parameters of the layers, decompositions by
layers x (parameters of a layer)^1.5, variants of a survey by their tokens x the layers they go through, comparing them
by their tokens x the parameters beside the layers, reading and writing by the size of the model. Of several records by
the same recipe on the same machine the one counts whose layers are nearest in size; "3 x" says that the layers are
three times as large as its own. The farther from one, the less a figure is worth: how far the formula was tried stands
[below](#expected-beside-measured). Drawing the text and downloading are not in it. 32 bits are float32, in which
weights and hidden states take twice the memory of the tables above.

A *dense pass* sends the calibration set once through the dense layers, 2 x parameters of the layers x tokens
operations; the column has them in 10^12. Survey, cut and writing took in dense passes of the same machine: {passes}.
"""
BESIDE_TEXT = """## Expected beside measured

Peak memory, as each record has it. More than {tolerance} of what was measured is marked. The runs of SmolLM2 on the
H200 are of a version that expected the libraries to take 0.06 GB of the host beside a GPU; now it expects 0.75.
"""
TIMES_BESIDE_TEXT = "Times, each predicted from another record of the same recipe on a device of the same name:"
MORE_TEXT = """## Measuring your own machine

```sh
LAYERS=8 bash scripts/gpu_check.sh
python benchmarks/pruning_speed.py --shape 7b --layers 8 --dtype bfloat16 --recipe olica-plus --num_samples 768 \\
    --output_path results/gpu/olica-plus.json
python benchmarks/pruning_speed.py --shape llama3-8b --layers 2 --mlp_num 1 --sparsity 0.067 --num_samples 32 \\
    --dtype bfloat16 --output_path results/shapes/llama3-8b.json
python scripts/write_sizing.py
```

The first two are for a GPU, the third for a CPU. The embedding is most of a model that has but two layers, so that
`--sparsity 0.067` takes as much of these as 0.2 takes of each layer of the whole model.
"""


@dataclass(frozen=True)
class Case:
    """A model, how it is pruned, and what decides the memory that this takes."""

    model: str
    job: Job
    task: Task

    def options(self, device: str, cache: str, batch_size: int = 16) -> PruningOptions:
        """Of a run there, which need not be here."""
        return PruningOptions(BatchSize(batch_size), torch.device(device), torch.device(cache))

    def peaks(self, device: str, cache: str, batch_size: int = 16) -> dict[str, int | None]:
        """Expected bytes."""
        return peaks_beside(RESIDENT[device], self.task, self.options(device, cache, batch_size))

    def on_card(self, card: int) -> tuple[str, int] | None:
        """Where hidden states live beside so many GB, and the largest batch; None where too little is left to spare."""
        sizes = {}
        for cache in ("cuda", "cpu"):
            options = self.options("cuda", cache)
            if fit_into(card * 10**9, self.task, options):
                sizes[cache] = options.batch_size.size
        if not sizes:
            return None
        cache = max(sizes, key=lambda name: sizes[name])  # the device, where both allow the same
        return "device" if cache == "cuda" else "host", sizes[cache]

    @property
    def parameters(self) -> int:
        """Of the dense model."""
        return self.job.counts.before["total"]

    @property
    def tokens(self) -> int:
        """Of the calibration set."""
        samples, tokens = self.task.ids_shape
        return samples * tokens


def cases() -> dict[str, list[Case]]:
    """All models by each recipe, planned as --dry_run does."""
    found: dict[str, list[Case]] = {recipe: [] for recipe in RECIPES}
    with TemporaryDirectory() as folder:
        for shape, title in MODELS.items():
            config = BENCHMARK["shape_config"](BENCHMARK["SHAPES"][shape])
            config.dtype = DTYPE
            config.save_pretrained(path := Path(folder) / shape)
            for recipe in RECIPES:
                asked = {"base_model": str(path), "recipe": recipe, "device": "cpu"}
                (job,) = prepare(settings_of(asked), [SPARSITY])
                # A folder without weights is not known to be streamed, which one with them would be.
                found[recipe].append(Case(title, job, replace(job.task, is_streamed=True)))
    return found


def gigabytes(size: float) -> str:
    """Bytes, in 10^9, as tables have them."""
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of a page."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def cards_table(by_recipe: dict[str, list[Case]]) -> str:
    """Where hidden states live and the largest batch, for each card; what it would have to hold where that is none."""
    rows = []
    for recipe, those in by_recipe.items():
        for case in those:
            least = gigabytes(case.peaks("cuda", "cpu", batch_size=1)["device_bytes"])
            found = [case.on_card(card) for card in CARDS]
            cells = [f"{place[0]}, {place[1]}" if place else f"no: {least} GB" for place in found]
            rows.append([case.model, f"`{recipe}`", *cells])
    return table(["model", "recipe", *(f"{card} GB" for card in CARDS)], rows)


def memory_table(those: list[Case]) -> str:
    """Expected memory and disk of every model."""
    header = ["model", "parameters", "device, states on it", "device, states on the host", "host beside a GPU"]
    header += ["host without a GPU", "dense model", "run, at most", "pruned model"]
    rows = []
    for case in those:
        on_device, on_host, alone = (
            case.peaks(*where) for where in (("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cpu"))
        )
        sizes = [on_device["device_bytes"], on_host["device_bytes"], on_host["host_bytes"], alone["host_bytes"]]
        sizes.append(case.parameters * DTYPE.itemsize)
        sizes += [case.job.disk_bytes + survey_disk_bytes(case.task), expected_parameters(case.job) * DTYPE.itemsize]
        rows.append([case.model, f"{case.parameters / 1e9:.2f} billion", *map(gigabytes, sizes)])
    return table(header, rows)


def machine_of(one: Timed) -> tuple[str, int]:
    """On what a pruning was timed, and bytes of its weights."""
    return one.pruning.device, one.pruning.itemsize


def time_table(by_recipe: dict[str, list[Case]], timed: list[Timed]) -> str:
    """Times of every model, by the records of each machine."""
    machines = sorted({machine_of(one) for one in timed})
    unseen = [card for card in CARDS if not any(f"{card}GB" in device for device, _ in machines)]
    header = ["model", "recipe", "dense pass", *(f"{card} GB card" for card in unseen)]
    header += [f"{device}, {8 * itemsize} bits" for device, itemsize in machines]
    rows = []
    for recipe, those in by_recipe.items():
        for case in those:
            operations = 2 * case.job.counts.before["decoder_layers"] * case.tokens / 1e12
            row = [case.model, f"`{recipe}`", f"{operations:,.0f}", *([NOT_RUN] * len(unseen))]
            for device, itemsize in machines:
                asked = replace(as_timed(case.job, device), itemsize=itemsize)
                found = nearest(asked, timed)
                row.append(time_cell(asked, found) if found else NOT_RUN)
            rows.append(row)
    return table(header, rows)


def time_cell(asked: Pruning, found: Timed) -> str:
    """A time, and how it is known."""
    if asked == found.pruning:
        return f"{time_in_words(found.total)}, measured"
    times = asked.layer / found.pruning.layer
    return f"{time_in_words(found.scaled(asked))}, extrapolated ({two_digits(times)} x)"


def recorded_peaks() -> Iterator[list[str]]:
    """Rows of expected and measured memory: of all timed prunings, and of those on a GPU by the page's recipes."""
    for path in sorted(RESULTS.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        kind, where = record.get("kind") if isinstance(record, dict) else None, path.relative_to(RESULTS)
        if kind == KIND:
            recipe, measured = record["settings"]["recipe"], record["peak_memory"]
        elif kind == "pruning" and where.parts[0] == "gpu" and record["recipe"]["name"] in RECIPES:
            recipe, stages = record["recipe"]["name"], record["stages"].values()
            measured = {name: max(stage[name] for stage in stages) for name in ("host_bytes", "device_bytes")}
        else:
            continue
        for name, memory in (("host_bytes", "host"), ("device_bytes", record["environment"]["device"])):
            if expected := record["expected_peak_memory"][name]:
                yield [f"`{where.as_posix()}`", model_of(record["settings"]), f"`{recipe}`", memory] + beside(
                    expected, measured[name], gigabytes
                )


def model_of(settings: dict) -> str:
    """What a record is of, by its flags."""
    shape = settings.get("shape")
    if shape is None:
        name = Path(settings["base_model"]).name
        return NAMES.get(name, name)
    parts = [MODELS.get(shape, shape)]
    if settings["scale"] != 1:
        parts.append(f"widths divided by {settings['scale']}")
    if settings["layers"] is not None:
        parts.append(f"{settings['layers']} layers")
    return ", ".join(parts)


def recorded_times(timed: list[Timed]) -> Iterator[list[str]]:
    """Rows of what each pruning took beside what the nearest other one of the same machine makes of it."""
    for one in timed:
        other = nearest(one.pruning, [other for other in timed if other is not one])
        if other:
            took = beside(other.scaled(one.pruning), one.total, time_in_words)
            times = two_digits(one.pruning.layer / other.pruning.layer)
            yield [f"`{one.source}`", f"`{one.pruning.recipe}`", f"`{other.source}`, {times} x", *took]


def beside(expected: float, measured: float, shown) -> list[str]:
    """Cells of an expected figure, the measured one and how far they are from each other."""
    off = expected / measured - 1
    shown_off = f"{round(100 * off):+d} %"
    return [shown(expected), shown(measured), shown_off if abs(off) <= TOLERANCE else f"**{shown_off}, too far**"]


def dense_passes(timed: list[Timed]) -> str:
    """How many dense passes each recipe took on each machine, in words."""
    parts = []
    for recipe in RECIPES:
        took: dict[tuple[str, int], list[float]] = {}
        for one in timed:
            if one.pruning.recipe == recipe:
                took.setdefault(machine_of(one), []).append(one.total / one.dense_pass)
        for (device, itemsize), passes in sorted(took.items()):
            between = dict.fromkeys(f"{number:.1f}" for number in (min(passes), max(passes)))
            parts.append(f"`{recipe}` {' to '.join(between)} on {device} ({8 * itemsize} bits)")
        if not took:
            parts.append(f"`{recipe}` {NOT_RUN}")
    return ", ".join(parts)


def fitting(by_recipe: dict[str, list[Case]], card: int) -> list[str]:
    """What a card prunes, a sentence for each recipe."""
    lines = []
    for recipe, those in by_recipe.items():
        models = [case.model for case in those if case.on_card(card)]
        which = "every model of the table" if len(models) == len(those) else ", ".join(models)
        lines.append(f"- `--recipe {recipe}`: {which}.")
    return lines


def choices(by_recipe: dict[str, list[Case]]) -> list[str]:
    """What the flags change, by the example of one model."""
    lines = {"--cache_dev cpu": [], "--batch_size 64": []}
    for recipe, those in by_recipe.items():
        case = next(case for case in those if case.model == EXAMPLE)
        kept, off, large = (case.peaks("cuda", *where)["device_bytes"] for where in (("cuda",), ("cpu",), ("cuda", 64)))
        lines["--cache_dev cpu"].append(f"{gigabytes(kept - off)} GB by `{recipe}`")
        more = f"{gigabytes(large - kept)} GB" if large > kept else "nothing"
        lines["--batch_size 64"].append(f"{more} by `{recipe}`")
    saved, taken = (" and ".join(those) for those in lines.values())
    return [
        f"- `--cache_dev cpu` keeps hidden states on the host: for {EXAMPLE} that frees {saved} on the device. Without "
        "need leave it: every layer then fetches all states and sends them back.",
        "- `--batch_size auto` takes the batch of the first table, where the default is 16; a batch of 64 wants "
        f"{taken} more of the device for {EXAMPLE}.",
        "- `--num_samples`: hidden states and all passes over the text grow with it; decompositions and the sums of "
        "products, which are most of the memory, do not. With fewer than 64 samples or 128 tokens "
        "[quality is lost](measurements.md#the-papers-tables-and-figures-on-smollm2).",
        "- `--recipe`: `olica` takes least. [`olica-plus`](olica-plus.md) loses less of the model's quality; it sums "
        "the products of all channels with all, and its own text is three times as long.",
        "- `--dry_run` prints memory and disk for a model, its flags and the machine at hand, and a time where a run "
        "by the same recipe on a GPU of the same name is recorded.",
    ]


def filled(text: str) -> str:
    """A page's text with its paragraphs and points in lines that fit a screen; tables and blocks stay as they are."""
    return "\n\n".join(
        part if part[0] in "|#`" else "\n".join(map(_lines_of, _points(part))) for part in text.split("\n\n")
    )


def _points(part: str) -> list[str]:
    """The points of a list, or a paragraph."""
    first, *others = part.split("\n- ")
    return [first, *(f"- {other}" for other in others)]


def _lines_of(point: str) -> str:
    indent = "  " if point.startswith("- ") else ""
    return fill(point, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def sizing_page() -> str:
    """The text of docs/sizing.md."""
    by_recipe, timed = cases(), read_timed(RESULTS, LAYERS)
    drawn = [f"{those[0].task.ids_shape[0]} samples for `{recipe}`" for recipe, those in by_recipe.items()]
    small = CARDS[0]
    compared = ["record", "model", "recipe", "memory", "expected, GB", "measured, GB", "off"]
    predicted = ["record", "recipe", "predicted from", "predicted", "measured", "off"]
    parts = [
        HEAD.format(sparsity=f"{100 * SPARSITY:g} %", drawn=" and ".join(drawn), tolerance=f"{100 * TOLERANCE:g} %"),
        CARD_TEXT.format(share=f"{100 * USABLE:g} %"),
        cards_table(by_recipe),
        f"With a card of {small} GB:",
        "\n".join(fitting(by_recipe, small)),
        MEMORY_TEXT.format(cpu=gigabytes(RESIDENT["cpu"]), cuda=gigabytes(RESIDENT["cuda"])),
        *(f"### Memory and disk of {recipe}\n\n{memory_table(those)}" for recipe, those in by_recipe.items()),
        TIME_TEXT.format(passes=dense_passes(timed)),
        time_table(by_recipe, timed),
        "## What to choose",
        "\n".join(choices(by_recipe)),
        BESIDE_TEXT.format(tolerance=f"{100 * TOLERANCE:g} %"),
        table(compared, [*recorded_peaks()]),
        TIMES_BESIDE_TEXT,
        table(predicted, [*recorded_times(timed)]),
        MORE_TEXT,
    ]
    return filled("\n\n".join(part.strip("\n") for part in parts)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(sizing_page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
