"""Write a model, a .gguf file too, as a folder of plain float32 weights that packages of any age read."""

import argparse
from pathlib import Path

import olica_stopping
from olica.command_line import run_command
from olica.outputs.checkpoint import add_former_names
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model


def build_parser() -> argparse.ArgumentParser:
    """The model and its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True, help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--output_path", type=Path, required=True, help="folder to write")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write weights, configuration and tokenizer."""
    location = locate(args.base_model)
    read_model(location, "float32").save_pretrained(args.output_path)
    read_tokenizer(location).save_pretrained(args.output_path)
    add_former_names(args.output_path / "config.json")  # which packages on transformers 4 read


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
