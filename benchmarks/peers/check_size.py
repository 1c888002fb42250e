"""Refuse what a package of other people made of a dense model, unless it is as large as was asked for.

Figures are compared at equal size alone, so that nothing is measured of what is refused.
"""

import argparse

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.model.skeleton import count_parameters
from olica.sources.configuration import count_dense_parameters, read_config
from olica.sources.locate import locate
from olica.sources.weights import read_model

# What each value of --sparsity_of counts.
COUNTED = {"model": "total", "layers": "decoder_layers"}


def build_parser() -> argparse.ArgumentParser:
    """The two models, and by how much the size may differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder of the pruned model")
    parser.add_argument("--base_model", required=True, help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--sparsity", type=float, required=True, help="share of the parameters that was to go")
    parser.add_argument("--sparsity_of", default="model", choices=COUNTED, help="of what it is a share")
    parser.add_argument("--tolerance", type=float, default=0.005, help="share by which the size may differ")
    return parser


def run(args: argparse.Namespace) -> None:
    """Count the parameters of the loaded checkpoint, tied ones once.

    Raises:
        UsageError: they differ from what the dense model and the sparsity say by more than the tolerance.
    """
    counted, dense = COUNTED[args.sparsity_of], locate(args.base_model)
    expected = round(count_dense_parameters(dense, read_config(dense))[counted] * (1 - args.sparsity))
    found = count_parameters(read_model(locate(args.checkpoint, "--checkpoint")))[counted]
    if abs(found / expected - 1) > args.tolerance:
        raise UsageError(
            f"--checkpoint {args.checkpoint} has {found:,} parameters, not the {expected:,} (within "
            f"{args.tolerance:.1%}) that --sparsity {args.sparsity:g} leaves of {args.base_model}"
        )
    print(f"{found:,} parameters, {found / expected - 1:+.2%} of the {expected:,} that were asked for")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
