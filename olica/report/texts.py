"""What the calibration text does: recipes calibrated on one text each, measured on all; one table.

The runs are those of scripts/texts.sh: `texts/dense` and `texts/NAME_RECIPE`.
"""

from pathlib import Path

from ..evaluation.paired import compare
from .methods import ratio_in_words
from .runs import Results, Run, protocol
from .tables import markdown, perplexity

FOLDER = "texts"


def table(results: Results) -> str | None:
    """A row for the dense model and for each recipe with each text; None where nothing is recorded."""
    dense, runs = results.run(f"{FOLDER}/dense"), [run for run in results.runs(FOLDER) if run.pruning]
    if dense is None or not runs:
        return None
    corpora = list(dense.result["perplexity"])
    rows = [["dense", "", *(str(perplexity(dense, corpus)) for corpus in corpora)]]
    runs.sort(key=lambda run: (run.recipe, _parts(run), _name(run)))
    for run in runs:
        ratios = compare(run.result, dense.result)["perplexity"]
        least = [min(other.result["perplexity"][corpus]["value"] for other in _alike(run, runs)) for corpus in corpora]
        cells = [
            f"**{ratio_in_words([ratios[corpus]])}**"
            if run.result["perplexity"][corpus]["value"] == lowest
            else ratio_in_words([ratios[corpus]])
            for corpus, lowest in zip(corpora, least, strict=True)
        ]
        rows.append([run.recipe, _name(run), *cells])
    notes = [
        "Perplexity of the dense model; of the others the ratio to it, with the paired error, the best of each recipe "
        "on a corpus in bold. Texts that calibrate share no row with those that measure; encyclopaedia and wikitext2, "
        "prose and novels, instructions, and code and pysource are of one kind, web is of other sites than c4.",
        *protocol({"dense": dense} | {f"{run.recipe}, {_name(run)}": run for run in runs}),
    ]
    header = ["recipe", "calibrated on", *(Path(corpus).stem for corpus in corpora)]
    return markdown("Calibrated on, measured on", header, rows, notes)


def _name(run: Run) -> str:
    return run.folder.name.removesuffix(f"_{run.recipe}")


def _parts(run: Run) -> int:
    """How many texts it was calibrated on."""
    return len(run.pruning["calibration"]["sources"])


def _alike(run: Run, runs: list[Run]) -> list[Run]:
    return [other for other in runs if other.recipe == run.recipe]
