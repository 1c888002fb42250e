"""Print what the records in a checkpoint's folder say: the pruning, and the latest evaluation with the dense model.

python scripts/summary.py pruned_models/smollm2_sparsity-0.2
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from olica.records import latest_evaluation, read_pruning_record  # noqa: E402


def rows(pruning: dict, evaluation: dict) -> list[tuple[str, str, str]]:
    """The lines of the table: name, dense, pruned."""
    dense, pruned = evaluation["results"]["dense"], evaluation["results"]["pruned"]

    def perplexity(result: dict) -> str:
        measured = result["perplexity"]
        error = measured["standard_error"]
        return f"{measured['value']:.2f}" + ("" if error is None else f" +- {error:.2f}")

    def megabytes(size: int | None) -> str:
        return "hub" if size is None else f"{size / 1e6:.1f} MB"

    def seconds(name: str) -> str:
        return f"{evaluation['stages'][name]['minutes'] * 60:.0f} s"

    def both(cell: Callable[[dict], str]) -> tuple[str, str]:
        return cell(dense), cell(pruned)

    measured = dense["perplexity"]
    protocol = f"{evaluation['settings']['ppl']}, {measured['windows']} windows of {measured['seqlen']}"
    stages = pruning["stages"].values()
    return [
        (f"perplexity ({protocol})", *both(perplexity)),
        ("parameters", *both(lambda r: f"{r['parameters']['total']:,}")),
        ("parameters of the decoder layers", *both(lambda r: f"{r['parameters']['decoder_layers']:,}")),
        (f"weights as {pruned['dtype']}", *both(lambda r: megabytes(r["weight_bytes"]))),
        ("weight files on disk", *both(lambda r: megabytes(r["file_bytes"]))),
        ("time of the perplexity", seconds("dense: perplexity"), seconds("pruned: perplexity")),
        ("time of pruning", "", f"{sum(row['minutes'] for row in stages) * 60:.0f} s"),
        ("peak memory of pruning", "", f"{max(row['host_bytes'] for row in stages) / 1e9:.2f} GB"),
    ]


def main(folder: str) -> int:
    """Print the table of a checkpoint's folder."""
    pruning, evaluation = read_pruning_record(folder), latest_evaluation(folder)
    if pruning is None or evaluation is None or "dense" not in evaluation["results"]:
        print(f"{folder} has no record of a pruning and of an evaluation with --with_dense", file=sys.stderr)
        return 2
    print(f"{'':<48}{'dense':>20}{'pruned':>20}")
    for name, dense, pruned in rows(pruning, evaluation):
        print(f"{name:<48}{dense:>20}{pruned:>20}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
