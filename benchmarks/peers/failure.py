"""Record what could not be made to run, with what it said."""

import argparse
from pathlib import Path

import torch

import olica_stopping
from olica.command_line import run_command
from olica.outputs.records import environment, write_record

STEPS = ("install", "prune", "evaluate")


def build_parser() -> argparse.ArgumentParser:
    """What failed, where, and the file of its output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="what failed")
    parser.add_argument("--sparsity", type=float, required=True, help="that was asked of it")
    parser.add_argument("--packages", required=True, help="what was to be installed, as pip takes it")
    parser.add_argument("--step", required=True, choices=STEPS, help="in which step")
    parser.add_argument("--log", type=Path, required=True, help="file of what the step wrote")
    parser.add_argument("--hide", type=Path, nargs="*", default=[], help="folders whose paths say nothing to others")
    parser.add_argument("--output_path", type=Path, required=True, help="file of the record")
    return parser


def last_words(log: str) -> str:
    """The last line of a traceback or of a program's output, or a sentence if there is none."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]  # of pip, which goes on with advice
    return (errors or lines or ["it ended without a word"])[-1]


def run(args: argparse.Namespace) -> None:
    """Write the record and print its message."""
    words = last_words(args.log.read_text(errors="replace"))
    for folder in sorted(args.hide, key=lambda folder: -len(str(folder))):
        words = words.replace(f"{folder}/", "")
    failed = {"peer": args.peer, "sparsity": args.sparsity, "packages": args.packages.split()}
    failed |= {"step": args.step, "error": words, "environment": environment(torch.device("cpu"))}
    write_record(args.output_path, {"kind": "failure of a peer"} | failed)
    print(f"{args.peer}, {args.step}: {words}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
