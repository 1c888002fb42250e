"""The records of runs, and the paper's own figures, as tables and figures are made from them.

A run is a folder of records: `pruning.json` (unless it is the dense model's), `evaluation.json` and, when it is whole,
`flags`; scripts/common.sh writes them.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PAPER = Path(__file__).parents[1] / "results/paper"
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
        """On the paper's text."""
        return self.result["perplexity"][TEXT]

    @property
    def texts(self) -> str:
        """Names of the calibration texts."""
        return " + ".join(source["name"] for source in self.pruning["calibration"]["sources"])

    @property
    def seconds(self) -> float:
        """Time of the pruning, reading and writing included."""
        return 60 * sum(stage["minutes"] for stage in self.pruning["stages"].values())

    @property
    def peak_bytes(self) -> int:
        """Peak memory of the pruning: the device's on a GPU, else the host's."""
        return max(stage["device_bytes"] or stage["host_bytes"] for stage in self.pruning["stages"].values())


@dataclass(frozen=True)
class Results:
    """The runs of one model, in the folder `results`/`label`, and what the paper says of it."""

    results: Path
    label: str

    def run(self, name: str) -> Run | None:
        """A run by its name; None where it is not recorded as a whole."""
        folder = self.results / self.label / name
        return Run(folder) if (folder / "flags").is_file() else None

    def runs(self, folder: str) -> list[Run]:
        """All runs whose names begin with that of a folder."""
        found = (self.results / self.label / folder).glob("*/flags")
        return [Run(path.parent) for path in sorted(found)]

    def paper(self, table: int) -> list[dict]:
        """The paper's rows of this model; none for a model that it does not have.

        Tables 1, 4, 5 and 6 are all of LLaMA-7B.
        """
        rows = json.loads((PAPER / f"table{table}.json").read_text())["rows"]
        return [row for row in rows if row.get("model", "LLaMA-7B") == PAPER_MODELS.get(self.label)]


def protocol(*runs: Run) -> list[str]:
    """Lines that say how the runs of a table were made, each way once."""
    lines: list[str] = []
    for run in runs:
        result, environment = run.result, run.evaluation["environment"]
        measured = run.perplexity
        line = (
            f"Perplexity: {measured['windows']} windows of {measured['seqlen']} tokens, start token: "
            f"{measured['bos']}; run in {result['dtype']} on {environment['device']}."
        )
        if "zero_shot" in result:
            limit = result["zero_shot"]["limit"]
            rows = "all rows" if limit is None else f"the first {limit} rows of each"
            line += f" Tasks: {result['zero_shot']['harness']}, {rows}, no examples, start token: " + (
                "yes." if result["zero_shot"]["add_bos_token"] else "no."
            )
        lines.append(line)
        if run.pruning:
            samples, tokens = run.pruning["calibration"]["ids"]
            seed = run.pruning["settings"]["seed"]
            lines.append(f"Calibration: {samples} samples of {tokens} tokens from {run.texts}; seed {seed}.")
    return list(dict.fromkeys(lines))
