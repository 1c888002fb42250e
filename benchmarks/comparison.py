"""What the benchmarks of speed share: a dense model, checkpoints pruned from it, and the record of both."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

import olica  # noqa: F401
from olica.checks import check_record_path
from olica.errors import UsageError
from olica.evaluation.cost import weight_bytes
from olica.machine import DEVICES
from olica.model.skeleton import count_parameters
from olica.outputs.records import environment, flags_of, write_record
from olica.sources.locate import locate
from olica.sources.weights import DTYPES, read_model


def parser_of_models(description: str, batch_size: int) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark of speed has; `batch_size` is the default of its flag."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dense", required=True, help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--checkpoints", required=True, nargs="+", help="folders of pruned checkpoints")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="dtype to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="sequences at a time")
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds, a turn of every model in each")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def check_flags(args: argparse.Namespace, *numbers: str) -> None:
    """Raise UsageError for a model named twice, a record that cannot be written, or one of `numbers` below 1."""
    for name in ("batch_size", "repeats", *numbers):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    if len({args.dense, *args.checkpoints}) <= len(args.checkpoints):
        raise UsageError("--checkpoints: a model is named twice")
    if args.output_path:
        check_record_path(args.output_path, "--output_path")


def read_models(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, PreTrainedModel], dict[str, dict]]:
    """The models that the flags name, the dense one first, and what their records say of their sizes."""
    locations = {args.dense: locate(args.dense, "--dense")}
    locations |= {name: locate(name, "--checkpoints") for name in args.checkpoints}
    models = {name: read_model(location, args.dtype).to(device) for name, location in locations.items()}
    sizes = {
        name: {
            "parameters": count_parameters(model),
            "weight_bytes": weight_bytes(model),
            "file_bytes": locations[name].file_bytes,
        }
        for name, model in models.items()
    }
    return models, sizes


def draw_ids(models: dict[str, PreTrainedModel], batch_size: int, tokens: int) -> torch.Tensor:
    """Random token ids (B, T) that all the models know."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    return torch.randint(vocabulary, (batch_size, tokens), generator=torch.Generator().manual_seed(0))


def write_comparison(args: argparse.Namespace, kind: str, rows: dict[str, dict], device: torch.device) -> None:
    """Write the record of `rows`, one for each model, where `--output_path` says, if it says so."""
    if args.output_path:
        record = {"kind": kind, "settings": flags_of(args), "models": rows, "environment": environment(device)}
        write_record(args.output_path, record)
