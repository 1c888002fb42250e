"""Time the forward pass of a dense model and of checkpoints pruned from it, in turns within one process.

    python benchmarks/forward_speed.py --dense smollm2 --checkpoints pruned_models/smollm2_sparsity-0.33

About a minute on 2 cores for SmolLM2. Compare the ratios: absolute times are the machine's.
"""

import argparse

from comparison import check_flags, draw_ids, parser_of_models, read_models, write_comparison

import olica_stopping
from olica.command_line import run_command
from olica.evaluation.cost import forward_latency
from olica.machine import pick_device


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = parser_of_models(__doc__.splitlines()[0], batch_size=8)
    parser.add_argument("--seqlen", type=int, default=128, help="tokens per sequence")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the models, time them, print a table and write the record."""
    device = pick_device(args.device)
    check_flags(args, "seqlen")
    models, sizes = read_models(args, device)
    timed = forward_latency(models, draw_ids(models, args.batch_size, args.seqlen), args.repeats)
    rows = {name: timed[name] | sizes[name] for name in models}
    print(f"forward pass of {args.batch_size} x {args.seqlen} tokens, median of {args.repeats}, {device.type}")
    print(f"{'model':<40}{'parameters':>14}{'decoder layers':>16}{'weights MB':>12}{'seconds':>9}{'ratio':>7}")
    for name, row in rows.items():
        total, layers = row["parameters"]["total"], row["parameters"]["decoder_layers"]
        size = row["weight_bytes"] / 1e6
        print(f"{name:<40}{total:>14,}{layers:>16,}{size:>12.1f}{row['median_s']:>9.3f}{row['ratio']:>7.3f}")
    write_comparison(args, "forward speed", rows, device)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
