"""Write a model, a .gguf file too, as a folder of plain float32 weights that packages of any age read."""

import argparse
import json
from pathlib import Path

from olica.command_line import run_command
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
    model = read_model(location, "float32")
    model.save_pretrained(args.output_path)
    read_tokenizer(location).save_pretrained(args.output_path)
    # transformers 4 looks for the base of the rotary embedding here, and without it quietly takes another one.
    file = args.output_path / "config.json"
    config = json.loads(file.read_text())
    config.setdefault("rope_theta", model.config.rope_parameters["rope_theta"])
    file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    run_command(build_parser(), run)
