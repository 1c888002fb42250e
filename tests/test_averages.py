"""Averages of zero-shot tasks, by the metrics of the paper and by the rule of the released script."""

import pytest

from olica.evaluation import zero_shot
from olica.evaluation.paired import PAPER_METRIC


def test_paper_metrics():
    norm = dict.fromkeys(["openbookqa", "arc_easy", "arc_challenge", "hellaswag", "piqa"], "acc_norm")
    assert norm | {"boolq": "acc", "winogrande": "acc"} == PAPER_METRIC


def test_averages_by_hand():
    results = {
        "boolq": {"acc": 0.75},
        "piqa": {"acc": 0.8, "acc_norm": 0.7},
        "arc_easy": {"acc": 0.5, "acc_norm": 0.45},
        "hellaswag": {"acc": 0.3, "acc_norm": 0.5},
        "mmlu": {"acc": 0.1},
    }
    result = zero_shot.averages(results)
    assert sorted(result["tasks"]) == ["arc_easy", "boolq", "hellaswag", "piqa"]
    assert result["paper_rule"] == pytest.approx(60.0)  # (75 + 70 + 45 + 50) / 4
    assert result["max_rule"] == pytest.approx(63.75)  # (75 + 80 + 50 + 50) / 4


def test_averages_of_dense_llama_7b():
    """The paper's own row: its mean is that of the seven numbers, in its order of columns."""
    columns = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    row = [75.08, 79.16, 76.20, 70.00, 72.89, 44.88, 44.40]
    results = {task: {PAPER_METRIC[task]: value / 100} for task, value in zip(columns, row, strict=True)}
    assert zero_shot.averages(results)["paper_rule"] == pytest.approx(66.09, abs=0.006)


def test_averages_without_a_task_of_the_paper():
    empty = {"paper_rule": None, "standard_error": None, "max_rule": None, "tasks": []}
    assert zero_shot.averages({"mmlu": {"acc": 0.1}}) == empty


def test_error_of_the_average():
    """Of independent tasks, each by the metric that counts."""
    results = {"boolq": {"acc": 0.7, "acc_stderr": 0.03}, "piqa": {"acc": 0.1, "acc_stderr": 9, "acc_norm": 0.4}}
    assert zero_shot.averages(results)["standard_error"] is None
    results["piqa"]["acc_norm_stderr"] = 0.04
    assert zero_shot.averages(results)["standard_error"] == pytest.approx(2.5)  # 100 * 0.05 / 2
