"""What people compare a pruned model with: one table.

The runs are those of scripts/compare.sh: `compare/LENGTH/NAME` for windows of LENGTH tokens, and `compare/chat/NAME`
for what the models answered. A name is `dense` or `sparsity-S`; in the folder `lora` lies what a short LoRA made of
these, in `four-bits` what 4 bits did, in `smaller` a smaller dense model.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..evaluation.paired import compare
from .methods import asked, ratio_in_words
from .runs import Results, Run, measuring, on_times, origin, origins, protocol, statements, text_name
from .tables import Measured, markdown, perplexity

FOLDER, DENSE = "compare", "dense"
# Tokens of a window; what the table says of a run is that of the first.
LENGTHS = ("128", "2048")
# What is said of a model, by the folder that its runs lie in.
KINDS = {"": "", "lora": ", after LoRA", "four-bits": ", in 4 bits", "smaller": ", dense"}
ABOUT = "Perplexity, and in brackets its ratio to the dense model's on the same windows, with the paired error."
CHAT = {"right": "right", "stopped": "end by themselves", "go_round": "go round", "faultless": "without a fault"}


@dataclass(frozen=True)
class Row:
    """What is recorded of one model.

    Attributes:
        kind: a key of KINDS.
        runs: by the length of their windows, that of the first of LENGTHS at least.
        training: the record of its LoRA, if it had one.
        chat: that of its answers, if it was asked.
    """

    kind: str
    runs: dict[str, Run]
    training: dict | None
    chat: dict | None

    @property
    def run(self) -> Run:
        """That of the first length."""
        return self.runs[LENGTHS[0]]

    @property
    def size(self) -> tuple[float, str]:
        """The sparsity that was asked for, and of what."""
        settings = self.run.pruning["settings"] if self.run.pruning else {}
        return self.run.sparsity, settings.get("sparsity_of", "model")

    @cached_property
    def name(self) -> str:
        """The model in words, without its size."""
        of_family = "dense" if self.run.pruning is None else self.run.recipe
        return (self.run.result["model"]["name"] if self.kind == "smaller" else of_family) + KINDS[self.kind]

    @property
    def minutes(self) -> str:
        """Of the pruning and the LoRA; empty where there was neither."""
        taken = [self.run.seconds] if self.run.pruning else []
        taken += [self.training["seconds"]] if self.training else []
        return f"{sum(taken) / 60:.1f}" if taken else ""


def table(results: Results) -> str | None:
    """A row for every model; None where nothing but the dense one is recorded."""
    rows = _rows(results)
    dense = next((row for row in rows if row.name == DENSE), None)
    if dense is None or len(rows) == 1:
        return None
    measured = [(length, text) for length, run in dense.runs.items() for text in run.result["perplexity"]]
    header = ["removed", "model", "parameters", "MB of weights", "minutes"]
    header += [f"{text_name(text)}, {length} tokens" for length, text in measured]
    has_chat = any(row.chat for row in rows)
    header += [f"chat: {words}" for words in CHAT.values()] if has_chat else []
    cells = []
    for row in rows:
        result = row.run.result
        sizes = [f"{result['parameters']['total']:,}", f"{result['weight_bytes'] / 1e6:,.1f}", row.minutes]
        figures = [_perplexity(row, dense, length, text) for length, text in measured]
        cells.append([asked(row.size), row.name, *sizes, *figures, *(_chat(row.chat) if has_chat else [])])
    return markdown("Retrained, in 4 bits, and as a chat", header, cells, _notes(rows, dense), ABOUT)


def _rows(results: Results) -> list[Row]:
    """All models of which windows of the first length were measured, by size, each size in the order of KINDS."""
    folder, found = results.folder / FOLDER, []
    for kind in KINDS:
        for run in results.runs("/".join(filter(None, (FOLDER, LENGTHS[0], kind)))):
            path = run.folder.relative_to(folder / LENGTHS[0])
            runs = {length: results.run(f"{FOLDER}/{length}/{path.as_posix()}") for length in LENGTHS}
            training, chat = (
                _read(place) for place in (run.folder / "lora.json", folder / "chat" / path / "chat.json")
            )
            found.append(Row(kind, {length: run for length, run in runs.items() if run}, training, chat))
    return sorted(found, key=lambda row: row.run.sparsity)


def _read(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _perplexity(row: Row, dense: Row, length: str, text: str) -> str:
    """A perplexity and, of the model that the dense one became, its ratio to that."""
    run, whole = row.runs.get(length), dense.runs[length]
    if run is None or text not in run.result["perplexity"]:
        return ""
    alike = compare(run.result, whole.result)["perplexity"].get(text)
    if row is dense or row.kind == "smaller" or alike is None:
        return str(perplexity(run, text))
    return f"{Measured(run.result['perplexity'][text]['value'])} ({ratio_in_words([alike])})"


def _chat(chat: dict | None) -> list[str]:
    """How many of the answers are what; empty where the model was not asked."""
    totals = chat["totals"] if chat else {}
    return [f"{totals[key]} of {totals['prompts']}" if totals else "" for key in CHAT]


def _notes(rows: list[Row], dense: Row) -> list[str]:
    """What is to be known of the table: how models were made and measured."""
    notes = [
        "The perplexity of a smaller model is per token of its own tokenizer.",
        "MB: of all weights as they were run, in 4 bits of the packed ones and what stays beside them.",
        "Minutes: of the pruning and of the LoRA.",
    ]
    source = dense.run.result["model"]
    if source["source"].endswith(".gguf"):
        notes.append(
            f"The dense model was dequantised from a GGUF file of {dense.run.result['file_bytes'] / 1e6:,.1f} MB "
            f"({source['description']}): its row is what that quantisation is worth, at the bytes of that file too, "
            "and the rows in 4 bits are of weights that are rounded a second time, to other steps."
        )
    notes += dict.fromkeys(_training(row.training) for row in rows if row.training)
    notes += dict.fromkeys(_four_bits(row.run.result["quantised"]) for row in rows if row.kind == "four-bits")
    notes += dict.fromkeys(_asking(row.chat) for row in rows if row.chat)
    named = {f"{row.name} {asked(row.size)}" if row.run.pruning else row.name: row for row in rows}
    runs = {name: row.run for name, row in named.items()}
    notes += protocol(runs) + on_times(runs)
    further = {name: run for name, row in named.items() for length, run in row.runs.items() if length != LENGTHS[0]}
    if further:
        notes += statements(measuring, further) + origins(further.values())
    chats = [row.chat["environment"] for row in rows if row.chat]
    return notes + ([origin({(dense.run.folder.parents[1] / "chat").as_posix()}, chats)] if chats else [])


def _training(record: dict) -> str:
    adapters, settings = record["adapters"], record["settings"]
    samples, tokens = record["samples"]["trained"]
    texts = " + ".join(Path(source["name"]).name for source in record["texts"]["sources"])
    return (
        f"LoRA: {samples} samples of {tokens} tokens ({texts}), epochs: {settings['epochs']}, rank {adapters['rank']}, "
        f"learning rate {adapters['learning_rate']:g}, seed {settings['seed']}, on every linear layer of the decoder."
    )


def _four_bits(quantised: dict) -> str:
    return (
        f"4 bits: {quantised['kind']} in blocks of {quantised['block']} by {quantised['library']}, the linear layers "
        "of the decoder alone; multiplied in float32."
    )


def _asking(record: dict) -> str:
    loop = record["loop"]
    return (
        f"Chat: {record['totals']['prompts']} prompts of `benchmarks/chat.py`, each alone through the tokenizer's chat "
        f"template, answered greedily by at most {record['new_tokens']} tokens. Right: all rules beside the prompt "
        f"hold; ends by itself: with a stop token; goes round: the same {loop['tokens']} tokens {loop['times']} times "
        "or more; without a fault: right, ended and not going round."
    )
