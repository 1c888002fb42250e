"""The page of a sweep: one file of HTML that needs nothing else, drawn from the record of the sweep.

It has no script, no font and no picture of its own; figures are SVG within it. Nothing is told by colour alone: points
have labels, the limit is dashed, the found point has another shape, and shares are lengths.
"""

import math
from collections.abc import Callable
from html import escape

from ..evaluation.paired import PAPER_METRIC
from ..terminal import with_error
from .runs import limited
from .sweep_curve import curve

# The parts of `model.skeleton.PARTS` in words; a correction is what may be added, and no share of anything.
PARTS = {"query_key": "queries and keys", "value_output": "values and outputs", "mlp": "MLP"}
CORRECTION = "correction"
# What a bar says of itself.
LEFT, OF_LARGEST = "{:.1%} left", "{:.1%} of the largest"
# Width and height of the curve in units of its text's pixels: for desks, and for phones.
WIDE, NARROW = (760, 400), (350, 330)

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #595959; --line: #c9c9c9; --ghost: #e4e4e4;
  --bar: #2b5c8a; --found: #a33a00; --panel: #f6f6f4; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #ececec; --soft: #a9adb3; --line: #4a4e55;
  --ghost: #33373d; --bar: #8fbde8; --found: #ffb27a; --panel: #202327; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2, p, pre, .strip { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption, .axis { color: var(--soft); }
figcaption, .axis, .note { font-size: .875rem; }
figure { margin: .6rem 0; }
.answer { border: 2px solid var(--ink); background: var(--panel); padding: .6rem .9rem; margin: 1rem 0; }
svg { display: block; width: 100%; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); paint-order: stroke;
  stroke: var(--paper); stroke-width: 4px; }
svg .small { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.limit { stroke: var(--found); stroke-width: 2; stroke-dasharray: 7 5; }
.curve { fill: none; stroke: var(--bar); stroke-width: 2; }
.error { stroke: var(--bar); stroke-width: 1.5; }
.point { fill: var(--paper); stroke: var(--bar); stroke-width: 2.5; }
.found { fill: var(--found); stroke: var(--ink); stroke-width: 1.5; }
.narrow { display: none; }
.strip { display: grid; grid-template-columns: 18.5rem 1fr; gap: 0 .9rem; align-items: center; margin: .35rem 0; }
.strip svg { height: 2.9rem; border-bottom: 1px solid var(--ink); }
.ghost { fill: var(--ghost); }
.bar { fill: var(--bar); }
.axis { position: relative; height: 1.3rem; margin-left: 19.4rem; }
.axis span { position: absolute; transform: translateX(-50%); }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: bottom; }
th:first-child { text-align: left; }
td, tbody th { white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); }
pre { white-space: pre-wrap; background: var(--panel); border: 1px solid var(--line); padding: .5rem .7rem;
  margin: .2rem 0 .7rem; font: .875rem/1.45 ui-monospace, monospace; }
pre span { display: inline-block; max-width: 100%; }
@media (max-width: 640px) {
  .wide { display: none; } .narrow { display: block; }
  .strip { grid-template-columns: 1fr; } .axis { margin-left: 0; }
  table, tbody, tr, td, tbody th { display: block; } thead { display: none; }
  tr { display: grid; grid-template-columns: 1fr 1fr; gap: .1rem .8rem; padding: .6rem 0; border-bottom: 1px solid
    var(--ink); }
  tbody th, td { border: 0; padding: 0; text-align: left; } tbody th { grid-column: 1 / -1; }
  td::before { content: attr(data-label); display: block; color: var(--soft); font-size: .8125rem; }
}
"""


def page(record: dict) -> str:
    """The page of a sweep's record, as `sweep.json` has it; its points may be fewer than were asked for.

    Args:
        record: with `dense`, and `points` in ascending order.
    """
    points = record["points"]
    title = f"Sparsity of {record['model']['name']} by {record['recipe']['name']}"
    sections = [_answer(record)]
    if points:
        sections += [_curve_section(record), _table_section(record), _tasks_section(record)]
        sections += [_overview(record), _parts_section(record), _commands(points)]
    else:
        sections.append("<p>The dense model is measured; no point is there yet.</p>")
    body = "\n".join(filter(None, [*sections, _protocol(record)]))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="soft">{escape(record["model"]["description"])}: {record["dense"]["parameters"]["total"]:,} parameters,
{record["dense"]["parameters"]["decoder_layers"]:,} of them in {len(record["dense"]["layers"])} decoder layers, which
alone are pruned. {escape(record["recipe"]["about"])}.</p>
{body}
</body>
</html>
"""


def answer_in_words(answer: dict) -> str:
    """The sparsity that was sought, in a sentence without its end."""
    found, limit = f"{answer['sparsity']:g}, within {answer['tolerance']:g}", answer["limit"]
    if answer["flag"] == "max_params":
        met = f"the smallest sparsity that leaves at most {limit:,} parameters is {found}"
    else:
        met = f"the largest sparsity with at most {limit:g} times the dense perplexity is {found}"
    ratio = with_error(answer["ratio"], answer["ratio_error"], 3)
    return f"{met}: {answer['parameters']['total']:,} parameters, {ratio} times the dense perplexity"


def _answer(record: dict) -> str:
    answer = record["answer"]
    if not answer:
        return ""
    words = f"<strong>Found:</strong> {escape(answer_in_words(answer))}."
    return f'<div class="answer"><p>{words}</p>{_command(answer["command"])}</div>'


def _command(command: str) -> str:
    """A command, which narrow screens break between its words, and not at their hyphens."""
    return "<pre>" + " ".join(f"<span>{escape(word)}</span>" for word in command.split(" ")) + "</pre>"


# The curve.


def _curve_section(record: dict) -> str:
    pictures = "".join(
        f'<div class="{name}">{curve(record, *size)}</div>' for name, size in (("wide", WIDE), ("narrow", NARROW))
    )
    answer = record["answer"]
    shapes = "Rings are pruned models, labelled by their sparsity; bars are one standard error of the ratio."
    shapes += " The diamond is the one that was found, the dashed line the limit." if answer else ""
    return (
        "<h2>Perplexity over size</h2>\n"
        f"<figure>{pictures}<figcaption>{shapes} Perplexity is a ratio to the dense model's on the same held-back "
        "text, on a logarithmic axis.</figcaption></figure>"
    )


# The tables.


def _table_section(record: dict) -> str:
    text = next(iter(record["dense"]["perplexity"]))
    headings = ["sparsity", "parameters", "left of the model", "left of its layers", "weights", "perplexity"]
    headings += ["ratio to dense", "pruning, with survey"]
    rows = [[_name(point, record), *_cells(point, record, text)] for point in [record["dense"], *record["points"]]]
    return f"<h2>All points</h2>\n{_table(headings, rows)}"


def _name(point: dict, record: dict) -> str:
    if "sparsity" not in point:
        return "dense"
    found = record["answer"] and record["answer"]["sparsity"] == point["sparsity"]
    return f"{point['sparsity']:g}" + (" (found)" if found else "")


def _cells(point: dict, record: dict, text: str) -> list[str]:
    parameters, dense, measured = point["parameters"], record["dense"]["parameters"], point["perplexity"][text]
    ratio = with_error(point["ratio"], point["ratio_error"], 3) if "ratio" in point else "1"
    return [
        f"{parameters['total']:,}",
        *(f"{100 * parameters[part] / dense[part]:.1f} %" for part in ("total", "decoder_layers")),
        f"{point['weight_bytes'] / 1e6:,.1f} MB",
        with_error(measured["value"], measured["standard_error"], 2),
        ratio,
        f"{point['pruning_seconds'] / 60:.1f} min" if "pruning_seconds" in point else "–",
    ]


def _tasks_section(record: dict) -> str:
    if "zero_shot" not in record["dense"]:
        return ""
    models = [record["dense"], *record["points"]]
    columns: dict[str, Callable[[dict], str]] = {}
    for task, scores in record["dense"]["zero_shot"]["tasks"].items():
        metric = PAPER_METRIC.get(task) or scores["metrics"][0]
        columns[f"{task} {metric}"] = lambda scored, task=task, metric=metric: _score(scored["tasks"][task], metric)
    if len(averaged := record["dense"]["zero_shot"]["averages"]["tasks"]) > 1:
        columns[f"mean of {len(averaged)}, %"] = lambda scored: with_error(
            scored["averages"]["paper_rule"], scored["averages"]["standard_error"], 2
        )
    rows = [[_name(model, record), *(cell(model["zero_shot"]) for cell in columns.values())] for model in models]
    rows_of_all, harness = limited(record["settings"]["limit"]), record["dense"]["zero_shot"]["harness"]
    return (
        f"<h2>Zero-shot tasks</h2>\n<p>Rows: {rows_of_all}. Scored by {escape(harness)}.</p>\n"
        f"{_table(['sparsity', *columns], rows)}"
    )


def _score(scores: dict, metric: str) -> str:
    return with_error(scores[metric], scores.get(f"{metric}_stderr"), 4)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """A table, whose rows narrow screens show as cards."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = ""
    for name, *cells in rows:
        labelled = zip(headings[1:], cells, strict=True)
        tds = "".join(f'<td data-label="{escape(heading)}">{escape(cell)}</td>' for heading, cell in labelled)
        body += f'<tr><th scope="row">{escape(name)}</th>{tds}</tr>\n'
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


# The layers.


def _overview(record: dict) -> str:
    """What each point leaves of each layer, a row for every point."""
    dense = [sum(layer.values()) for layer in record["dense"]["layers"]]
    rows = []
    for point in record["points"]:
        kept = [sum(layer.values()) / whole for layer, whole in zip(point["layers"], dense, strict=True)]
        rows.append(_strip(f"sparsity {_name(point, record)}", kept, _share_in_words(kept), LEFT))
    return (
        "<h2>What is left of each layer</h2>\n"
        '<p class="note">One column for each decoder layer, numbered from 0. The whole column is the dense layer, the '
        "bar in it what stays of its parameters.</p>\n" + "\n".join(rows) + _layer_axis(len(dense))
    )


def _parts_section(record: dict) -> str:
    """What each point leaves of each part of each layer, and what that damages where it was measured."""
    damage = ""
    if any(point["damage"] for point in record["points"]):
        damage = (
            " Damage is how far the model's output moves for it (Kullback-Leibler divergence in nats, the sum over the "
            "layer's parts, each pruned alone), as the survey estimates it; the largest of a row has the whole height."
        )
    note = f'<p class="note">As above, for each part by itself.{damage}</p>'
    return "\n".join(["<h2>What is left of each part</h2>", note, *(_parts_of(p, record) for p in record["points"])])


def _parts_of(point: dict, record: dict) -> str:
    dense, layers = record["dense"]["layers"], point["layers"]
    rows = []
    for part, words in PARTS.items():
        kept = [left[part] / whole[part] for left, whole in zip(layers, dense, strict=True)]
        rows.append(_strip(words, kept, _share_in_words(kept), LEFT))
    if any(added := [layer[CORRECTION] for layer in layers]):
        most, corrected = max(added), [str(index) for index, size in enumerate(added) if size]
        words = f"{most:,} parameters added in layers {', '.join(corrected)}"
        rows.append(_strip("correction beside the MLP", [size / most for size in added], words, OF_LARGEST))
    if point["damage"]:
        damage = [max(value, 0.0) for value in point["damage"]]
        most = max(damage)
        words = f"largest {most:.3g} nats ({_layer_of(damage, most)})"
        rows.append(_strip("damage", [value / (most or 1) for value in damage], words, OF_LARGEST))
    heading = f"<h3>Sparsity {escape(_name(point, record))}</h3>\n"
    return heading + "\n".join(rows) + _layer_axis(len(layers))


def _share_in_words(kept: list[float]) -> str:
    least, most = min(kept), max(kept)
    if math.isclose(least, 1) and math.isclose(most, 1):
        return "nothing lost"
    if most - least < 5e-4:
        return f"{least:.1%} left in each"
    return f"mean {sum(kept) / len(kept):.1%}, least {least:.1%} ({_layer_of(kept, least)})"


def _layer_of(values: list[float], value: float) -> str:
    return f"layer {values.index(value)}"


def _strip(name: str, shares: list[float], words: str, said: str) -> str:
    """A row of bars, one for each layer, whose heights are `shares` of the full height; `said` names one's share."""
    bars = "".join(
        f'<rect class="ghost" x="{index + 0.08:.2f}" y="0" width="0.84" height="100"/>'
        f'<rect class="bar" x="{index + 0.08:.2f}" y="{100 - height:.1f}" width="0.84" height="{height:.1f}">'
        f"<title>layer {index}: {said.format(share)}</title></rect>"
        for index, share in enumerate(shares)
        for height in [100 * min(share, 1.0)]
    )
    picture = (
        f'<svg role="img" aria-label="{escape(name)}: {escape(words)}" viewBox="0 0 {len(shares)} 100" '
        f'preserveAspectRatio="none">{bars}</svg>'
    )
    return (
        f'<div class="strip"><div><strong>{escape(name)}</strong><br><span class="note soft">{escape(words)}</span>'
        f"</div>{picture}</div>"
    )


def _layer_axis(layers: int) -> str:
    """Numbers of layers below rows of bars."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if layers / step <= 9)
    marks = "".join(
        f'<span style="left:{100 * (index + 0.5) / layers:.2f}%">{index}</span>' for index in range(0, layers, step)
    )
    return f'<div class="axis" aria-label="layer">{marks}</div>\n'


# Commands and protocol.


def _commands(points: list[dict]) -> str:
    commands = "\n".join(f"<h3>Sparsity {p['sparsity']:g}</h3>\n{_command(p['command'])}" for p in points)
    return f"<h2>Commands</h2>\n<p>Each writes the checkpoint of a point.</p>\n{commands}"


def _protocol(record: dict) -> str:
    held, calibration = record["held_back"], record["calibration"]
    windows, tokens = held["ids"]
    samples, length = calibration["ids"]
    sources = " and ".join(source["name"] for source in held["sources"])
    calibrated = " and ".join(source["name"] for source in calibration["sources"])
    machine = record["environment"]
    return (
        "<h2>How it was measured</h2>\n"
        f"<p>Calibrated on {samples} samples of {length} tokens from {escape(calibrated)}. Perplexity on {windows} "
        f"windows of {tokens} tokens from {escape(sources)}, none of which the calibration set has: all but the first "
        "token of each window is predicted. Such text is for choosing; it is not what published perplexities are "
        "measured on, and no table reports it. The standard error of a ratio is that of the difference on the same "
        "windows.</p>\n"
        f"<p>olica {escape(machine['olica'])}, torch {escape(machine['packages']['torch'])}, "
        f"{escape(machine['device'])}; {escape(record['date'])}. This page was made by</p>\n"
        f"{_command(record['command'])}"
    )
