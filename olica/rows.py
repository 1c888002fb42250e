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


def paired_difference(ours: np.ndarray, dense: np.ndarray) -> dict[str, float | None]:
    """Mean of ours - dense (n,) over the same rows, and its standard error: std of the differences / sqrt(n)."""
    difference = ours - dense
    count = len(difference)
    error = difference.std(ddof=1) / math.sqrt(count) if count > 1 else None
    return {"difference": float(difference.mean()), "standard_error": None if error is None else float(error)}


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
        text: _compare_perplexity(measured, dense["perplexity"][text])
        for text, measured in ours.get("perplexity", {}).items()
        if _is_same_text(measured, dense.get("perplexity", {}).get(text))
    }
    scored, theirs = (result.get("zero_shot", {"add_bos_token": None, "tasks": {}}) for result in (ours, dense))
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


def with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """A figure as text and, where it has one, its standard error; `sign` "+" writes that of positive figures too."""
    shown = f"{value:{sign},.{digits}f}"
    return shown if error is None else f"{shown} ± {error:,.{digits}f}"


def mean_error(rows: list[dict]) -> float | None:
    """Standard error of the mean of independent figures; None where one of them has none."""
    errors = [row["standard_error"] for row in rows]
    return None if None in errors or not errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _is_same_text(ours: dict, dense: dict | None) -> bool:
    return dense is not None and all(ours[key] == dense[key] for key in ("fingerprint", "windows", "seqlen", "bos"))


def _compare_perplexity(ours: dict, dense: dict) -> dict:
    row = paired_difference(unpack_floats(ours["nll_by_window"]), unpack_floats(dense["nll_by_window"]))
    return row | {"ratio": ours["value"] / dense["value"]}


def _compare_task(ours: dict, dense: dict) -> dict[str, dict]:
    return {
        metric: paired_difference(100 * unpack_hits(hits), 100 * unpack_hits(dense["hits"][metric]))
        for metric, hits in ours["hits"].items()
    }
