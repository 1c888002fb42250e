"""The page of a sweep, from made-up records."""

import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from olica.report.sweep_page import page


class Read(HTMLParser):
    """What a page holds."""

    VOID = {"meta", "br", "line", "rect", "circle", "path", "polyline"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.strips, self.texts = [], Counter(), [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "svg":
            self.bars = self.strips.setdefault(attributes["aria-label"], [])
        if tag == "rect" and attributes["class"] == "bar":
            self.bars.append(float(attributes["height"]))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))


def made_record(layers: int, sparsities: list[float], **changes) -> dict:
    """The record of a sweep that never was: layer i keeps the share 1 - s (i + 1) / L of its MLP."""
    whole = {"query_key": 400, "value_output": 400, "mlp": 1200, "correction": 0}

    def model(sparsity: float) -> dict:
        total = round(10_000 * (1 - sparsity))
        measured = {"value": 20 * math.exp(sparsity), "standard_error": 0.5}
        return {
            "parameters": {"total": total, "decoder_layers": total - 1000},
            "weight_bytes": 4 * total,
            "perplexity": {"held-back text": measured},
            "layers": [whole | {"mlp": 1200 * (1 - sparsity * (index + 1) / layers)} for index in range(layers)],
        }

    def point(sparsity: float) -> dict:
        return model(sparsity) | {
            "sparsity": sparsity,
            "ratio": math.exp(sparsity),
            "ratio_error": 0.01,
            "damage": [0.01 * (index + 1) for index in range(layers)],
            "command": f"python model_pruning.py --base_model tiny --sparsity {sparsity:g}",
            "pruning_seconds": 90.0,
        }

    drawn = {"sources": [{"name": "text.jsonl"}], "ids": [8, 24]}
    return {
        "settings": {"limit": None},
        "command": "python model_sweep.py --base_model tiny",
        "recipe": {"name": "olica", "about": "the paper's"},
        "model": {"name": "tiny", "description": "a tiny model"},
        "calibration": drawn,
        "held_back": drawn,
        "dense": model(0.0),
        "points": [point(sparsity) for sparsity in sparsities],
        "answer": None,
        "date": "2026-01-01T00:00:00+00:00",
        "environment": {"olica": "1", "packages": {"torch": "2"}, "device": "cpu"},
    } | changes


@pytest.mark.parametrize("layers", [30, 80])
@pytest.mark.parametrize("sparsities", [[0.2], [0.1, 0.2, 0.3, 0.4, 0.5], [round(0.05 * n, 2) for n in range(1, 17)]])
def test_the_page_holds_every_layer_of_every_point_and_needs_nothing_else(layers, sparsities):
    text = page(made_record(layers, sparsities))
    read = Read(text)
    assert not read.open
    assert not re.search(r"https?:|//|url\(|@import|@font-face", text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & read.tags.keys()
    assert not {"src", "href", "xlink:href", "srcset", "data"} & {name for name, _ in read.attributes}
    assert "prefers-color-scheme: dark" in text and ("name", "viewport") in read.attributes
    rows = [said for tag, said in read.texts if tag == "th"]
    headings = [said for tag, said in read.texts if tag == "h3"]
    for sparsity in sparsities:
        assert f"{sparsity:g}" in rows
        assert headings.count(f"Sparsity {sparsity:g}") == 2, "its parts, and its command"
        assert re.sub("<[^>]*>", "", text).count(f"--sparsity {sparsity:g}\n") == 1
    # One row of bars for what is left in all; three parts, some of which are alike at all points, and the damage.
    assert text.count('class="bar"') == len(sparsities) * layers * 5
    widest = {label: bars for label, bars in read.strips.items() if label.startswith("MLP")}
    last = f"least {1 - sparsities[-1]:.1%} (layer {layers - 1})"
    (bars,) = (bars for label, bars in widest.items() if last in label)
    wanted = [100 * (1 - sparsities[-1] * (index + 1) / layers) for index in range(layers)]
    assert bars == pytest.approx(wanted, abs=0.051)
    damage = next(bars for label, bars in read.strips.items() if label.startswith("damage"))
    assert damage[:layers] == pytest.approx([100 * (index + 1) / layers for index in range(layers)], abs=0.051)


def circles(text: str) -> list[tuple[float, float, str]]:
    """The points of the first curve: places, and what they say."""
    found = re.findall(r'<circle class="point" cx="([\d.]+)" cy="([\d.]+)" r="5"><title>([^<]*)', text)
    return [(float(x), float(y), said) for x, y, said in found[: len(found) // 2]]


def test_the_curve_is_to_scale():
    """Parameters left to the right in equal steps; exp(s) on a logarithmic axis rises in equal steps too."""
    text = page(made_record(3, [0.1, 0.2, 0.3, 0.4]))
    places = circles(text)
    assert places[0][2] == "dense" and places[2][2].startswith("sparsity 0.2: 80.0 % left, 1.221 ± 0.010 times")
    for axis, sign in ((0, 1), (1, -1)):
        steps = [sign * (b[axis] - a[axis]) for a, b in zip(places[:-1], places[1:], strict=True)]
        assert min(steps) > 20 and max(steps) - min(steps) < 0.3
    labels = re.findall(r'<text [^>]*text-anchor="end">([\d.]+)</text>', text)
    assert {"0.1", "0.2", "0.3", "0.4"} <= {*labels}


@pytest.mark.parametrize("ratio", [0.9, 1.0, 1.001, 1.3, 25.0, 3e4, 1e12])
def test_the_curve_has_ticks_and_room_at_any_ratio(ratio):
    record = made_record(3, [0.1, 0.2])
    record["points"][1] |= {"ratio": ratio, "ratio_error": ratio / 2}
    text = page(record)
    picture = text.split("<svg", 2)[1]
    for y in map(float, re.findall(r'(?:cy|y1|y2)="([-\d.]+)"', picture)):
        assert 0 <= y <= 400
    ticks = re.findall(r'<text class="small" x="\d+" y="[\d.]+" text-anchor="end">', picture)
    assert 1 <= len(ticks) <= 11


@pytest.mark.parametrize(
    ("flag", "limit", "words"),
    [
        ("target_ppl_ratio", 1.25, "the largest sparsity with at most 1.25 times the dense perplexity is 0.2"),
        ("max_params", 8000, "the smallest sparsity that leaves at most 8,000 parameters is 0.2"),
    ],
)
def test_what_was_found_is_told_by_more_than_colour(flag, limit, words):
    record = made_record(3, [0.1, 0.2, 0.3])
    found = {name: record["points"][1][name] for name in ("sparsity", "ratio", "ratio_error", "parameters", "command")}
    text = page(record | {"answer": {"flag": flag, "limit": limit, "tolerance": 0.01, **found}})
    assert f"{words}, within 0.01: 8,000 parameters" in text
    assert text.count('class="found"') == text.count('class="limit"') == 2, "on wide screens and on narrow ones"
    assert ">limit " in text and ">0.2 (found)</th>" in text
    assert 'class="found"' not in page(record) and 'class="limit"' not in page(record)


def test_names_are_text_and_no_markup():
    named = {"name": "<b>&", "description": "<script>alert(1)</script>"}
    text = page(made_record(3, [0.2], model=named))
    assert "<script" not in text and "<h1>Sparsity of &lt;b&gt;&amp; by olica</h1>" in text


def test_without_damage_and_without_points():
    record = made_record(3, [0.2])
    record["points"][0]["damage"] = None
    assert "damage" not in page(record).split("</style>")[1].lower()
    assert "no point is there yet" in page(record | {"points": []})
