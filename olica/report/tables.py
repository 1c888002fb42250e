"""The paper's tables, made from the records of runs: its own figures, ours, and the difference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..evaluation.paired import PAPER_METRIC, compare, perplexity_error
from ..terminal import with_error
from .runs import TEXT, Results, Run, newest_alike, on_times, protocol, reservations

# The paper's order of columns.
TASKS = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
# Which sparsities a table shows.
SPARSITIES = {1: (0.25, 0.33), 2: (0.2, 0.25, 0.33), 3: (0.2, 0.3), 4: (0.2, 0.25, 0.33), 7: (0.5,)}
TABLE_5_SPARSITY = 0.33  # the paper does not name it; its last row is that of 33 % in Table 2
# What the paper's Table 5 calls a recipe, and Table 6 a run.
VALUE_OUTPUT_METHODS = {"olica-svd": "SVD", "olica-awsvd": "AWSVD", "olica-wanda": "Wanda", "olica": "Fast-OND"}
OND_RUNS = {"OND": "sparsity-0.2_olica-ond", "Fast-OND": "sparsity-0.2"}


@dataclass(frozen=True)
class Measured:
    """One of our figures: a value, its standard error if it has one, and how many digits are worth printing.

    `sign` "+" prints that of positive figures too.
    """

    value: float
    error: float | None = None
    digits: int = 2
    sign: str = ""

    def __str__(self) -> str:
        """The value and its error."""
        return with_error(self.value, self.error, self.digits, self.sign)


@dataclass
class Table:
    """A table whose rows have a name, our figure and, where the paper has it, the paper's."""

    title: str
    names: list[str]  # headers of the cells that name a row
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[list[str], Measured, float | None]] = field(default_factory=list)

    def add(self, names: Iterable[str], ours: Measured, paper: float | None = None) -> None:
        """Add a row."""
        self.rows.append((list(names), ours, paper))

    def markdown(self) -> str:
        """The table with the columns paper, ours and difference; with ours alone if the paper has none of the rows."""
        has_paper = any(paper is not None for _, _, paper in self.rows)
        header = [*self.names, *(["paper", "ours", "difference"] if has_paper else ["ours"])]
        return markdown(self.title, header, [self._cells(*row, has_paper) for row in self.rows], self.notes)

    def _cells(self, names: list[str], ours: Measured, paper: float | None, has_paper: bool) -> list[str]:
        if not has_paper:
            return [*names, str(ours)]
        if paper is None:
            return [*names, "", str(ours), ""]
        return [*names, f"{paper:{ours.sign},.{ours.digits}f}", str(ours), f"{ours.value - paper:+,.{ours.digits}f}"]


def markdown(title: str, header: list[str], rows: list[list[str]], notes: list[str], about: str = "") -> str:
    """A table under its title and what it is `about`, followed by a list of notes."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)) + " |"
        for cells in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([f"### {title}", "", *([about, ""] if about else []), *lines, *bullets(notes)])


def bullets(notes: list[str]) -> list[str]:
    """The lines of a list, after an empty one; nothing without notes."""
    return ["", *(f"- {note}" for note in notes)] if notes else []


def percent(share: float) -> str:
    """A sparsity as tables have it, with no more digits than were asked for."""
    return f"{100 * share:.4g}%"


def quality(results: Results, table: int) -> str | None:
    """Tables 2, 3 and 7: perplexity and accuracies, dense and at the table's sparsities."""
    dense = results.run("tables/dense")
    shown = {0.0: dense} | {s: results.run(f"tables/sparsity-{s:g}") for s in SPARSITIES[table]}
    shown = {sparsity: run for sparsity, run in shown.items() if run is not None}
    if not set(shown) - {0.0}:
        return None
    title = f"Table {table}: perplexity on WikiText-2 and accuracy in percent"
    paper = {row["sparsity"]: row for row in results.paper(table) if row["method"] in ("Dense", "Olica")}
    notes = _made({f"{sparsity:.0%}": run for sparsity, run in shown.items()})
    differences = {sparsity: beside(run, dense) for sparsity, run in shown.items() if dense and sparsity}
    if not paper:
        return _quality_of_ours(title, shown, differences, notes)
    compared = Table(title, ["sparsity", "measure"], notes + results.papers_notes(table))
    whole = paper.get(0.0)
    for sparsity, run in shown.items():
        name, printed = f"{sparsity:.0%}", paper.get(sparsity, {})
        for measure, (label, figure) in quality_figures(run).items():
            compared.add([name, label], figure, printed.get(measure))
        ratio, mean = differences.get(sparsity, (None, None))
        comparable = printed and whole
        if ratio:
            papers = printed["perplexity"] / whole["perplexity"] if comparable else None
            compared.add([name, "perplexity, ratio to dense"], ratio, papers)
        if mean:
            compared.add([name, "mean, to dense"], mean, printed["mean"] - whole["mean"] if comparable else None)
    return compared.markdown()


def _made(runs: dict[str, Run]) -> list[str]:
    """How the runs of a table of the paper were made."""
    return reservations(runs.values()) + protocol(runs)


def beside(run: Run, other: Run) -> tuple[Measured | None, Measured | None]:
    """Ratio of the perplexities and difference of the means, with paired errors; None where the rows are not the same.

    The error of the ratio comes, by the delta method, from that of the difference of the logarithms.
    """
    compared = compare(run.result, other.result)
    ratio, mean = compared["perplexity"].get(TEXT), compared.get("paper_rule")
    if ratio:
        error = ratio["standard_error"]
        ratio = Measured(ratio["ratio"], None if error is None else ratio["ratio"] * error, digits=3)
    return ratio, Measured(mean["difference"], mean["standard_error"], sign="+") if mean else None


def quality_figures(run: Run) -> dict[str, tuple[str, Measured]]:
    """Perplexity, the accuracies that the paper prints, in percent, and their mean, with their names in tables."""
    figures = {"perplexity": ("perplexity", perplexity(run, TEXT))}
    scores = run.result["zero_shot"]["tasks"]
    for task, name in TASKS.items():
        figures[task] = (name, accuracy(scores[task], PAPER_METRIC[task]))
    return figures | {"mean": ("mean", mean_accuracy(run))}


def accuracy(scores: dict, metric: str) -> Measured:
    """Of a task's recorded scores, in percent."""
    error = scores.get(f"{metric}_stderr")
    return Measured(100 * scores[metric], None if error is None else 100 * error)


def perplexity(run: Run, text: str) -> Measured:
    """On one of the texts that were measured."""
    measured = run.result["perplexity"][text]
    return Measured(measured["value"], perplexity_error(measured))


def mean_accuracy(run: Run) -> Measured:
    """By the paper's rule, in percent."""
    averages = run.result["zero_shot"]["averages"]
    return Measured(averages["paper_rule"], averages["standard_error"])


def _quality_of_ours(title: str, shown: dict[float, Run], differences: dict[float, tuple], notes: list[str]) -> str:
    """One row per sparsity; beside the means the paired differences to the dense model."""
    header = ["sparsity", "perplexity", "ratio to dense", *TASKS.values(), "mean", "mean, to dense"]
    rows = []
    for sparsity, run in shown.items():
        cells = [str(figure) for _, figure in quality_figures(run).values()]
        ratio, mean = (str(figure or "") for figure in differences.get(sparsity, (None, None)))
        rows.append([f"{sparsity:.0%}", cells[0], ratio, *cells[1:], mean])
    return markdown(title, header, rows, notes)


def resources(results: Results) -> str | None:
    """Table 1: samples, time and memory of the pruning, and what comes of it."""
    table = Table("Table 1: resources of pruning", ["sparsity", "measure"])
    shown = {}
    for sparsity in SPARSITIES[1]:
        if not (run := results.run(f"tables/sparsity-{sparsity:g}")):
            continue
        printed = next((row for row in results.paper(1) if row["method"] == "Olica"), {})
        quality_there = printed.get("results", {}).get(f"{sparsity:g}", {})
        name = f"{sparsity:.0%}"
        shown[name] = run
        table.add([name, "samples"], Measured(run.pruning["calibration"]["ids"][0], digits=0), printed.get("samples"))
        table.add([name, "minutes"], Measured(run.seconds / 60, digits=1), printed.get("minutes"))
        where, papers = ("GPU", printed.get("device_gigabytes")) if run.is_on_gpu else ("host", None)
        table.add([name, f"peak {where} memory, GB"], Measured(run.peak_bytes / 1e9), papers)
        table.add([name, "perplexity"], quality_figures(run)["perplexity"][1], quality_there.get("perplexity"))
        table.add([name, "mean accuracy, %"], mean_accuracy(run), quality_there.get("mean"))
    table.notes += _made(shown) + on_times(shown) + results.papers_notes(1)
    return table.markdown() if table.rows else None


def costs(results: Results) -> str | None:
    """Table 4: parameters, products, memory and times of dense and pruned model."""
    table = Table("Table 4: cost of the pruned model", ["sparsity", "measure"])
    shown = {0.0: results.run("table4/dense")}
    shown |= {sparsity: results.run(f"table4/sparsity-{sparsity:g}") for sparsity in SPARSITIES[4]}
    printed = {row["sparsity"]: row for row in results.paper(4)}
    for sparsity, run in shown.items():
        if run is None:
            continue
        name, there, result = f"{sparsity:.0%}", printed.get(sparsity, {}), run.result
        cost, peak, macs = result["cost"], result["cost"]["peak_memory"], result["macs"]
        parameters, products = (there[key] / 1e9 if there else None for key in ("parameters", "macs"))
        table.add([name, "parameters, 10⁹"], Measured(result["parameters"]["total"] / 1e9, digits=3), parameters)
        layers = result["parameters"]["decoder_layers"] / 1e9
        table.add([name, "of the decoder layers, 10⁹"], Measured(layers, digits=3))
        table.add([name, f"MACs of {macs['tokens']} tokens, 10⁹"], Measured(macs["total"] / 1e9), products)
        table.add([name, "weights, MiB"], Measured(result["weight_bytes"] / 2**20, digits=1))
        table.add([name, "cache of a token, kB"], Measured(result["cache_bytes_per_token"] / 1e3, digits=1))
        on_gpu = peak["device_bytes"] is not None
        where, taken = ("GPU", peak["device_bytes"]) if on_gpu else ("host", peak["host_bytes"])
        papers = there.get("memory_mebibytes") if on_gpu else None
        table.add([name, f"peak {where} memory, MiB"], Measured(taken / 2**20, digits=1), papers)
        prompt = cost["protocol"]["prompt_tokens"]
        table.add([name, f"ms for a prompt of {prompt}"], Measured(1e3 * cost["prefill"]["median_s"], digits=1))
        table.add([name, "ms for a new token"], Measured(1e3 * cost["decode"]["median_s"], digits=1))
        seconds = Measured(60 * run.evaluation["stages"][f"model: perplexity of {TEXT}"]["minutes"], digits=1)
        latency = there.get("latency_seconds") if on_gpu and run.is_whole else None
        table.add([name, f"seconds for {run.perplexity['windows']} windows"], seconds, latency)
    table.notes += _made({f"{sparsity:.0%}": run for sparsity, run in shown.items() if run})
    table.notes += ["Times are of processes one after the other; in benchmarks/generation_speed.py models take turns."]
    table.notes += results.papers_notes(4)
    return table.markdown() if table.rows else None


def _add_quality(table: Table, names: list[str], run: Run, there: dict, fast: Run | None, fast_there: dict) -> None:
    """Rows of a method's perplexity, its ratio to that of Fast-OND, and its mean accuracy."""
    table.add([*names, "perplexity"], quality_figures(run)["perplexity"][1], there.get("perplexity"))
    if fast not in (None, run) and (ratio := beside(run, fast)[0]):
        papers = there["perplexity"] / fast_there["perplexity"] if there and fast_there else None
        table.add([*names, "perplexity, ratio to Fast-OND"], ratio, papers)
    table.add([*names, "mean accuracy, %"], mean_accuracy(run), there.get("mean"))


def value_output_methods(results: Results) -> str | None:
    """Table 5: other methods on value and output projections, with and without the linear correction."""
    methods = [run for run in results.runs("tables") if run.pruning and run.recipe in VALUE_OUTPUT_METHODS]
    others = newest_alike([run for run in methods if run.recipe != "olica"], "recipe", "mlp_num")
    if not others:
        return None
    setup = others[0].setup("recipe", "mlp_num")
    alike = [run for run in methods if run.setup("recipe", "mlp_num") == setup]
    corrected = newest_alike([run for run in alike if run.mlp_num], "recipe")
    sections = {"without": [run for run in alike if not run.mlp_num], "with": corrected}
    title = f"Table 5: Fast-OND against other methods on value and output at {setup['sparsity']:.0%}"
    table = Table(title, ["correction", "method", "measure"])
    of_paper = results.paper(5) if setup["sparsity"] == TABLE_5_SPARSITY else []
    printed = {(row["method"], row["linear_calibration"]): row for row in of_paper}
    order = list(VALUE_OUTPUT_METHODS)
    shown = {}
    for correction, runs in sections.items():
        fast = next((run for run in runs if run.recipe == "olica"), None)
        for run in sorted(runs, key=lambda run: order.index(run.recipe)):
            method = VALUE_OUTPUT_METHODS[run.recipe]
            there, of_fast = (printed.get((name, correction == "with"), {}) for name in (method, "Fast-OND"))
            names = [correction, method]
            _add_quality(table, names, run, there, fast, of_fast)
            shown[" ".join(names)] = run
    table.notes += _made(shown) + (results.papers_notes(5) if printed else [])
    return table.markdown()


def ond_methods(results: Results) -> str | None:
    """Table 6: time and quality of OND and Fast-OND."""
    printed = {row["method"]: row for row in results.paper(6)}
    table = Table("Table 6: OND and Fast-OND at 20 %", ["method", "measure"])
    shown = {method: results.run(f"tables/{name}") for method, name in OND_RUNS.items()}
    if None in shown.values():
        return None
    for method, run in shown.items():
        there = printed.get(method, {})
        table.add([method, "seconds"], Measured(run.seconds, digits=0), there.get("seconds"))
        _add_quality(table, [method], run, there, shown["Fast-OND"], printed.get("Fast-OND", {}))
    table.notes += _made(shown) + on_times(shown) + results.papers_notes(6)
    return table.markdown()


TABLES: dict[str, Callable[[Results], str | None]] = {
    "table1": resources,
    "table2": lambda results: quality(results, 2),
    "table3": lambda results: quality(results, 3),
    "table4": costs,
    "table5": value_output_methods,
    "table6": ond_methods,
    "table7": lambda results: quality(results, 7),
}
