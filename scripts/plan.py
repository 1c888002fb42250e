"""Draw the sizes of all layers of a pruned checkpoint.

python scripts/plan.py pruned_models/smollm2_sparsity-0.2_olica-plus      writes plan.png there
"""

import argparse
import json
from pathlib import Path

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.outputs.records import read_pruning_record
from olica.report.plots import plan

FORMATS = (".png", ".svg", ".pdf")


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a pruned checkpoint")
    parser.add_argument("--output_path", type=Path, help="where it is drawn (plan.png in the folder)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw by the record and the configuration in the folder."""
    record = read_pruning_record(args.folder)
    if record is None or not (args.folder / "config.json").is_file():
        raise UsageError(f"{args.folder} lacks the record of a pruning, or a config.json")
    path = args.output_path or args.folder / "plan.png"
    if path.suffix not in FORMATS:
        raise UsageError(f"--output_path {path}: give a name that ends in {', '.join(FORMATS)}")
    check_record_path(path, "--output_path")
    hidden = json.loads((args.folder / "config.json").read_text())["hidden_size"]
    plan(record, hidden).savefig(path)
    print(path)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
