"""What the calibration text does: recipes calibrated on one text each, measured on all; one table.

The runs are those of scripts/texts.sh: `texts/dense` and `texts/NAME_RECIPE`.
"""

from ..evaluation.paired import compare
from .methods import ratio_in_words
from .runs import Results, Run, protocol, text_name
from .tables import markdown, perplexity

FOLDER = "texts"


def table(results: Results) -> str | None:
    """A row for the dense model and for each recipe with each text; None where nothing is recorded."""
    dense, runs = results.run(f"{FOLDER}/dense"), [run for run in results.runs(FOLDER) if run.pruning]
    if dense is None or not runs:
        return None
    corpora = list(dense.result["perplexity"])
    ratios = {run.folder: compare(run.result, dense.result)["perplexity"] for run in runs}
    runs = [run for run in runs if ratios[run.folder].keys() >= {*corpora}]  # others were measured by other windows
    runs.sort(key=lambda run: (run.recipe, _parts(run), _name(run)))
    best = {
        (recipe, corpus): min(ratios[run.folder][corpus]["ratio"] for run in runs if run.recipe == recipe)
        for recipe in {run.recipe for run in runs}
        for corpus in corpora
    }
    rows = [["dense", "", *(str(perplexity(dense, corpus)) for corpus in corpora)]]
    for run in runs:
        found = [ratios[run.folder][corpus] for corpus in corpora]
        is_best = [row["ratio"] == best[run.recipe, corpus] for row, corpus in zip(found, corpora, strict=True)]
        words = [ratio_in_words([row]) for row in found]
        rows.append([run.recipe, _name(run), *(f"**{w}**" if b else w for w, b in zip(words, is_best, strict=True))])
    about = (
        "Dense: perplexity. Others: its ratio to the dense model's, with the paired error; the best of each recipe on "
        "a corpus in bold. `scripts/texts.sh` says what the names stand for."
    )
    notes = protocol({"dense": dense} | {f"{run.recipe} by {_name(run)}": run for run in runs})
    header = ["recipe", "calibrated on", *map(text_name, corpora)]
    return markdown("Calibrated on, measured on", header, rows, notes, about)


def _name(run: Run) -> str:
    return run.folder.name.removesuffix(f"_{run.recipe}")


def _parts(run: Run) -> int:
    """How many texts it was calibrated on."""
    return len(run.pruning["calibration"]["sources"])
