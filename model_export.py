"""Write a checkpoint as a GGUF file, for llama.cpp and what is built on it, or a pruned one in another layout."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
from os.path import expanduser

from olica.checks import as_bytes
from olica.command_line import run_command
from olica.model.layouts import EXPORTS
from olica.outputs.export import export
from olica.outputs.gguf_file import FORMS, write_gguf
from olica.outputs.weight_shards import ABOUT_LARGEST_FILE, LARGEST_FILE


def build_parser() -> argparse.ArgumentParser:
    """The model, what is made of it, and where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("checkpoint", metavar="CHECKPOINT", help="name, hub id, folder or .gguf file")
    add = parser.add_argument_group("form").add_mutually_exclusive_group().add_argument
    add("--gguf", choices=FORMS, default="f16", help="a GGUF file: how matrices are stored; vectors are float32")
    add(
        "--layout",
        choices=[*EXPORTS],
        help="a folder in this layout, made of a checkpoint of the layout olica: "
        + "; ".join(f"{one.name}: {one.about}" for one in EXPORTS.values()),
    )
    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=expanduser, required=True, help="file, ending in .gguf, or folder that is written")
    add("--max_shard_size", default=LARGEST_FILE, help=f"with --layout: {ABOUT_LARGEST_FILE}")
    add("--overwrite", action="store_true", help="replace an existing file or checkpoint")
    add("--verbose", action="store_true", help="print what the log holds, too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write what is asked for and say how large it is."""
    if args.layout:
        largest = as_bytes("max_shard_size", args.max_shard_size)
        size = export(args.checkpoint, args.output_path, args.layout, largest, args.overwrite)
    else:
        size = write_gguf(args.checkpoint, args.output_path, args.gguf, args.overwrite)
    print(f"saved {args.output_path}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
