"""Figures of single rows as a record holds them: compact, and exact enough to compare two models row by row."""

import base64
import math

import numpy as np
import torch

# The metric that the paper's tables print, by task. Its text does not say so: its dense means (66.09 for
# LLaMA-7B) only work out this way.
PAPER_METRIC = {
    "openbookqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "boolq": "acc",
}


def pack_floats(values: torch.Tensor) -> str:
    """A vector as base64 of little-endian float32."""
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def unpack_floats(packed: str) -> np.ndarray:
    """The vector (n,), float64, that `pack_floats` packed."""
    return np.frombuffer(base64.b64decode(packed), "<f4").astype(np.float64)


def pack_hits(hits: list[float]) -> str:
    """Rows that were answered rightly (1) or wrongly (0) as a string of these digits."""
    return "".join(str(int(hit)) for hit in hits)


def unpack_hits(packed: str) -> np.ndarray:
    """The vector (n,) of 0 and 1 that `pack_hits` packed."""
    return np.array([int(hit) for hit in packed], dtype=np.float64)


def standard_error(values: np.ndarray, consecutive: bool = False) -> float | None:
    """Standard error of the mean of `values` (n,); None of a single one.

    std / sqrt(n) for independent rows. `consecutive` values, such as the windows of one text, are alike where they are
    near each other (of WikiText-2 some 38 in a row are of one article), which makes the mean less certain than that:
    Newey and West's estimate (1987) adds the autocovariances up to a lag of sqrt(n), weighted from 1 down to 0.
    """
    count = len(values)
    if count < 2:
        return None
    centred = values - values.mean()
    variance = centred @ centred / count
    lags = math.isqrt(count) if consecutive else 0
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * (centred[lag:] @ centred[:-lag]) / count
    return math.sqrt(max(variance, 0.0) / (count - 1))


def paired_difference(ours: np.ndarray, dense: np.ndarray, consecutive: bool = False) -> dict[str, float | None]:
    """Mean of ours - dense (n,) over the same rows, and its `standard_error`."""
    difference = ours - dense
    return {"difference": float(difference.mean()), "standard_error": standard_error(difference, consecutive)}


def perplexity_error(measured: dict) -> float | None:
    """Standard error of a recorded perplexity, from its windows: value * error of the mean, by the delta method."""
    error = standard_error(unpack_floats(measured["nll_by_window"]), consecutive=True)
    return None if error is None else measured["value"] * error


def compare(ours: dict, dense: dict) -> dict:
    """How a model's result differs from the dense one's, row by row, where both were measured on the same rows.

    Args:
        ours, dense: of the `results` of an evaluation record.

    Returns:
        `perplexity`, by text: difference of the mean negative log-likelihood in nats and the `ratio` of the values.
        `zero_shot`, by task and metric: difference of the accuracy in points of a percent. `paper_rule`: that of the
        mean over the paper's tasks, if all of them have one; the tasks' errors are independent.
    """
    texts = {
        text: compare_perplexity(measured, dense["perplexity"][text])
        for text, measured in ours.get("perplexity", {}).items()
        if _is_same_text(measured, dense.get("perplexity", {}).get(text))
    }
    scored, theirs = (result.get("zero_shot", {"add_bos_token": None, "tasks": {}}) for result in (ours, dense))
    # (Whether a chat template was applied, and which, is in the hash of a task's prompts.)
    alike = scored["tasks"].keys() & theirs["tasks"] if scored["add_bos_token"] == theirs["add_bos_token"] else ()
    tasks = {
        task: _compare_task(scores, theirs["tasks"][task])
        for task, scores in scored["tasks"].items()
        if task in alike and scores["hash"] is not None and scores["hash"] == theirs["tasks"][task]["hash"]
    }
    compared = {"perplexity": texts, "zero_shot": tasks}
    if all(metric in tasks.get(task, {}) for task, metric in PAPER_METRIC.items()):
        rows = [tasks[task][metric] for task, metric in PAPER_METRIC.items()]
        compared["paper_rule"] = {"difference": _mean(rows, "difference"), "standard_error": mean_error(rows)}
    return compared


def mean_error(rows: list[dict]) -> float | None:
    """Standard error of the mean of independent figures; None where one of them has none."""
    errors = [row["standard_error"] for row in rows]
    return None if None in errors or not errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _is_same_text(ours: dict, dense: dict | None) -> bool:
    if dense is None:
        return False
    # Another tokenizer cuts other windows, as many of them or not. (Old records do not say how much text theirs have.)
    sizes = {measured["bytes"] for measured in (ours, dense) if "bytes" in measured}
    return len(sizes) < 2 and all(ours[key] == dense[key] for key in ("fingerprint", "windows", "seqlen", "bos"))


def compare_perplexity(ours: dict, dense: dict) -> dict:
    """Difference, its paired error and ratio of two recorded perplexities of the same windows of one text."""
    windows = (unpack_floats(measured["nll_by_window"]) for measured in (ours, dense))
    row = paired_difference(*windows, consecutive=True)
    return row | {"ratio": ours["value"] / dense["value"]}


def _compare_task(ours: dict, dense: dict) -> dict[str, dict]:
    return {
        metric: paired_difference(100 * unpack_hits(hits), 100 * unpack_hits(dense["hits"][metric]))
        for metric, hits in ours["hits"].items()
    }
