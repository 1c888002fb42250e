"""The records of runs, and the paper's own figures, as tables and figures are made from them.

A run is a folder of records: `pruning.json` (unless it is the dense model's), `evaluation.json` and, when it is whole,
`flags`; scripts/common.sh writes them.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..outputs.names import recipe_in_words
from ..outputs.records import corrected_layers, has_former_shares, note_on_survey, seconds_of_stages

PAPER = Path(__file__).parents[2] / "results/paper"
TEXT = "wikitext2"
# Names of models in `MODEL_NAMES` and in the paper.
PAPER_MODELS = {
    "7b": "LLaMA-7B",
    "13b": "LLaMA-13B",
    "llama2-7b": "LLaMA-2-7B",
    "llama2-13b": "LLaMA-2-13B",
    "vicuna-7b": "Vicuna-7B",
    "vicuna-13b": "Vicuna-13B",
}
# What is said of other models; the paper has none of them.
OTHER_MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, dequantised from Q4_1",
    "gemma-3-270m": "Gemma 3 270M, dequantised from Q4_K_M",
    "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct, dequantised from Q4_K_M",
}
# The names for readers of all models that are known, by the folders of their records.
MODELS = PAPER_MODELS | OTHER_MODELS
# What tables call texts, by the names of their files without an ending, or by those that flags take.
TEXTS = {
    "wikitext2": "WikiText-2",
    "wikitext2_raw_validation": "WikiText-2 (validation)",
    "wikitext2_raw_train_slice": "WikiText-2 (training)",
    "c4": "C4",
    "c4_report": "C4",
    "c4_calibrate": "C4 (other documents)",
    "ptb": "PTB",
    "bookcorpus": "BookCorpus",
    "novels_report": "novels",
    "novels_calibrate": "novels",
    "public_domain_novels": "novels",
    "alpaca": "Alpaca",
    "alpaca_6k": "Alpaca",
    "instructions_report": "Alpaca",
    "instructions_calibrate": "Alpaca",
    "openwebtext_1000": "OpenWebText",
    "smollm2_ids": "novels + Alpaca",  # the reference samples
}
# What a pruning was asked for, beside its calibration set.
PRUNING_SETTINGS = ("sparsity", "k", "mlp_num", "ratio", "percdamp", "round_to", "seed")


@dataclass(frozen=True)
class Run:
    """The records of one run."""

    folder: Path

    @cached_property
    def pruning(self) -> dict | None:
        """The record of the pruning; None for a dense model."""
        path = self.folder / "pruning.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @cached_property
    def evaluation(self) -> dict:
        """The record of the evaluation."""
        return json.loads((self.folder / "evaluation.json").read_text())

    @property
    def result(self) -> dict:
        """What was measured."""
        return self.evaluation["results"]["model"]

    @property
    def perplexity(self) -> dict:
        """On the paper's text, or the first one where that was not measured."""
        measured = self.result["perplexity"]
        return measured[TEXT] if TEXT in measured else next(iter(measured.values()))

    def setup(self, *but: str) -> dict:
        """What was pruned and measured, and how, without what varies in a table or figure.

        A value that the record does not have is None.
        """
        settings, (samples, tokens) = self.pruning["settings"], self.pruning["calibration"]["ids"]
        measured, result = self.evaluation["settings"], self.result
        made = {name: settings.get(name) for name in PRUNING_SETTINGS}
        made |= {"recipe": self.recipe, "samples": samples, "tokens": tokens, "texts": self.texts}
        made |= {name: self.perplexity[name] for name in ("windows", "seqlen", "bos", "fingerprint")}
        made |= {"dtype": result["dtype"], "limit": measured["limit"]}
        return {name: value for name, value in made.items() if name not in but}

    @property
    def texts(self) -> str:
        """Names of the calibration texts."""
        return " + ".join(Path(source["name"]).name for source in self.pruning["calibration"]["sources"])

    @property
    def is_whole(self) -> bool:
        """Whether all windows and all rows were measured, as by the paper."""
        settings = self.evaluation["settings"]
        return settings["ppl_windows"] is None and settings["limit"] is None

    @property
    def recipe(self) -> str:
        """Of the pruning; another layout or repair, or former shares of grouped heads, are named."""
        settings = self.pruning["settings"]
        recipe = recipe_in_words(settings)
        return f"{recipe}, former shares" if has_former_shares(self.pruning) else recipe

    @property
    def sparsity(self) -> float:
        """Asked for; 0 of a dense model."""
        return self.pruning["settings"]["sparsity"] if self.pruning else 0.0

    @property
    def mlp_num(self) -> int:
        """How many MLPs were to be corrected."""
        return self.pruning["settings"]["mlp_num"]

    @property
    def seconds(self) -> float:
        """Time of the pruning, from the opening of the model on: whether the calibration set had been drawn is luck.

        So is whether the survey was there: one that was taken up counts as if it had been made. Of a run that was
        interrupted, the time of the other stages is that of its last part.
        """
        stages = seconds_of_stages(self.pruning).items()
        return sum(seconds for name, seconds in stages if name != "calibration set")

    @property
    def is_on_gpu(self) -> bool:
        """Whether it was pruned on one."""
        return self.pruning["environment"]["device"] != "cpu"

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the pruning: the device's on a GPU, else the host's."""
        where = "device_bytes" if self.is_on_gpu else "host_bytes"
        return max(stage[where] or 0 for stage in self.pruning["stages"].values())


@dataclass(frozen=True)
class Results:
    """The runs of one model, in the folder `results`/`label`, and what the paper says of it."""

    results: Path
    label: str

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.results / self.label

    @property
    def title(self) -> str:
        """The model's name for readers."""
        return MODELS.get(self.label, self.label)

    def run(self, name: str) -> Run | None:
        """A run by its name; None where it is not recorded as a whole."""
        folder = self.folder / name
        files = ["flags", "evaluation.json", *([] if folder.name == "dense" else ["pruning.json"])]
        return Run(folder) if all((folder / file).is_file() for file in files) else None

    def runs(self, folder: str) -> list[Run]:
        """The runs within a folder of runs."""
        found = sorted((self.folder / folder).glob("*/flags"))
        runs = (self.run(f"{folder}/{path.parent.name}") for path in found)
        return [run for run in runs if run is not None]

    def paper(self, table: int) -> list[dict]:
        """The paper's rows of this model; none for a model that it does not have.

        Tables 1, 4, 5 and 6 are all of LLaMA-7B. Rows that cannot be what they say are left out.
        """
        rows = json.loads((PAPER / f"table{table}.json").read_text())["rows"]
        name = PAPER_MODELS.get(self.label)
        return [row for row in rows if row.get("model", "LLaMA-7B") == name and not row.get("misprint")]

    def belongs_elsewhere(self, table: int) -> bool:
        """Whether the paper has this model, but not in that table."""
        return self.is_of_the_paper and not self.paper(table)

    def papers_notes(self, table: int) -> list[str]:
        """What is to be known of the paper's rows of this model; nothing if there are none."""
        notes = json.loads((PAPER / f"table{table}.json").read_text())["notes"]
        return [f"The paper: {note}" for note in notes] if self.paper(table) else []

    @property
    def is_of_the_paper(self) -> bool:
        """Whether the paper has this model."""
        return self.label in PAPER_MODELS


def newest_alike(runs: list[Run], *but: str) -> list[Run]:
    """Those of `runs` whose setup is that of the one that was measured last, `but` for these; empty without any."""
    if not runs:
        return []
    newest = max(runs, key=lambda run: run.evaluation["date"])
    return [run for run in runs if run.setup(*but) == newest.setup(*but)]


def protocol(runs: dict[str, Run], *but: Callable[[Run], str | None]) -> list[str]:
    """Lines that say how the runs of a table were made, by what it calls them; where they differ, which is which.

    Args:
        but: what of `MADE` is said elsewhere.
    """
    lines = [line for describe in MADE if describe not in but for line in statements(describe, runs)]
    return lines + origins(runs.values()) + _rarer_commits(runs)


def on_times(runs: dict[str, Run]) -> list[str]:
    """What is to be known of the times of the runs of a table, by what it calls them."""
    pruned = {name: run for name, run in runs.items() if run.pruning}
    return [line for describe in (_interruption, _survey) for line in statements(describe, pruned, of_all=True)]


def _rarer_commits(runs: dict[str, Run]) -> list[str]:
    """A line that says which prunings were made by another commit than most; none where all were made by one."""
    of = {name: run.pruning["environment"].get("git_commit") or "unknown" for name, run in runs.items() if run.pruning}
    if len(set(of.values())) < 2:
        return []
    (most, _), *rarer = Counter(of.values()).most_common()
    named = [f"at {commit}: {', '.join(name for name in of if of[name] == commit)}" for commit, _ in rarer]
    return [f"Pruned at commit {most}, but {'; '.join(named)}."]


def origins(runs: Iterable[Run]) -> list[str]:
    """A line that says where the records of the runs are, by which commits they were made, and on what machines."""
    runs = list(runs)
    made = [record["environment"] for run in runs for record in (run.pruning, run.evaluation) if record]
    return [origin({run.folder.parent.as_posix() for run in runs}, made)]


def origin(folders: Iterable[str], environments: Iterable[dict]) -> str:
    """The same line, of records in `folders` that were made in these `records.environment`s."""
    environments = list(environments)
    commits = {environment.get("git_commit") or "unknown" for environment in environments}
    machines = {
        f"{environment['device']}, {environment.get('cpu_threads')} threads, {environment.get('platform')}"
        for environment in environments
    }
    return (
        f"Records: {', '.join(f'`{folder}`' for folder in sorted(folders))}, each beside the flags of its command. "
        f"Commits: {', '.join(sorted(commits))}. Machines: {'; '.join(sorted(machines))}."
    )


def statements(describe: Callable[[Run], str | None], runs: dict[str, Run], of_all: bool = False) -> list[str]:
    """What is to be said of the runs, each thing once, with the names of the runs where it does not hold of all.

    Args:
        of_all: whether a thing is worth its names, too, where `describe` says nothing of the others.
    """
    said = {name: line for name, run in runs.items() if (line := describe(run))}
    asked = [name for name, run in runs.items() if of_all or name in said or run.pruning]
    lines = []
    for line in dict.fromkeys(said.values()):
        names = [name for name in asked if said.get(name) == line]
        others = [name for name in asked if name not in names]
        is_long = len(names) > max(3, len(others))
        which = f"all but {', '.join(others)}" if is_long else ", ".join(names)
        lines.append(f"{line[:-1]} ({which})." if others else line)
    return lines


def in_common(runs: Sequence[Run]) -> list[str]:
    """Lines that say how all runs of a figure were made; what differs is on its axes."""
    said = [{describe(run) for run in runs} for describe in MADE]
    common = [line for lines in said if len(lines) == 1 and (line := lines.pop())]
    return common + reservations(runs) + origins(runs)


def reservations(runs: Iterable[Run]) -> list[str]:
    """A line on what the paper measured, beside runs that did not measure all."""
    are_whole = all(run.is_whole for run in runs)
    return [] if are_whole else ["The paper measured all windows and all rows."]


def _interruption(run: Run) -> str | None:
    went_on = run.pruning["went_on_after"]
    return "Interrupted, so that its time is that of its last part." if went_on else None


def _survey(run: Run) -> str | None:
    return f"{note}." if (note := note_on_survey(run.pruning)) else None


def text_name(text: str) -> str:
    """What tables call a text, by its name, or its file's, in a record."""
    name = Path(text).name.partition(".")[0]
    return TEXTS.get(name, name)


def measuring(run: Run) -> str:
    """How the perplexity was measured; texts differ in how many windows they have."""
    measured, device = run.result["perplexity"], run.evaluation["environment"]["device"]
    windows = {f"{row['windows']:,} of {text_name(text)}": row["windows"] for text, row in measured.items()}
    (number, *others), length = dict.fromkeys(windows.values()), f"windows of {run.perplexity['seqlen']} tokens"
    cut = f"{length} ({', '.join(windows)})" if others else f"{number:,} {length}"
    return f"Perplexity: {cut}, start token: {run.perplexity['bos']}; run in {run.result['dtype']} on {device}."


def _scoring(run: Run) -> str | None:
    if not (scored := run.result.get("zero_shot")):
        return None
    rows = limited(scored["limit"])
    start = "yes" if scored["add_bos_token"] else "no"
    chats = ", chat template" if scored.get("apply_chat_template") else ""
    return f"Tasks: {scored['harness']}, {rows}, no examples, start token: {start}{chats}."


def limited(limit: int | float | None) -> str:
    """Which rows of a task were scored, in words."""
    if limit is None:
        return "all rows"
    return f"the first {100 * limit:g} % of the rows of each" if limit < 1 else f"the first {limit} rows of each"


def _calibration_set(run: Run) -> str | None:
    if not run.pruning:
        return None
    samples, tokens = run.pruning["calibration"]["ids"]
    return f"Calibration: {samples} samples of {tokens} tokens."


def drawn_by(run: Run) -> str | None:
    """Which seed drew the calibration set."""
    return f"Seed of the calibration set: {run.pruning['settings']['seed']}." if run.pruning else None


def _texts(run: Run) -> str | None:
    return f"Calibration texts: {run.texts}." if run.pruning else None


def _pruned_in(run: Run) -> str | None:
    dtype = run.pruning["settings"].get("dtype", "auto") if run.pruning else "auto"
    return None if dtype == "auto" else f"Pruned and saved in {dtype}."


def correction(run: Run) -> str | None:
    """How many MLPs have it, of which rank."""
    if not run.pruning:
        return None
    if not (number := len(corrected_layers(run.pruning))):
        return "MLPs with a linear correction: 0."
    rank = run.pruning["settings"]["ratio"]
    return f"MLPs with a linear correction: {number}, of rank {rank:g} of the hidden size."


def _shares(run: Run) -> str | None:
    if not run.pruning or not has_former_shares(run.pruning):
        return None
    names = {"query": "q", "key": "k", "value_output": "v and o", "feed_forward": "MLPs"}
    lost = ", ".join(f"{name} {run.pruning['shares_removed'][part]:.0%}" for part, name in names.items())
    recipe = run.pruning["settings"]["recipe"]
    return f"Recorded when `{recipe}` had other shares for grouped heads, chosen on WikiText-2's test text: {lost}."


# What is to be said of every run.
MADE = (measuring, _scoring, _calibration_set, drawn_by, _texts, _pruned_in, correction, _shares)
