"""Print what the records in a checkpoint's folder say: the pruning, and the latest evaluation with the dense model.

python scripts/summary.py pruned_models/smollm2_sparsity-0.2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from olica.records import latest_evaluation, read_pruning_record  # noqa: E402


def rows(pruning: dict, evaluation: dict) -> list[tuple[str, str, str]]:
    """The lines of the table: name, dense, pruned."""
    dense, pruned = evaluation["results"]["dense"], evaluation["results"]["pruned"]

    def perplexity(result: dict) -> str:
        measured = result["perplexity"]
        return f"{measured['value']:.2f} +- {measured['standard_error']:.2f}"

    def seconds(stage: str) -> list[str]:
        taken = [row["minutes"] * 60 for name, row in evaluation["stages"].items() if name.startswith(stage)]
        return [f"{value:.0f} s" for value in taken]

    protocol = f"{evaluation['settings']['ppl']}, {dense['perplexity']['windows']} windows"
    stages = pruning["stages"].values()
    return [
        (f"perplexity ({protocol} of {dense['perplexity']['seqlen']})", perplexity(dense), perplexity(pruned)),
        ("parameters", f"{dense['parameters']['total']:,}", f"{pruned['parameters']['total']:,}"),
        (
            "parameters of the decoder layers",
            f"{dense['parameters']['decoder_layers']:,}",
            f"{pruned['parameters']['decoder_layers']:,}",
        ),
        (
            f"weights as {pruned['dtype']}",
            f"{dense['weight_bytes'] / 1e6:.1f} MB",
            f"{pruning['weight_bytes_on_disk'] / 1e6:.1f} MB",
        ),
        ("time of the perplexity", *seconds("perplexity")),
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
