"""Made-up records of runs, and what tables make of them."""

import json
from pathlib import Path

import numpy as np
import torch

from olica.evaluation.paired import PAPER_METRIC, pack_floats, standard_error
from olica.methods.recipes import RECIPES
from olica.model.configuration_olica import LayerShape
from olica.report.runs import Results

NOISE = np.random.default_rng(0).normal(0, 0.1, 30)
ERROR = standard_error(NOISE, consecutive=True)  # of every perplexity here, as a share of it
MACHINE = {"device": "a GPU", "cpu_threads": 8, "platform": "Linux", "git_commit": "cafe"}


def evaluation(perplexity: float, mean: float, dtype: str = "float16") -> dict:
    nll = torch.from_numpy(np.log(perplexity) + NOISE)
    text = {"value": perplexity, "standard_error": "of an older version", "windows": 30, "seqlen": 128, "bos": "none"}
    text |= {"fingerprint": "f", "nll_by_window": pack_floats(nll)}
    tasks = {
        task: {metric: mean / 100, f"{metric}_stderr": 0.01, "hits": {metric: "1101"}, "hash": "h"}
        for task, metric in PAPER_METRIC.items()
    }
    averages = {"paper_rule": mean, "standard_error": 0.5, "max_rule": mean, "tasks": list(PAPER_METRIC)}
    zero_shot = {"tasks": tasks, "averages": averages, "harness": "lm-eval 1", "limit": 200, "add_bos_token": False}
    result = {
        "parameters": {"total": 5_390_000_000, "decoder_layers": 5_100_000_000},
        "macs": {"tokens": 64, "total": 345_000_000_000},
        "weight_bytes": 2**33,
        "cache_bytes_per_token": 524288,
        "dtype": dtype,
        "perplexity": {"wikitext2": text},
        "zero_shot": zero_shot,
        "cost": {
            "protocol": {"prompt_tokens": 128},
            "prefill": {"median_s": 0.25},
            "decode": {"median_s": 0.02},
            "peak_memory": {"host_bytes": 2**31, "device_bytes": 2**34},
        },
    }
    stages = {"model: perplexity of wikitext2": {"minutes": 0.5}}
    settings = {"ppl_windows": None, "limit": 200}
    rest = {"environment": MACHINE, "stages": stages, "settings": settings, "date": "2026-01-01"}
    return {"results": {"model": result}, **rest}


def pruning(ids=(256, 128), texts=("bookcorpus", "alpaca"), after=5_390_000_000, corrected=6, **settings) -> dict:
    settings = {"sparsity": 0.2, "recipe": "olica", "seed": 0, "mlp_num": 6, "ratio": 0.03} | settings
    return {
        "settings": settings,
        "shares_removed": {"query": 0.4, "key": 0.4, "value_output": 0.1, "feed_forward": 0.25},
        "calibration": {"ids": list(ids), "sources": [{"name": name} for name in texts]},
        "corrected_layers": list(range(corrected)),
        "went_on_after": [],
        "multiple_correlation": [0.5, 0.25, None] if settings["mlp_num"] else [None] * 3,
        "parameters": {"before": 6_738_000_000, "after": after},
        "environment": MACHINE | {"git_commit": "beef"},
        "stages": {
            "survey": {"minutes": 2.0, "host_bytes": 10**9, "device_bytes": 2 * 10**9},
            "prune": {"minutes": 4.0, "host_bytes": 10**9, "device_bytes": 3 * 10**9},
        },
    }


class Recorder:
    """Writes records of runs into a folder of results."""

    def __init__(self, folder: Path, label: str):
        self.folder, self.label = folder, label

    def __call__(self, name: str, measured: dict, pruned: dict | None = None) -> None:
        folder = self.folder / self.label / name
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps(measured))
        if pruned:
            (folder / "pruning.json").write_text(json.dumps(pruned))
        (folder / "flags").write_text("flags\n")

    @property
    def results(self) -> Results:
        return Results(self.folder, self.label)


def cells(markdown: str) -> list[list[str]]:
    """The cells of a table's lines, the dashes under the header left out."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in found}) == 1, "every row has a cell for every header"
    return [found[0], *found[2:]]


def of_recipe(name: str) -> dict:
    """What a record says of a recipe."""
    recipe = RECIPES[name]
    return {"name": name, "about": recipe.about, "parameters": recipe.parameter_names}


# Of a pruning, with what a model card says.
RECORD = {
    "recipe": of_recipe("olica"),
    "model": {"name": "7b", "source": "huggyllama/llama-7b", "revision": "0" * 40},
    "calibration": {"ids": [256, 128], "sources": [{"name": "bookcorpus"}, {"name": "alpaca"}]},
    "measured_sparsity": 0.1981,
    "parameters": {"before": 10, "after": 8, "decoder_layers_before": 9, "decoder_layers_after": 7},
    "settings": {"recipe": "olica", "sparsity": 0.2, "k": 3.0, "mlp_num": 6, "ratio": 0.03, "percdamp": 0.5, "seed": 0}
    | {"sparsity_of": "model", "round_to": 1, "datasets": "bookcorpus+alpaca"},
    "corrected_layers": [0, 4],
    "dense_layer": {"v_head_dim": 10, "intermediate_size": 12},
    "plan": [LayerShape(5, 0, 9, 9, correction_rank=3).to_dict()],
}
