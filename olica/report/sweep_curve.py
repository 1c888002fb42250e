"""The curve of a sweep's page, as SVG: perplexity over size, with errors, labels, and what was sought."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..terminal import with_error

# Ratios that may label the axis, by the largest ratio that there is; beyond the last ones, powers of ten.
TICKS = (
    (1.03, (0.98, 0.985, 0.99, 0.995, 1, 1.005, 1.01, 1.015, 1.02, 1.025)),
    (1.12, (0.9, 0.92, 0.94, 0.96, 0.98, 1, 1.02, 1.04, 1.06, 1.08, 1.1)),
    (1.6, (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5)),
    (3.0, (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5)),
    (10.0, (1, 1.5, 2, 3, 4, 6, 8)),
    (100.0, (1, 2, 5, 10, 20, 50)),
)


class _Scale(NamedTuple):
    """From shares of the parameters left, and perplexity ratios, to places in a picture."""

    width: int
    height: int
    shares: tuple[float, float]  # at the left and the right edge
    ratios: tuple[float, float]  # at the lower and the upper edge

    left, right, top, bottom = 48, 14, 34, 44

    def x(self, share: float) -> float:
        first, last = self.shares
        return self.left + (self.width - self.left - self.right) * (first - share) / (first - last)

    def y(self, ratio: float) -> float:
        low, high = map(math.log, self.ratios)
        inner = self.height - self.top - self.bottom
        return self.height - self.bottom - inner * (math.log(ratio) - low) / (high - low)


def _scale(width: int, height: int, shares: list[float], ratios: list[float]) -> _Scale:
    """The scale on which all of these have room, with a margin."""
    wide, high = 1 - min(shares), max(math.log(max(ratios) / min(ratios)), 0.02)
    sides = (1 + 0.03 * wide, min(shares) - 0.03 * wide - 1e-3)
    return _Scale(width, height, sides, (min(ratios) * math.exp(-0.04 * high), max(ratios) * math.exp(0.12 * high)))


def curve(record: dict, width: int, height: int) -> str:
    """The picture of so many pixels, by the record of a sweep: perplexity ratios over the parameters left."""
    dense, points, answer = record["dense"], record["points"], record["answer"]
    total = dense["parameters"]["total"]
    left = [1.0, *(point["parameters"]["total"] / total for point in points)]
    ratios = [1.0, *(point["ratio"] for point in points)]
    limits = [answer["limit"]] if _limits_ratio(answer) else []
    scale = _scale(width, height, left, [*ratios, *limits])
    parts = [_axes(scale)]
    if _limits_ratio(answer):
        y = scale.y(answer["limit"])
        parts.append(f'<line class="limit" x1="{scale.left}" x2="{width - scale.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{scale.left + 6}" y="{y - 6:.1f}">limit {answer["limit"]:g}</text>')
    elif answer:
        x = scale.x(answer["limit"] / total)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.top}" y2="{height - scale.bottom}"/>')
        parts.append(
            f'<text x="{x - 6:.1f}" y="{scale.top + 12}" text-anchor="end">limit {_short(answer["limit"])}</text>'
        )
    places = [(scale.x(share), scale.y(ratio)) for share, ratio in zip(left, ratios, strict=True)]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    parts.append(_mark(*places[0], False, "dense"))
    for point, (x, y) in zip(points, places[1:], strict=True):
        if error := point["ratio_error"]:
            ends = (point["ratio"] + sign * error for sign in (-1, 1))
            low, high = (scale.y(min(max(end, scale.ratios[0]), scale.ratios[1])) for end in ends)
            parts.append(f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        said = f"sparsity {point['sparsity']:g}: {100 * point['parameters']['total'] / total:.1f} % left, "
        said += f"{with_error(point['ratio'], point['ratio_error'], 3)} times the dense perplexity"
        parts.append(_mark(x, y, bool(answer) and point["sparsity"] == answer["sparsity"], said))
    names = ["dense", *(f"{point['sparsity']:g}" for point in points)]
    first = names.index(f"{answer['sparsity']:g}") if answer else None
    parts += _labels(names, places, first)
    label = f"Perplexity ratio to dense, 1 to {max(ratios):.3g}, over parameters left, 100 to {100 * min(left):.0f} %"
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def _limits_ratio(answer: dict | None) -> bool:
    return answer is not None and answer["flag"] == "target_ppl_ratio"


def _axes(scale: _Scale) -> str:
    right, floor = scale.width - scale.right, scale.height - scale.bottom
    parts = []
    for ratio in _ratio_ticks(*scale.ratios):
        y = scale.y(ratio)
        parts.append(f'<line class="grid" x1="{scale.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="small" x="{scale.left - 6}" y="{y + 4:.1f}" text-anchor="end">{ratio:g}</text>')
    lost = 100 * (1 - scale.shares[1])
    step = next(step for step in (2, 5, 10, 20, 25, 50) if lost / step <= scale.width / 70 or step == 50)
    for gone in range(0, math.floor(lost) + 1, step):
        x = scale.x(1 - gone / 100)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.top}" y2="{floor}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{floor + 17}" text-anchor="middle">{100 - gone}</text>')
    middle = (scale.left + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{scale.height - 6}" text-anchor="middle">parameters left, %</text>')
    parts.append('<text x="4" y="13">perplexity, ratio to dense</text>')
    return "".join(parts)


def _ratio_ticks(least: float, most: float) -> Sequence[float]:
    decades = max(math.ceil(math.log10(most)), 1)
    powers = [10.0**power for power in range(0, decades + 1, math.ceil(decades / 6))]
    ticks = next((ticks for up_to, ticks in TICKS if most <= up_to), powers)
    return [tick for tick in ticks if least <= tick <= most]


def _mark(x: float, y: float, is_found: bool, said: str) -> str:
    """A ring, or the diamond of the point that was found."""
    title = f"<title>{escape(said)}</title>"
    if is_found:
        return f'<path class="found" d="M{x:.1f} {y - 9:.1f}l9 9-9 9-9-9z">{title}</path>'
    return f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'


def _labels(names: list[str], places: list[tuple[float, float]], first: int | None) -> list[str]:
    """Names above the places that have room for one, that of `first` before others; the table has them all."""
    order = sorted(range(len(names)), key=lambda index: (index != first, index))
    taken: list[tuple[float, float, float]] = []
    parts = []
    for index in order:
        x, y = places[index]
        end = x + 8 * len(names[index]) if index == 0 else x - 7  # the dense model's begins above it, others end before
        start = end - 8 * len(names[index])
        if any(start < right and left < end and abs(y - height) < 16 for left, right, height in taken):
            continue
        taken.append((start, end, y))
        at, side = (start, "start") if index == 0 else (end, "end")
        parts.append(f'<text x="{at:.1f}" y="{y - 10:.1f}" text-anchor="{side}">{names[index]}</text>')
    return parts


def _short(parameters: float) -> str:
    """A number of parameters as people say it."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= size:
            return f"{parameters / size:.4g}{unit}"
    return f"{parameters:g}"
