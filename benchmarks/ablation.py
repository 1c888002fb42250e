r"""Perplexity of `olica-plus` as its parts are added one by one, from `olica-grouped` without corrections on.

    python benchmarks/ablation.py --datasets bookcorpus+alpaca --data_dir data --ppl wikitext2,c4.jsonl --sparsity 0.2

All steps have the same text, the same parameters (within a step of their sizes) and the same windows.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from copies import Copies, add_flags

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.methods.feed_forward import ThinnedMLP, balanced_importance
from olica.methods.moments import full
from olica.methods.olica import FAST_OND, OlicaParameters, released
from olica.methods.plus import PlusParameters, plus
from olica.methods.query_key import LowRankQueryKey
from olica.methods.recipe import Findings, Method
from olica.methods.refit import LeastSquares
from olica.methods.shares import grouped_sparsities
from olica.methods.sizes import Budget


@dataclass(frozen=True)
class Step:
    """A stage of the ablation.

    Attributes:
        about: what was added.
        method: the method with it.
    """

    about: str
    method: Method


def steps(ridge: float, probes: int) -> Iterator[Step]:
    """The steps, each with what the steps before it have."""
    base = released(OlicaParameters(mlp_num=0), rule=grouped_sparsities)
    whole = plus(PlusParameters(ridge=ridge, probes=probes))
    values, mlp = whole.passes[0][1], ThinnedMLP(balanced_importance)
    diagonal, complete = LowRankQueryKey(), LowRankQueryKey(full)
    yield Step("olica-grouped, no corrections", base)
    yield Step("+ channels by balanced norms", replace(base, passes=((mlp, diagonal, FAST_OND),)))
    yield Step("+ MLP behind the pruned attention", replace(base, passes=((diagonal, FAST_OND), (mlp,))))
    mlp = replace(mlp, refit=LeastSquares(ridge))
    yield Step("+ refit of down_proj", replace(base, passes=((diagonal, FAST_OND), (mlp,))))
    yield Step("+ whole second moment for queries and keys", replace(base, passes=((complete, FAST_OND), (mlp,))))
    unfitted = replace(values, refit=None)
    yield Step("+ value directions by activations", replace(base, passes=((complete, unfitted), (mlp,))))
    yield Step("+ refit of o_proj", replace(base, passes=((complete, values), (mlp,))))
    equal = replace(whole, allocate=replace(whole.allocate, is_uniform=True))
    yield Step("+ sizes by damage, equal in all layers", equal)
    yield Step("+ sizes by damage, for each layer: olica-plus", whole)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--sparsity", type=float, default=0.2, help="share of the whole model that goes")
    parser.add_argument("--ridge", type=float, default=PlusParameters.ridge, help="of the refits")
    parser.add_argument("--probes", type=int, default=PlusParameters.probes, help="samples that measure damage")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prune a copy in every step and print its perplexities."""
    copies = Copies("ablation", args)
    budget = Budget(copies.parameters["total"], args.sparsity)
    for step in steps(args.ridge, args.probes):
        try:
            step.method.allocate.before_survey(copies.sizes, budget)
        except ValueError as error:
            raise UsageError(f"--sparsity {args.sparsity:g}: {step.about}: {error}") from error
    copies.measure_dense()
    surveys: list[tuple[object, list[Findings]]] = []
    print(f"{'parameters':>12}  " + "".join(f"{name[:22]:>24}" for name in copies.names))
    for step in steps(args.ridge, args.probes):
        found = next((findings for survey, findings in surveys if survey == step.method.survey), None)
        if found is None:
            surveys.append((step.method.survey, found := copies.survey(step.method)))
        point = copies.prune_and_measure(step.method, budget, found, step=step.about)
        values = "".join(f"{of_text['value']:>24.2f}" for of_text in point["perplexity"].values())
        print(f"{point['parameters']['total']:>12,}  {values}  {step.about}", flush=True)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
