"""Write a dense or pruned checkpoint as a GGUF file, for llama.cpp and what is built on it."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
from os.path import expanduser

from olica.command_line import run_command
from olica.outputs.gguf_file import FORMS, write_gguf


def build_parser() -> argparse.ArgumentParser:
    """The model, what is made of it, and where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("checkpoint", metavar="CHECKPOINT", help="name, hub id, folder or .gguf file")
    add = parser.add_argument_group("form").add_argument
    add("--gguf", choices=FORMS, default="f16", help="how matrices are stored; vectors are float32")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=expanduser, required=True, help="file that is written; ends in .gguf")
    add("--overwrite", action="store_true", help="replace an existing file")
    add("--verbose", action="store_true", help="print what the log holds, too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write the file and say how large it is."""
    size = write_gguf(args.checkpoint, args.output_path, args.gguf, args.overwrite)
    print(f"saved {args.output_path}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
