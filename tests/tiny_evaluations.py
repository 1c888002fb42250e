"""Evaluations of a tiny model in the current folder."""

import json
from pathlib import Path

import torch
from called import call
from conftest import save_tiny
from tiny_tasks import ROWS, WORDS, write_rows

import model_evaluate

FLAGS = ["--checkpoint=tiny", "--ppl=one.txt,two.txt", "--ppl_seqlen=32", "--tasks=piqa,hellaswag,boolq",
         "--data_dir=rows", "--batch_size=3"]  # fmt: skip
MEASURES = ["sizes", "perplexity of one.txt", "perplexity of two.txt", "piqa", "hellaswag", "boolq"]


def fill_with_evaluation() -> None:
    """Put a tiny model, two texts and some rows of three tasks into the current folder."""
    save_tiny("tiny", num_key_value_heads=2)
    for seed, name in enumerate(("one.txt", "two.txt")):
        order = torch.randint(len(WORDS), (150,), generator=torch.Generator().manual_seed(seed)).tolist()
        Path(name).write_text(" ".join(WORDS[index] for index in order))
    for stem in ("piqa_validation", "hellaswag_validation", "boolq_validation"):
        write_rows(Path("rows"), stem, [ROWS[stem] | {"idx": index} for index in range(5)])


def evaluate(*arguments: str) -> dict:
    """The record of a call that has to succeed."""
    assert call(model_evaluate, *arguments, "--output_path=eval.json") == 0
    return json.loads(Path("eval.json").read_text())
