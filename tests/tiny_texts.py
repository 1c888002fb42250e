"""Texts of a few letters, calibration sets drawn from them, and the texts of rows that were read."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from olica.sources.calibration_set import (
    Draw,
    build_calibration_set,
)


def builder(folder: Path, tokenizer) -> Callable:
    """`build_calibration_set` on a folder with small numbers, unless they are overridden."""

    def build(source, **overrides):
        settings = dict(
            tokenizer=tokenizer,
            data_dir=folder,
            cache_dir=folder / "calibration",
            vocab_size=320,
        )
        draw = replace(Draw(num_samples=8, seqlen=20, seed=3), **{
            name: overrides.pop(name)
            for name in ("num_samples", "seqlen", "seed", "add_bos_token", "candidates")
            if name in overrides
        })  # fmt: skip
        return build_calibration_set(str(source), draw=draw, **settings | overrides)

    return build


def prose(count=40, seed=0):
    """Rows of 5 to 60 letters: about a quarter is shorter than the 20 tokens asked for."""
    rng = random.Random(seed)
    return [{"text": "".join(rng.choices("abcdefgh ", k=rng.randint(5, 60)))} for _ in range(count)]


def draw_by_hand(texts, is_prompt, num_samples, seqlen, seed):
    """The draw written out plainly for the byte tokenizer: row numbers and texts of the windows."""
    rng, seen, drawn = random.Random(seed), [], []
    while len(drawn) < num_samples:
        row = rng.randint(0, len(texts) - 1)
        if row in seen:
            continue
        seen.append(row)
        if len(texts[row]) >= seqlen:
            start = 0 if is_prompt else rng.randint(0, len(texts[row]) - seqlen)
            drawn.append(texts[row][start : start + seqlen])
    return drawn, len(seen)


def cached(folder):
    return sorted(path.name for path in (folder / "calibration").iterdir())


def texts(rows):
    return list(rows.table[rows.text_field])
