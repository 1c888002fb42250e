"""Prune a LLaMA-like checkpoint to several sparsities, measure each, and write a page to choose by."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse

from model_evaluate import row_limit
from model_pruning import parser_of_pruning
from olica.checks import COMMANDS_OWN
from olica.command_line import run_command
from olica.machine import pick_device
from olica.processes import working_together
from olica.report.sweep_page import answer_in_words
from olica.sweeping.plan import RECORD, SweepSettings, describe_sweep, plan_sweep
from olica.sweeping.work import run_sweep
from olica.terminal import with_error


def build_parser() -> argparse.ArgumentParser:
    """The flags of a pruning, with a range for --sparsity, and those of the sweep."""
    plain = SweepSettings
    parser = parser_of_pruning(
        __doc__,
        default=plain.sparsity,
        help="shares of the parameters to remove: START:END:STEP, END included, or several joined by commas",
    )
    add = parser.add_argument_group("held-back text and tasks").add_argument
    add("--held_back", type=int, default=plain.held_back, help="samples to measure on, drawn from each text")
    add(
        "--held_back_datasets",
        help="texts to draw them from, joined by +, or a token file; else what calibration leaves of --datasets",
    )
    add("--tasks", default=plain.tasks, help="zero-shot tasks of lm-eval to measure too, joined by commas; empty: none")
    add("--limit", type=row_limit, help="only the first so many rows of every task, or this share below 1, else all")
    add = parser.add_argument_group("search").add_argument
    add("--target_ppl_ratio", help="find the largest sparsity of at most so many times the dense model's perplexity")
    add("--max_params", help="find the smallest sparsity that leaves at most so many parameters: 900000000, 900M, 1.0B")
    add("--tolerance", default=plain.tolerance, help="of the sparsity that is found, at least 0.001")
    parser.add_argument_group("checkpoints").add_argument(
        "--keep", action="store_true", help="keep every point's checkpoint in --save_dir; else it goes once measured"
    )
    return parser


def print_point(point: dict) -> None:
    """Print what a point has come to."""
    left = f"{point['parameters']['total']:,} parameters"
    ratio = with_error(point["ratio"], point["ratio_error"], 3)
    print(f"sparsity {point['sparsity']:<6g} {left}, {ratio} times the dense perplexity", flush=True)


def run(args: argparse.Namespace) -> None:
    """Plan; unless that was all, do the sweep, and say where its page is and what it found."""
    given = {name: value for name, value in vars(args).items() if name not in COMMANDS_OWN}
    with working_together(pick_device(args.device)) as processes:
        plan = plan_sweep(given, processes)
        if processes.is_main:
            print(describe_sweep(plan, processes.count))
        if args.dry_run:
            return
        done = run_sweep(plan, print_point if processes.is_main else lambda _: None, processes)
    if not processes.is_main:
        return
    if answer := done.record["answer"]:
        print(f"found        {answer_in_words(answer)}; the command:\n{answer['command']}")
    print(f"record       {done.page.with_name(RECORD)}\npage         {done.page}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
