"""Cut the texts of a data folder into rows that calibrate and rows that measure, so that no row ever does both.

    python scripts/split_texts.py --data_dir DATA --output_dir SPLIT

Of C4's first 1,000 documents the first 500 are for calibration and choices, the other 500 for reporting; of the eleven
novels nine are for calibration and two for reporting; of Alpaca's 6,000 rows the last 1,000 are for reporting, as the
prose that their prompts and answers make. Writes c4_calibrate.jsonl, c4_report.jsonl, and so on for novels and
instructions, to be given by their paths.
"""

import argparse
import gzip
import json
from pathlib import Path

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.sources.calibration_set import format_prompt

C4, C4_CALIBRATES = "c4_en_train_first1000.jsonl.gz", 500
NOVELS = "public_domain_novels.jsonl.gz"
ALPACA, ALPACA_CALIBRATES = "alpaca_6k.jsonl.gz", 5000
NOVELS_REPORTED = ("H. G. Wells, The War of the Worlds", "Zane Grey, Riders of the Purple Sage")


def build_parser() -> argparse.ArgumentParser:
    """The two folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True, help=f"folder with {C4}, {NOVELS} and {ALPACA}")
    parser.add_argument("--output_dir", type=Path, required=True, help="receives the parts")
    return parser


def read(path: Path) -> list[dict]:
    """The rows of a gzipped .jsonl."""
    if not path.is_file():
        raise UsageError(f"--data_dir: there is no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(args: argparse.Namespace) -> None:
    """Write the parts."""
    documents, passages, tasks = (read(args.data_dir / name) for name in (C4, NOVELS, ALPACA))
    parts = {
        "c4_calibrate": documents[:C4_CALIBRATES],
        "c4_report": documents[C4_CALIBRATES:],
        "novels_calibrate": [row for row in passages if row["book"] not in NOVELS_REPORTED],
        "novels_report": [row for row in passages if row["book"] in NOVELS_REPORTED],
        "instructions_calibrate": tasks[:ALPACA_CALIBRATES],
        "instructions_report": [{"text": format_prompt(row)} for row in tasks[ALPACA_CALIBRATES:]],
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        path = args.output_dir / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
