"""Pruners of other people, as they ship, beside ours: one table.

The runs are those of benchmarks/peers.sh: `peers_as_shipped/dense` and `peers_as_shipped/NAME`, which has
`failure.json` instead of a run's records where a package could not be made to run; and the same below `long`, with
longer windows. Ours are among them.
"""

import json
from dataclasses import dataclass
from functools import cached_property

from ..evaluation.paired import PAPER_METRIC, compare
from .methods import ratio_in_words
from .runs import Results, Run, limited, measuring, origin, text_name
from .tables import TASKS, Measured, accuracy, markdown, percent, perplexity

ABOUT = (
    "Dense: perplexity and accuracy. Others: the ratio of the perplexity to the dense model's and the difference of "
    "the accuracy in points, with the paired error."
)
FOLDER = "peers_as_shipped"
LONG = "long"


@dataclass(frozen=True)
class Recorded:
    """What is recorded of one model.

    Attributes:
        dense: the dense model, with windows of the usual length and the tasks.
        long: the runs with longer windows, by recipe and sparsity; the dense one by `None` and 0.
        peers: runs of other people's pruners.
        failures: records of those that did not run.
        ours: our runs, those of one recipe and size together, by seed.
    """

    dense: Run
    long: dict[tuple[str | None, float], Run]
    peers: list[Run]
    failures: list[dict]
    ours: list[list[Run]]

    @cached_property
    def texts(self) -> list[str]:
        """The corpora that were measured."""
        return list(self.dense.result["perplexity"])

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that were scored."""
        return list(self.dense.result.get("zero_shot", {"tasks": {}})["tasks"])

    @cached_property
    def long_texts(self) -> list[str]:
        """The corpora that were measured with longer windows."""
        dense = self.long.get((None, 0.0))
        return list(dense.result["perplexity"]) if dense else []


def read(results: Results) -> Recorded | None:
    """The records of a model; None where the dense one or all others are missing."""
    dense = results.run(f"{FOLDER}/dense")
    pruned = [run for run in results.runs(FOLDER) if run.pruning]
    peers, ours = [run for run in pruned if _is_peer(run)], [run for run in pruned if not _is_peer(run)]
    found = sorted((results.folder / FOLDER).glob("*/failure.json"))
    failures = [json.loads(path.read_text()) for path in found if not path.with_name("flags").exists()]
    if dense is None or not (peers or failures):
        return None
    runs = results.runs(f"{FOLDER}/{LONG}")
    long = {(run.recipe if run.pruning else None, run.sparsity): run for run in runs}
    grouped: dict[tuple[float, str], list[Run]] = {}
    for run in sorted(ours, key=lambda run: run.pruning["settings"]["seed"]):
        grouped.setdefault((run.sparsity, run.recipe), []).append(run)
    return Recorded(dense, long, peers, failures, [grouped[key] for key in sorted(grouped)])


def _is_peer(run: Run) -> bool:
    return "package" in run.pruning


def table(results: Results) -> str | None:
    """The table; None where nothing is recorded."""
    recorded = read(results)
    if recorded is None:
        return None
    header = ["removed", "pruner", "version", "tokens", "parameters", *map(text_name, recorded.texts)]
    header += [f"{text_name(text)}, long windows" for text in recorded.long_texts]
    header += [*(f"{TASKS[task]}, %" for task in recorded.tasks), "seconds", "peak memory, GB"]
    rows = [_dense_row(recorded)]
    sparsities = {run.sparsity for run in recorded.peers} | {failed["sparsity"] for failed in recorded.failures}
    for sparsity in sorted(sparsities):
        rows += [_peer_row(recorded, run) for run in recorded.peers if run.sparsity == sparsity]
        for failed in recorded.failures:
            if failed["sparsity"] == sparsity:
                names = [percent(sparsity), failed["peer"], ", ".join(failed["packages"]), "", "not run"]
                rows.append(names + [""] * (len(header) - len(names)))
        rows += [_our_row(recorded, runs) for runs in recorded.ours if runs[0].sparsity == sparsity]
    return markdown("Pruners of other people, as they ship", header, rows, _notes(recorded), ABOUT)


def _dense_row(recorded: Recorded) -> list[str]:
    result, long = recorded.dense.result, recorded.long.get((None, 0.0))
    cells = ["0%", "dense", "", "", f"{result['parameters']['total']:,}"]
    cells += [str(perplexity(recorded.dense, text)) for text in recorded.texts]
    cells += [str(perplexity(long, text)) for text in recorded.long_texts]
    for task in recorded.tasks:
        cells.append(str(accuracy(result["zero_shot"]["tasks"][task], PAPER_METRIC[task])))
    return [*cells, "", ""]


def _peer_row(recorded: Recorded, run: Run) -> list[str]:
    return _row(recorded, [run], run.pruning["package"])


def _our_row(recorded: Recorded, runs: list[Run]) -> list[str]:
    return _row(recorded, runs, f"olica {runs[0].pruning['environment']['olica']}")


def _row(recorded: Recorded, runs: list[Run], version: str) -> list[str]:
    """What a pruner of a version left: perplexity of all seeds, the rest of the first."""
    first = runs[0]
    compared = [compare(run.result, recorded.dense.result) for run in runs]
    tokens = first.pruning["calibration"]
    cells = [percent(first.sparsity), first.recipe, version]
    cells += [f"{tokens['ids'][0] * tokens['ids'][1]:,}" if tokens else "none"]
    cells += [f"{first.result['parameters']['total']:,}"]
    cells += [_ratio([row["perplexity"].get(text) for row in compared]) for text in recorded.texts]
    cells += _long_cells(recorded, first.recipe, first.sparsity)
    cells += [_difference(compared[0]["zero_shot"].get(task), task) for task in recorded.tasks]
    return [*cells, f"{first.seconds:.0f}", f"{first.peak_bytes / 1e9:.2f}"]


def _ratio(rows: list[dict | None]) -> str:
    return "" if None in rows else ratio_in_words(rows)


def _difference(metrics: dict | None, task: str) -> str:
    """Of a task's accuracy to the dense model's, in points."""
    if metrics is None:
        return ""
    row = metrics[PAPER_METRIC[task]]
    return str(Measured(row["difference"], row["standard_error"], sign="+"))


def _long_cells(recorded: Recorded, recipe: str, sparsity: float) -> list[str]:
    run, dense = (recorded.long.get(key) for key in ((recipe, sparsity), (None, 0.0)))
    compared = compare(run.result, dense.result)["perplexity"] if run and dense else {}
    return [_ratio([compared.get(text)]) for text in recorded.long_texts]


def _notes(recorded: Recorded) -> list[str]:
    """How the table was made, and what the packages that did not run said."""
    dense, long = recorded.dense, recorded.long.get((None, 0.0))
    calibrated = next((run for run in recorded.peers if run.pruning["calibration"]), None)
    lines = [
        "Packages are used as they ship, by their documented calls: all of them prune the MLPs alone, every layer to "
        "one width, and none but OSSCAR repairs what stays. Of nvidia-modelopt the scores are taken, the cut is ours.",
        "Of `olica` and its kin the perplexity is the geometric mean over the seeds, which drew other tokens of the "
        "same texts, followed by the least and the greatest; all else is of the first seed, which was calibrated on "
        "the same tokens as the others.",
    ]
    lines += [measuring(run) for run in (dense, long) if run]
    if calibrated:
        samples, tokens = calibrated.pruning["calibration"]["ids"]
        lines.append(f"Calibration: {samples} samples of {tokens} tokens, of {calibrated.texts}.")
    if scored := dense.result.get("zero_shot"):
        lines.append(f"Tasks: {scored['harness']}, {limited(scored['limit'])}, no examples.")
    lines += dict.fromkeys(f"{run.pruning['package']} ran with {_packages(run)}." for run in recorded.peers)
    lines += [
        f"Not run: {failed['peer']}, {percent(failed['sparsity'])}; step {failed['step']}: `{failed['error']}`"
        for failed in recorded.failures
    ]
    ours = [run for runs in recorded.ours for run in runs]
    runs = [dense, *recorded.peers, *ours, *recorded.long.values()]
    folders = {run.folder.parent.as_posix() for run in runs}
    return [*lines, origin(folders, [run.evaluation["environment"] for run in runs])]


def _packages(run: Run) -> str:
    """What a package of others ran with."""
    versions = run.pruning["environment"]["packages"]
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers"))
