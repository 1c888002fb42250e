"""Write a checkpoint as a GGUF file, for llama.cpp and what is built on it, in another layout, or with fewer tokens."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
from os.path import expanduser
from pathlib import Path

from olica.checks import as_bytes
from olica.command_line import run_command
from olica.errors import UsageError
from olica.model.layouts import EXPORTS
from olica.outputs.export import export
from olica.outputs.gguf_file import FORMS, write_gguf
from olica.outputs.vocabulary_export import WantedTokens, export_with_vocabulary
from olica.outputs.weight_shards import ABOUT_LARGEST_FILE, LARGEST_FILE
from olica.sources.model_files import folder_weight_bytes


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
    add(
        "--vocab_size",
        type=int,
        help="a folder with at most so many tokens, special ones among them: those that --datasets has most, and what "
        "these are made of",
    )
    add = parser.add_argument_group("text, for --vocab_size").add_argument
    add("--datasets", help="texts whose rarest tokens go: names or paths joined by +")
    add("--data_dir", type=expanduser, default="./data", help="folder searched first for texts")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", type=expanduser, required=True, help="file, ending in .gguf, or folder that is written")
    add("--max_shard_size", default=LARGEST_FILE, help=f"of a folder: {ABOUT_LARGEST_FILE}")
    add("--overwrite", action="store_true", help="replace an existing file or checkpoint")
    add("--verbose", action="store_true", help="print what the log holds, too")
    return parser


def run(args: argparse.Namespace) -> None:
    """Write what is asked for and say how large it is."""
    largest = as_bytes("max_shard_size", args.max_shard_size)
    if args.vocab_size is not None:
        if not args.datasets:
            raise UsageError("--vocab_size: name texts by --datasets, whose rarest tokens can go")
        wanted = WantedTokens(args.vocab_size, args.datasets, Path(args.data_dir))
        done = export_with_vocabulary(args.checkpoint, args.output_path, wanted, largest, args.overwrite)
        tokens, parameters = done["tokens"], done["parameters"]
        gone = f"{done['share_of_text_gone']:.2%} of the texts' tokens are gone"
        print(f"tokens {tokens['before']:,} -> {tokens['after']:,}; {gone}")
        print(f"parameters {parameters['before']:,} -> {parameters['after']:,}")
        size = folder_weight_bytes(args.output_path)
    elif args.datasets:
        raise UsageError("--datasets is for --vocab_size; leave it out")
    elif args.layout:
        size = export(args.checkpoint, args.output_path, args.layout, largest, args.overwrite)
    else:
        size = write_gguf(args.checkpoint, args.output_path, args.gguf, args.overwrite)
    print(f"saved {args.output_path}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
