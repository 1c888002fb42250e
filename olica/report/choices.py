"""What `olica-plus` is made of: its parts added one by one, and refits by text and ridge.

The records are those of benchmarks/ablation.py and benchmarks/refit_texts.py, `ablation_*.json` and
`refit_texts_*.json` in the folder of the choices.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from ..evaluation.paired import compare_perplexity
from .methods import ratio_in_words
from .runs import MODELS, text_name
from .tables import Measured, markdown

FOLDER = Path("choices/olica_plus")


def tables(results: Path) -> list[str]:
    """A table for each record that is there, of ablations first."""
    made = {"ablation_*.json": ablation, "refit_texts_*.json": refit_texts}
    return [make(path) for pattern, make in made.items() for path in sorted((results / FOLDER).glob(pattern))]


def ablation(path: Path) -> str:
    """Perplexity as the parts are added one by one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    dense, points = record["dense"], record["points"]
    texts = list(dense["perplexity"])
    header = ["with", "parameters"]
    for text in texts:
        header += [text_name(text), f"{text_name(text)}, by this part"]
    rows = [["dense", f"{dense['parameters']['total']:,}"]]
    for text in texts:
        measured = dense["perplexity"][text]
        rows[0] += [str(Measured(measured["value"], measured["standard_error"])), ""]
    for before, point in zip([None, *points], points, strict=False):
        rows.append([point["step"], f"{point['parameters']['total']:,}"])
        for text in texts:
            rows[-1] += [ratio_in_words([_row(point, dense, text)]), _change(point, before, text) if before else ""]
    settings, calibration = record["settings"], record["calibration"]
    measured = next(iter(dense["perplexity"].values()))
    samples, tokens = calibration["ids"]
    about = (
        "Dense: perplexity. Others: its ratio to that of the dense model, and by how much the part that was added last "
        "changes it, both with the paired error."
    )
    notes = [
        f"{100 * settings['sparsity']:.4g} % of the whole model gone, {samples} samples of {tokens} tokens of "
        f"{_named(source['name'] for source in calibration['sources'])}; {measured['windows']} windows of "
        f"{measured['seqlen']} tokens of texts that no other table reports; run in {settings['dtype']}.",
        _origin(path, "ablation", record),
    ]
    return markdown(f"Parts of olica-plus, one by one: {_model(path, 'ablation', record)}", header, rows, notes, about)


def refit_texts(path: Path) -> str:
    """The error that a refit leaves, by the text that it is fitted to, the ridge and the text it is measured on."""
    record = json.loads(path.read_text(encoding="utf-8"))
    texts = list(record["texts"])
    rows = [
        [_named(row["fitted_to"]), f"{row['ridge']:g}", *(f"{row['measured_on'][text]:.3f}" for text in texts)]
        for row in record["error_left"]
        if len(row["fitted_to"]) in (1, len(texts))  # the record has all mixes
    ]
    settings = record["settings"]
    about = (
        "Error of a refitted MLP as a share of that of the same channels as they were, the geometric mean over the "
        "layers: below 1 the refit helps."
    )
    notes = [
        f"{100 * settings['share']:g} % of the channels stay, those that the text of the fit chooses.",
        f"{settings['num_samples']} samples of each text, half of them to fit to and half to measure on.",
        "The ridge is in units of the mean of the diagonal.",
        "Fitted to single texts and to all of them together; the record has the other mixes too.",
        _origin(path, "refit_texts", record),
    ]
    title = f"Fitted to one text, measured on another: {_model(path, 'refit_texts', record)}"
    return markdown(title, ["fitted to", "ridge", *map(text_name, texts)], rows, notes, about)


def _row(point: dict, other: dict, text: str) -> dict:
    """How a point's perplexity differs from another's."""
    return compare_perplexity(point["perplexity"][text], other["perplexity"][text])


def _change(point: dict, before: dict, text: str) -> str:
    row = _row(point, before, text)
    error = row["standard_error"]
    return f"{Measured(100 * (row['ratio'] - 1), error and 100 * row['ratio'] * error, digits=1, sign='+')} %"


def _model(path: Path, script: str, record: dict) -> str:
    """The model's name as in the sections of the runs, or else what its files say of it."""
    return MODELS.get(path.stem.removeprefix(f"{script}_"), record["model"]["description"])


def _origin(path: Path, script: str, record: dict) -> str:
    made = record["environment"]
    return (
        f"Record: `{path.as_posix()}`, made by `benchmarks/{script}.py` at commit {made['git_commit']} on "
        f"{made['device']}, {made['cpu_threads']} threads."
    )


def _named(texts: Iterable[str]) -> str:
    """What tables call several texts."""
    return " + ".join(map(text_name, texts))
