"""Fewer tokens beside smaller layers: one table.

The runs are those of scripts/vocabulary.sh: `vocabulary/SIZE/dense` and `vocabulary/SIZE/sparsity-S`, where SIZE is the
number of tokens that stayed, or `all`.
"""

import json
import math

from ..outputs.records import VOCABULARY_RECORD
from .runs import Results, protocol, text_name
from .tables import markdown

FOLDER, ALL = "vocabulary", "all"
ABOUT = (
    "Bits per byte: the lower, the better. Tokens: those of the vocabulary that stayed. Layers: share of the decoder "
    "layers' parameters that stayed. Models of one size are beside each other. Windows of fewer tokens end a little "
    "earlier in the text."
)


def table(results: Results) -> str | None:
    """A row for each model, those of a size together; None where nothing is recorded."""
    whole = results.run(f"{FOLDER}/{ALL}/dense")
    if whole is None:
        return None
    folder, texts = results.folder / FOLDER, list(whole.result["perplexity"])
    sizes = [ALL, *sorted((path.name for path in folder.glob("*") if path.name.isdecimal()), key=int, reverse=True)]
    found = ((size, run) for size in sizes for run in results.runs(f"{FOLDER}/{size}"))
    runs = [(size, run) for size, run in found if run.result["perplexity"].keys() >= {*texts}]
    if len(runs) < 2:
        return None
    header = ["removed", "tokens", "layers", "parameters", *(f"{text_name(text)}, bits per byte" for text in texts)]
    before = whole.result["parameters"]
    rows = []
    # (Sorting keeps the order of those that are as large, to the percent.)
    for size, run in sorted(runs, key=lambda row: -round(row[1].result["parameters"]["total"] / before["total"], 2)):
        parameters = run.result["parameters"]
        rows.append(
            [
                f"{1 - parameters['total'] / before['total']:.1%}",
                ALL if size == ALL else f"{int(size):,}",
                f"{parameters['decoder_layers'] / before['decoder_layers']:.1%}",
                f"{parameters['total']:,}",
                *(bits_per_byte(run.result["perplexity"][text]) for text in texts),
            ]
        )
    named = {f"{size} tokens, {run.sparsity:g}" if run.pruning else f"{size} tokens": run for size, run in runs}
    smaller = dict.fromkeys(size for size, _ in runs if size != ALL)
    notes = [_chosen(size, json.loads((folder / size / VOCABULARY_RECORD).read_text())) for size in smaller]
    return markdown("Fewer tokens", header, rows, [*notes, *protocol(named)], ABOUT)


def bits_per_byte(measured: dict) -> str:
    """A recorded text's bits per byte with its standard error, which is that of the mean over the windows."""
    error = measured["standard_error"]
    if error is None:
        return f"{measured['bits_per_byte']:.3f}"
    nats = measured["predictions"] / measured["bytes"] / math.log(2)
    return f"{measured['bits_per_byte']:.3f} ± {error / measured['value'] * nats:.3f}"


def _chosen(size: str, record: dict) -> str:
    """By which texts tokens were chosen."""
    texts = " + ".join(text_name(source["name"]) for source in record["texts"])
    gone = f"{record['share_of_text_gone']:.2%} of theirs are gone"
    return f"The {int(size):,} tokens are those that {texts} have most; {gone}."
