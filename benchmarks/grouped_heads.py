r"""Perplexity of a model pruned with other shares of the attention projections, the MLPs losing the rest.

    python benchmarks/grouped_heads.py --datasets alpaca --data_dir data --ppl a.jsonl,b.jsonl \
        --points 0.1:0.2,0.2 0.1:0.5,0

A point is SPARSITY:QUERY,KEY or SPARSITY:QUERY,KEY,VALUE_OUTPUT, the sparsity a share of the decoder layers; where
value/output is not given it loses what the released code takes. All points are measured on the same windows, so their
differences are surer than their standard errors; the record has the windows. Texts that a table reports are no place to
choose.
"""

import argparse
from dataclasses import dataclass, replace

from copies import Copies, add_flags

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.jobs import plan_before_survey
from olica.methods.recipe import Method
from olica.methods.recipes import RECIPES
from olica.methods.shares import Sparsities, released_sparsities, spend_rest
from olica.methods.sizes import Budget, Sizes


@dataclass(frozen=True)
class Point:
    """A sparsity of the whole model, and shares that the attention projections lose."""

    sparsity: float
    query: float
    key: float
    value_output: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Point":
        """The point written as SPARSITY:QUERY,KEY or SPARSITY:QUERY,KEY,VALUE_OUTPUT."""
        sparsity, _, shares = text.partition(":")
        return cls(float(sparsity), *map(float, shares.split(",")))

    def shares(self, sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
        """What every part of a layer loses: a rule of `FixedShares`."""
        value_output = self.value_output
        if value_output is None:
            value_output = released_sparsities(sizes, budget, k).value_output
        return spend_rest(sizes, budget, self.query, self.key, value_output)

    def in_place_of(self, method: Method) -> Method:
        """The method with these shares."""
        return replace(method, allocate=replace(method.allocate, rule=self.shares))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_flags(parser)
    form = "SPARSITY:QUERY,KEY[,VALUE_OUTPUT]"
    parser.add_argument("--points", required=True, nargs="+", type=Point.parse, help=form)
    parser.add_argument("--mlp_num", type=int, default=6, help="number of MLPs that get a linear correction")
    return parser


def check_points(points: list[Point], method: Method, sizes: list[Sizes], whole: int) -> None:
    """Raise UsageError for a point that is impossible."""
    for point in points:
        budget = Budget(whole, point.sparsity)
        shape, *_ = plan_before_survey(RECIPES["olica"], point.in_place_of(method), sizes, budget)
        if shape.intermediate_size == sizes[0].intermediate_size:
            raise UsageError(f"--points: {point} leaves nothing for the MLPs to lose")


def run(args: argparse.Namespace) -> None:
    """Survey the model once, measure it, then prune a copy and measure that for every point."""
    recipe = RECIPES["olica"]
    method = recipe.method(recipe.with_parameters({"mlp_num": args.mlp_num}))
    copies = Copies("grouped heads", args)
    sizes, whole = copies.sizes, copies.parameters["decoder_layers"]
    check_points(args.points, method, sizes, whole)
    copies.measure_dense()
    findings = copies.survey(method)  # neither the bases nor the ranking of the layers depend on the sizes
    print(f"{'sparsity':>8}{'query':>8}{'key':>8}{'v/o':>8}{'MLPs':>8}{'parameters':>14}  " + "  ".join(copies.names))
    for point in args.points:
        placed, budget = point.in_place_of(method), Budget(whole, point.sparsity)
        shares = placed.allocate.shares(sizes, budget)
        measured = copies.prune_and_measure(placed, budget, findings, sparsity=point.sparsity, shares_removed=shares)
        lost = "".join(f"{share:>8.3f}" for share in shares.values())
        values = "  ".join(f"{of_text['value']:.2f}" for of_text in measured["perplexity"].values())
        print(f"{point.sparsity:>8g}{lost}{measured['parameters']['total']:>14,}  {values}", flush=True)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
