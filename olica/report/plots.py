"""The paper's figures, drawn from the records of runs."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..evaluation.paired import paired_difference, unpack_floats
from .methods import FOUNDING, mixes
from .runs import Results, Run, correction, in_common, newest_alike, origin, statements, text_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
PERPLEXITY = "perplexity on WikiText-2"
# Of this project's recipes among others, which are grey.
OUR_COLOURS = {"olica": "C0", "olica-grouped": "C1", "olica-plus": "C2"}


@dataclass(frozen=True)
class Drawing:
    """A figure, and what is to be known of the runs in it."""

    figure: "Figure"
    notes: list[str]


def _panels(columns: int, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty figure of panels side by side, in so many rows, and these."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('figures need the package matplotlib: pip install "olica[plots]"') from error
    figure = Figure(figsize=(5.2 * columns, 4 * rows), layout="constrained", dpi=130)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _logarithmic(axes: "Axes") -> None:
    """A logarithmic axis of perplexities, labelled by plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _ratio(run: Run) -> float:
    return run.pruning["settings"]["ratio"]


def _error_of_difference(run: Run, to: Run) -> float:
    """Standard error of the difference of two runs' perplexities; 0 where it is not known.

    All runs of a figure have the same windows, so this says what differs; the errors of the perplexities themselves,
    which the windows have in common, would hide it.
    """
    windows = (unpack_floats(one.perplexity["nll_by_window"]) for one in (run, to))
    return run.perplexity["value"] * (paired_difference(*windows, consecutive=True)["standard_error"] or 0)


def _draw_perplexity(axes: "Axes", runs: Iterable[Run], x: Callable[[Run], float], label: str | None = None) -> None:
    """Perplexities over what `x` takes from a run; bars are the errors of the differences to the first point."""
    ordered = sorted(runs, key=x)
    values = [run.perplexity["value"] for run in ordered]
    bars = [_error_of_difference(run, ordered[0]) for run in ordered]
    axes.errorbar([x(run) for run in ordered], values, yerr=bars, marker="o", markersize=4, capsize=3, label=label)
    windows = ordered[0].perplexity["windows"]
    axes.set_ylabel(f"{PERPLEXITY} ({windows} windows)\nbars: error of the difference to the first point")
    axes.grid(alpha=0.3)


def singular_values(results: Results) -> Drawing | None:
    """Figure 2: singular values of the four attention projections, a panel for each of some layers."""
    path = results.folder / "figure2/singular_values.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    layers = record["layers"]
    figure, panels = _panels(len(layers))
    for axes, (index, projections) in zip(panels, layers.items(), strict=True):
        for name, values in projections.items():
            axes.plot(
                [(position + 1) / len(values) for position in range(len(values))],
                [value / values[0] for value in values],
                label=f"{PROJECTIONS[name]} ({len(values)})",
            )
        axes.set(
            title=f"{results.title}, layer {index}",
            xlabel="position of the singular value, as a share of their number",
            ylabel="singular value, as a share of the largest",
        )
        axes.grid(alpha=0.3)
        axes.legend(title="projection (number)")
    return Drawing(figure, [origin([path.parent.as_posix()], [record["environment"]])])


def corrected_layers(results: Results) -> Drawing | None:
    """Figure 3: perplexity over the number of corrected MLPs, and the multiple correlation of every layer."""
    if len(runs := newest_alike(results.runs("figure3"), "mlp_num")) < 2:
        return None
    figure, (left, right) = _panels(2)
    _draw_perplexity(left, runs, lambda run: run.mlp_num)
    sparsity = runs[0].sparsity
    left.set(title=f"{results.title} at {sparsity:.0%}", xlabel="corrected MLPs")
    correlations = next(r for run in runs if (r := run.pruning["multiple_correlation"]) and r[0] is not None)
    known = [value for value in correlations if value is not None]
    right.bar(range(len(known)), known)
    right.set(title=results.title, xlabel="decoder layer", ylabel="mean multiple correlation of the MLP")
    right.grid(alpha=0.3, axis="y")
    return Drawing(figure, in_common(runs))


def rank_grid(results: Results) -> Drawing | None:
    """Figure 4: perplexity over corrected MLPs and rank of the corrections, and the parameters these add."""
    runs = newest_alike(results.runs("figure4"), "mlp_num", "ratio")
    plain = next((run for run in runs if run.mlp_num == 0), None)
    grid = {(_ratio(run), run.mlp_num): run for run in runs if run is not plain}
    if plain is None or not grid:
        return None
    ratios, numbers = (sorted({key[axis] for key in grid}) for axis in (0, 1))
    parameters = plain.pruning["parameters"]["after"]

    def added(run: Run) -> float:
        return 100 * (run.pruning["parameters"]["after"] - parameters) / run.pruning["parameters"]["before"]

    figure, panels = _panels(2)
    largest = max(_error_of_difference(run, plain) for run in grid.values())
    without = f"without: {plain.perplexity['value']:.2f}; differences to that ± {largest:.2f}"
    titles = [f"{PERPLEXITY}\n({without})", "added parameters, % of the dense model"]
    cells = [lambda run: run.perplexity["value"], added]
    for axes, heading, cell, colours in zip(panels, titles, cells, ("viridis_r", "Blues"), strict=True):
        values = [[cell(grid[ratio, n]) if (ratio, n) in grid else float("nan") for n in numbers] for ratio in ratios]
        image = axes.imshow(values, cmap=colours, aspect="auto", origin="lower")
        figure.colorbar(image, ax=axes)
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if math.isnan(value):
                    continue  # not recorded
                dark = image.norm(value) > 0.6
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
        axes.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set(title=heading, xlabel="corrected MLPs", ylabel="rank, as a share of the hidden size")
    figure.suptitle(f"{results.title} at {plain.sparsity:.0%}")
    return Drawing(figure, in_common(runs))


def calibration_set(results: Results) -> Drawing | None:
    """Figure 5: perplexity over the number of samples, and over their length."""
    axes_of = {"num_samples": "samples", "seqlen": "tokens"}
    by_number, by_length = (newest_alike(results.runs(f"figure5/{axis}"), name) for axis, name in axes_of.items())
    if not by_number or not by_length:
        return None
    figure, panels = _panels(2)
    for axes, runs, axis, label in zip(panels, (by_number, by_length), (0, 1), ("samples", "tokens"), strict=True):
        _draw_perplexity(axes, runs, lambda run, axis=axis: run.pruning["calibration"]["ids"][axis])
        samples, tokens = runs[0].pruning["calibration"]["ids"]
        rest = f"samples of {tokens} tokens" if axis == 0 else f"{samples} samples"
        title = f"{results.title} at {runs[0].sparsity:.0%}: {rest}\nfrom {runs[0].texts}"
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(f"{label}{'' if axis == 0 else ' per sample'}")
        axes.set_xscale("log", base=2)
        if axis:
            axes.sharey(panels[0])
        axes.set_xticks(ticks := [run.pruning["calibration"]["ids"][axis] for run in runs], [str(t) for t in ticks])
    return Drawing(figure, in_common(by_number + by_length))


def calibration_mixes(results: Results) -> Drawing | None:
    """Figure 6: perplexity over the sparsity, a line for each mix of calibration texts."""
    if not (runs := newest_alike(results.runs("figure6"), "sparsity", "mlp_num", "texts")):
        return None
    figure, (axes,) = _panels(1)
    for mix in dict.fromkeys(run.texts for run in runs):
        _draw_perplexity(axes, [r for r in runs if r.texts == mix], lambda run: 100 * run.sparsity, mix)
    axes.set(title=results.title, xlabel="sparsity, %")
    _logarithmic(axes)
    axes.legend(title="calibration texts", fontsize="small")
    corrected = statements(correction, {f"{run.sparsity:.0%}": run for run in runs})
    *said, origin_line = in_common(runs)
    return Drawing(figure, [*dict.fromkeys(said + corrected), origin_line])


def plan(record: dict, hidden: int) -> "Figure":
    """Sizes of all layers by the record of a pruning, as shares of the dense ones; ranks of the hidden size."""
    figure, (axes,) = _panels(1)
    shapes, dense = record["plan"], record["dense_layer"]
    lines = {
        "channels of the MLP": [shape["intermediate_size"] / dense["intermediate_size"] for shape in shapes],
        "width of value heads": [shape["v_head_dim"] / dense["v_head_dim"] for shape in shapes],
        "rank of queries": [(shape["q_rank"] or hidden) / hidden for shape in shapes],
        "rank of keys": [(shape["k_rank"] or hidden) / hidden for shape in shapes],
    }
    for name, kept in lines.items():
        if min(kept) < 1:
            axes.plot(kept, marker="o", markersize=4, label=name)
    axes.set(
        title=f"{record['recipe']['name']}, {record['measured_sparsity']:.1%} of the model gone",
        xlabel="layer",
        ylabel="share of the dense size\n(ranks: of the hidden size)",
        ylim=(0, 1.05),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def quality_over_size(models: Iterable[Results]) -> "Figure | None":
    """Perplexity over the decoder layers' parameters left, of all recipes; a panel for each model and text.

    Perplexities are ratios to the dense model's, sizes shares of its layers. Mixes of calibration texts differ by the
    style of their lines. Recipes of this project have colours; every recipe is labelled where its longest line ends,
    and what lies far above the founding recipes is named above the panel instead.
    """
    found = {results: made for results in models if (made := mixes(results))}
    if not found:
        return None
    columns = min(2, max(len(made[0].texts) for made in found.values()))
    figure, panels = _panels(columns, len(found))
    shown = [(results, text) for results, made in found.items() for text in (made[0].texts + [None])[:columns]]
    for axes, (results, text) in zip(panels, shown, strict=True):
        if text is None:
            axes.remove()
            continue
        lines = {}
        recipes = list(dict.fromkeys(point.recipe for mix in found[results] for point in mix.points))
        for mix, style in zip(found[results], itertools.cycle(("-", "--", ":", "-.")), strict=False):
            axes.plot([], [], style, color="grey", label=mix.words)
            for recipe in recipes:
                points = [p for p in mix.points if p.recipe == recipe and p.gap(text) is not None]
                if points:
                    points.sort(key=lambda point: -point.layers_left)
                    left = [100, *(100 * point.layers_left for point in points)]
                    ratios = [1, *(math.exp(point.gap(text)) for point in points)]
                    colour = OUR_COLOURS.get(recipe, "0.6")
                    width = 2 if recipe in OUR_COLOURS else 1
                    (line,) = axes.plot(left, ratios, style, color=colour, linewidth=width, marker="o", markersize=3)
                    line.set_gid(f"{recipe}, {mix.name}")
                    if recipe not in lines or left[-1] < lines[recipe].get_xdata()[-1]:
                        lines[recipe] = line
        of_founding = [lines[recipe].get_ydata()[-1] for recipe in FOUNDING if recipe in lines]
        top = 2 * max(of_founding) if of_founding else math.inf
        above = [recipe for recipe, line in lines.items() if line.get_ydata()[-1] > top]
        title = f"{results.label}, {text_name(text)}" + (f" (above it: {', '.join(above)})" if above else "")
        axes.set(title=title, xlabel="parameters of the decoder layers left, %", ylabel="perplexity, ratio to dense")
        axes.title.set_fontsize("medium")
        _logarithmic(axes)
        if above:
            axes.set_ylim(0.9, top)
        least = 100 * min(point.layers_left for mix in found[results] for point in mix.points)
        axes.set_xlim(102, least - 20)  # for the names
        _label_ends(axes, {recipe: line for recipe, line in lines.items() if recipe not in above})
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return figure


def _label_ends(axes: "Axes", lines: "dict[str, Line2D]") -> None:
    """Write a name beside the end of each line, and those of ends at one place above each other."""
    low, high = map(math.log, axes.get_ylim())
    gap = (high - low) / 24
    ends: dict[int, list[str]] = {}
    for name in sorted(lines, key=lambda name: lines[name].get_ydata()[-1]):
        ends.setdefault(round(lines[name].get_xdata()[-1] / 5), []).append(name)
    for names in ends.values():
        heights = [math.log(lines[name].get_ydata()[-1]) for name in names]
        middle = sum(heights) / len(heights)
        for place in range(1, len(heights)):
            heights[place] = max(heights[place], heights[place - 1] + gap)
        shift = middle - sum(heights) / len(heights)  # as far down as up
        for name, height in zip(names, heights, strict=True):
            x, y = lines[name].get_xdata()[-1], lines[name].get_ydata()[-1]
            axes.annotate(
                name,
                (x, y),
                (x - 4, math.exp(height + shift)),
                color=lines[name].get_color(),
                fontsize="small",
                va="center",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},  # over lines
                arrowprops={"arrowstyle": "-", "color": lines[name].get_color(), "linewidth": 0.5, "shrinkA": 0},
            )


FIGURES: dict[str, Callable[[Results], Drawing | None]] = {
    "figure2": singular_values,
    "figure3": corrected_layers,
    "figure4": rank_grid,
    "figure5": calibration_set,
    "figure6": calibration_mixes,
}


def draw(name: str, results: Results) -> tuple[Path, list[str]] | None:
    """Draw a figure beside its records, as NAME.png, and say what is to be known; None where records are missing."""
    drawing = FIGURES[name](results)
    if drawing is None:
        return None
    path = results.folder / f"{name}.png"
    drawing.figure.savefig(path)
    return path, drawing.notes
