r"""Perplexity of a recipe by the text that it is calibrated on: sources, mixes, lengths and amounts.

    python benchmarks/texts.py --mixes bookcorpus+alpaca,bookcorpus+alpaca+c4 --data_dir data --ppl wikitext2,ptb

Every mix gets the same number of tokens, its texts equal parts of them. Texts that a table reports are no place to
choose.
"""

import argparse
from itertools import product

from copies import Copies, add_flags

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.methods.recipes import RECIPES
from olica.methods.sizes import Budget
from olica.sources.calibration_set import Draw


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_flags(parser, one_text=False)
    parser.add_argument("--mixes", required=True, help="mixes joined by commas, each of texts joined by +")
    parser.add_argument("--samples", type=int, nargs="+", default=[192], help="of 128 tokens, in all texts of a mix")
    parser.add_argument("--seqlens", type=int, nargs="+", default=[128], help="tokens in a sample")
    parser.add_argument("--recipe", default="olica-plus", choices=RECIPES, help="with its parameters' defaults")
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the parameters that goes")
    parser.add_argument("--sparsity_of", default="total", choices=["total", "decoder_layers"], help="of which it is")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prune a copy with every text and print its perplexities."""
    copies = Copies("texts", args)
    recipe = RECIPES[args.recipe]
    method = recipe.method(recipe.parameters())
    budget = Budget(copies.parameters[args.sparsity_of], args.sparsity)
    try:
        method.allocate.before_survey(copies.sizes, budget)
    except ValueError as error:
        raise UsageError(f"--sparsity {args.sparsity:g}: {error}") from error
    copies.measure_dense()
    print("".join(f"{name[:22]:>24}" for name in copies.names))
    print("".join(f"{copies.dense[name]['value']:>24.2f}" for name in copies.names) + "  dense", flush=True)
    for mix, samples, seqlen in product(args.mixes.split(","), args.samples, args.seqlens):
        of_each = samples * 128 // (seqlen * len(mix.split("+")))
        calibration = copies.calibrate_on(mix, Draw(of_each, seqlen))
        point = copies.prune_and_measure(method, budget, copies.survey(method), mix=mix, calibration=calibration)
        values = "".join(f"{of_text['value']:>24.2f}" for of_text in point["perplexity"].values())
        print(f"{values}  {mix}, {of_each} x {seqlen} of each", flush=True)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
