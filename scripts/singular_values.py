"""Record the singular values of the attention projections of some layers of a dense model, for Figure 2.

python scripts/singular_values.py --base_model smollm2 --output_path results/smollm2/figure2/singular_values.json
"""

import argparse
from os.path import expanduser
from pathlib import Path

import torch

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.machine import DEVICES, pick_device
from olica.model.modeling_olica import projections_of
from olica.outputs.records import environment, write_record
from olica.sources.configuration import describe_source, read_config, refuse_unprunable
from olica.sources.locate import locate
from olica.sources.opening import open_dense_model

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base_model", required=True, type=expanduser, help="name, hub id, folder or .gguf file")
    parser.add_argument("--layers", help="indices joined by commas (default: the first, a middle and the last one)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to decompose")
    parser.add_argument("--output_path", required=True, type=Path, help="file of the record")
    return parser


def chosen_layers(args: argparse.Namespace, number: int) -> list[int]:
    """The layers to look at, of `number`."""
    if args.layers is None:
        return sorted({0, number // 2, number - 1})
    try:
        layers = [int(index) for index in args.layers.split(",")]
    except ValueError:
        layers = [-1]
    if not all(0 <= index < number for index in layers):
        raise UsageError(f"--layers {args.layers}: give indices from 0 to {number - 1}, joined by commas")
    return layers


def rounded(values: torch.Tensor) -> list[float]:
    """Six digits of each, which are enough to draw."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def run(args: argparse.Namespace) -> None:
    """Read the layers one at a time and write their singular values, largest first."""
    check_record_path(args.output_path, "--output_path")
    location = locate(args.base_model)
    config = read_config(location)
    refuse_unprunable(config, location)
    layers = chosen_layers(args, config.num_hidden_layers)
    dense, device = open_dense_model(location), pick_device(args.device)
    values = {}
    for index, layer in dense.layers(device, "singular values"):
        if index in layers:
            projections = projections_of(layer)
            weights = {name: getattr(projections, name).weight.detach().double() for name in NAMES}
            values[str(index)] = {name: rounded(torch.linalg.svdvals(weight)) for name, weight in weights.items()}
    record = {
        "kind": "singular values",
        "model": describe_source(location, config),
        "layers": values,
        "environment": environment(device),
    }
    write_record(args.output_path, record)
    print(f"record {args.output_path}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
