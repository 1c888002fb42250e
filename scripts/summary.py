"""Print what the records in a checkpoint's folder say: the pruning, and the latest perplexity beside the dense model's.

python scripts/summary.py pruned_models/smollm2_sparsity-0.2
"""

import argparse
from collections.abc import Callable

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.outputs.records import latest_comparison, note_on_survey, read_pruning_record, seconds_of_stages
from olica.terminal import with_error


def rows(pruning: dict, evaluation: dict) -> list[tuple[str, str, str]]:
    """The lines of the table: name, dense, pruned."""
    dense, pruned = evaluation["results"]["dense"], evaluation["results"]["pruned"]

    def shown(measured: dict) -> str:
        return with_error(measured["value"], measured["standard_error"], 2)

    def megabytes(size: int | None) -> str:
        return "hub" if size is None else f"{size / 1e6:.1f} MB"

    def seconds(name: str) -> str:
        taken = sum(evaluation["stages"][f"{name}: perplexity of {text}"]["minutes"] for text in dense["perplexity"])
        return f"{taken * 60:.0f} s"

    def both(cell: Callable[[dict], str]) -> tuple[str, str]:
        return cell(dense), cell(pruned)

    perplexities = [
        (
            f"perplexity ({text}, {measured['windows']} windows of {measured['seqlen']})",
            *both(lambda r, text=text: shown(r["perplexity"][text])),
        )
        if measured.get("bytes") == pruned["perplexity"][text].get("bytes")
        # Perplexities by different tokens say nothing of each other.
        else (f"bits per byte ({text})", *both(lambda r, text=text: f"{r['perplexity'][text]['bits_per_byte']:.4f}"))
        for text, measured in dense["perplexity"].items()
    ]
    peak = max(row["host_bytes"] for row in pruning["stages"].values())
    return [
        *perplexities,
        ("parameters", *both(lambda r: f"{r['parameters']['total']:,}")),
        ("parameters of the decoder layers", *both(lambda r: f"{r['parameters']['decoder_layers']:,}")),
        (f"weights as {pruned['dtype']}", *both(lambda r: megabytes(r["weight_bytes"]))),
        ("weight files on disk", *both(lambda r: megabytes(r["file_bytes"]))),
        ("time of the perplexity", seconds("dense"), seconds("pruned")),
        ("time of pruning", "", f"{sum(seconds_of_stages(pruning).values()):.0f} s"),
        (
            "peak host memory of pruning",
            "",
            f"{peak / 1e9:.2f} GB",
        ),
    ]


def build_parser() -> argparse.ArgumentParser:
    """The one argument."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder of a pruned checkpoint")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the table of a checkpoint's folder."""
    pruning, evaluation = read_pruning_record(args.folder), latest_comparison(args.folder)
    if pruning is None or evaluation is None:
        raise UsageError(f"{args.folder} lacks the record of a pruning, or of a perplexity measured --with_dense")
    print(f"{'':<48}{'dense':>20}{'pruned':>20}")
    for name, dense, pruned in rows(pruning, evaluation):
        print(f"{name:<48}{dense:>20}{pruned:>20}")
    if note := note_on_survey(pruning):
        print(f"{note}.")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
