"""The command lines, two of them on a tiny model and rows of text in the current folder."""

from pathlib import Path

import torch
from called import call
from conftest import save_tiny, write_json

import model_evaluate
import model_export
import model_pruning

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls read old books by candle light ".split()


def prose(seed: int, words: int) -> str:
    order = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[i] for i in order)


def fill_with_rows() -> None:
    """Put a tiny model and 20 rows of text into the current folder."""
    save_tiny("tiny", num_key_value_heads=2, tie_word_embeddings=True)
    write_json(Path("rows.jsonl"), [{"text": prose(seed, 60)} for seed in range(20)])


def prune(*arguments: str) -> int:
    defaults = ["--base_model=tiny", "--datasets=rows.jsonl", "--num_samples=6", "--seqlen=32", "--mlp_num=1"]
    return call(model_pruning, *defaults, "--ratio=0.1", *arguments)


def evaluate(*arguments: str) -> int:
    return call(model_evaluate, *arguments)


def export_model(*arguments) -> int:
    return call(model_export, *arguments)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
