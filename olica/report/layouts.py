"""Layouts of checkpoints beside each other: one table.

The runs are those of scripts/layouts.sh: `layouts/dense` and `layouts/NAME`; beside them lie the records of speed in
transformers and, where it was installed, in llama.cpp.
"""

import json
from pathlib import Path

from ..evaluation.paired import compare
from ..model.layouts import OWN_LAYOUT
from .methods import ratio_in_words
from .runs import Results, Run, protocol, text_name
from .tables import markdown, percent, perplexity

FOLDER = "layouts"
# Records of speed, by what ran the models.
SPEEDS = {
    "transformers": "generation_speed.json",
    "llama.cpp, float16": "llama_cpp_speed_f16.json",
    "llama.cpp, Q8_0": "llama_cpp_speed_q8_0.json",
}
STAGES = ("prefill", "decode")
SPEED = (
    "Speed: one sequence at a time; in each engine all models had their turn in every round of one process. Where "
    "llama.cpp cannot read a layout, there is no figure. Files in Q8_0 have sizes in multiples of 32, the layouts' "
    "default, so that they differ a little from their rows."
)


def table(results: Results) -> str | None:
    """A row for the dense model and for each layout at each sparsity; None where nothing is recorded."""
    dense, runs = results.run(f"{FOLDER}/dense"), [run for run in results.runs(FOLDER) if run.pruning]
    if dense is None or not runs:
        return None
    folder, texts = results.folder / FOLDER, list(dense.result["perplexity"])
    ratios = {run.folder: compare(run.result, dense.result)["perplexity"] for run in runs}
    runs = [run for run in runs if ratios[run.folder].keys() >= {*texts}]  # others were measured by other windows
    read = {engine: _read(folder / name) for engine, name in SPEEDS.items() if (folder / name).is_file()}
    header = ["removed", "layout", "parameters", "channels", *map(text_name, texts)]
    header += [f"{stage}, {engine}" for engine in read for stage in STAGES]
    rows = [["0%", "dense", f"{dense.result['parameters']['total']:,}", ""]]
    rows[0] += [str(perplexity(dense, text)) for text in texts] + _speeds(read, dense)
    order = [OWN_LAYOUT, "stock", "deci"]
    for run in sorted(runs, key=lambda run: (run.sparsity, order.index(_layout(run)))):
        widths = [shape["intermediate_size"] for shape in run.pruning["plan"]]
        cells = [percent(run.sparsity), _layout(run), f"{run.result['parameters']['total']:,}"]
        cells += [f"{min(widths)} to {max(widths)}" if len(set(widths)) > 1 else f"{widths[0]}"]
        rows.append(cells + [ratio_in_words([ratios[run.folder][text]]) for text in texts] + _speeds(read, run))
    about = (
        "Dense: perplexity. Others: its ratio to that of the dense model, with the paired error. Channels: of an MLP, "
        "over the layers."
    )
    about += " Speed: tokens per second of the dense model, of the others the time as a share of its." if read else ""
    notes = [SPEED] if read else []
    for engine, record in read.items():
        settings, machine = record["settings"], record["environment"]
        version = f" ({record['read_by']['llama.cpp']})" if "read_by" in record else ""
        notes.append(
            f"{engine}{version}: {settings['prompt_tokens']} tokens, continued by {settings['new_tokens']}, medians of "
            f"{settings['repeats']} rounds, threads: {settings.get('threads', machine['cpu_threads'])}."
        )
    return markdown("Layouts", header, rows, notes + protocol({_name(run): run for run in [dense, *runs]}), about)


def _layout(run: Run) -> str:
    return run.pruning["settings"]["layout"]


def _name(run: Run) -> str:
    return f"{_layout(run)} at {run.sparsity:g}" if run.pruning else "dense"


def _read(path: Path) -> dict:
    """A record of speed, its rows by the names of checkpoints."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "files" in record:
        rows = {row["file"].removesuffix(".gguf"): row for row in record["files"]}
    else:
        rows = {Path(name).name: row for name, row in record["models"].items()}
    return record | {"rows": rows}


def _speeds(read: dict[str, dict], run: Run) -> list[str]:
    """Prefill and decode of a model in every engine; empty where it did not run it."""
    settings = run.evaluation["settings"]
    name = Path(settings["checkpoint"] or settings["base_model"]).name
    cells = []
    for record in read.values():
        row = record["rows"].get(name)
        for stage in STAGES:
            if row is None:
                cells.append("")
            elif run.pruning:
                cells.append(f"{row[stage]['ratio']:.2f}")
            else:
                cells.append(f"{row[stage]['tokens_per_s']:,.0f} tokens/s")
    return cells
