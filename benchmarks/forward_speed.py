"""Time the forward pass of a dense model and of checkpoints pruned from it, in turns within one process.

    python benchmarks/forward_speed.py --dense smollm2 --checkpoints pruned_models/smollm2_sparsity-0.33

About a minute on 2 cores for SmolLM2-135M. Compare the ratios: absolute times are the machine's.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import olica  # noqa: E402, F401
from olica.checkpoint import check_record_path  # noqa: E402
from olica.command_line import run_command  # noqa: E402
from olica.cost import count_parameters, forward_latency, weight_bytes  # noqa: E402
from olica.devices import pick_device  # noqa: E402
from olica.errors import UsageError  # noqa: E402
from olica.model_source import DTYPES, locate, read_model  # noqa: E402
from olica.records import environment, write_record  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dense", required=True, help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--checkpoints", required=True, nargs="+", help="folders of pruned checkpoints")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="dtype to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences in a forward pass")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=9, help="counted forward passes of each model")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def run(args: argparse.Namespace) -> None:
    """Read the models, time them, print a table and write the record."""
    device = pick_device(args.device)
    if min(args.batch_size, args.seqlen, args.repeats) < 1:
        raise UsageError("--batch_size, --seqlen and --repeats must be at least 1")
    if len({args.dense, *args.checkpoints}) <= len(args.checkpoints):
        raise UsageError("--checkpoints: a model is named twice")
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    locations = {args.dense: locate(args.dense, "--dense")}
    locations |= {name: locate(name, "--checkpoints") for name in args.checkpoints}
    models = {name: read_model(location, args.dtype).to(device) for name, location in locations.items()}
    vocabulary = min(model.config.vocab_size for model in models.values())
    ids = torch.randint(vocabulary, (args.batch_size, args.seqlen), generator=torch.Generator().manual_seed(0))
    timed = forward_latency(models, ids, args.repeats)
    rows = {
        name: {
            **timed[name],
            "parameters": count_parameters(model),
            "weight_bytes": weight_bytes(model),
            "file_bytes": locations[name].file_bytes,
        }
        for name, model in models.items()
    }
    print(f"forward pass of {args.batch_size} x {args.seqlen} tokens, median of {args.repeats}, {device.type}")
    print(f"{'model':<40}{'parameters':>14}{'decoder layers':>16}{'weights MB':>12}{'seconds':>9}{'ratio':>7}")
    for name, row in rows.items():
        total, layers = row["parameters"]["total"], row["parameters"]["decoder_layers"]
        size = row["weight_bytes"] / 1e6
        print(f"{name:<40}{total:>14,}{layers:>16,}{size:>12.1f}{row['median_s']:>9.3f}{row['ratio']:>7.3f}")
    if args.output_path:
        settings = {name: str(value) for name, value in vars(args).items()}
        write_record(
            args.output_path,
            {"kind": "forward speed", "settings": settings, "models": rows, "environment": environment(device)},
        )


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
