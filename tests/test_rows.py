import numpy as np
import pytest
import torch

from olica.rows import (
    PAPER_METRIC,
    compare,
    pack_floats,
    pack_hits,
    paired_difference,
    unpack_floats,
    unpack_hits,
    with_error,
)


def test_packed_rows_come_back():
    values = torch.rand(33, dtype=torch.float64) * 10
    np.testing.assert_allclose(unpack_floats(pack_floats(values)), values.numpy(), rtol=1e-7)
    assert pack_hits([1.0, 0.0, 1.0]) == "101"
    assert unpack_hits("0110").tolist() == [0, 1, 1, 0]


def test_paired_difference_by_hand():
    row = paired_difference(np.array([3.0, 1.0, 2.0, 6.0]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert row["difference"] == 2.0
    # differences 2, 0, 1, 5: variance (0 + 4 + 1 + 9) / 3
    assert row["standard_error"] == pytest.approx(np.sqrt(14 / 3 / 4))
    assert paired_difference(np.ones(1), np.zeros(1)) == {"difference": 1.0, "standard_error": None}


def test_pairing_tells_what_separate_errors_hide():
    """Rows differ far more than the models do: unpaired errors are ten times as large."""
    generator = np.random.default_rng(0)
    dense = generator.normal(4, 1, 500)
    ours = dense + generator.normal(0.1, 0.1, 500)
    row = paired_difference(ours, dense)
    unpaired = np.sqrt(ours.var(ddof=1) / 500 + dense.var(ddof=1) / 500)
    assert row["difference"] > 10 * row["standard_error"] and unpaired > 8 * row["standard_error"]


def result(nll: np.ndarray, hits: str, rows: str = "h") -> dict:
    measured = {"value": float(np.exp(nll.mean())), "nll_by_window": pack_floats(torch.from_numpy(nll))}
    measured |= {"fingerprint": "f", "windows": len(nll), "seqlen": 128, "bos": "none"}
    tasks = {task: {"hash": rows, "hits": {metric: hits}} for task, metric in PAPER_METRIC.items()}
    return {"perplexity": {"text": measured}, "zero_shot": {"tasks": tasks, "add_bos_token": False}}


def test_results_on_the_same_rows_are_compared():
    generator = np.random.default_rng(1)
    dense, ours = result(generator.normal(3, 1, 20), "1101"), result(generator.normal(4, 1, 20), "1000")
    compared = compare(ours, dense)
    text = compared["perplexity"]["text"]
    assert text["ratio"] == pytest.approx(np.exp(text["difference"]), rel=1e-6)
    assert compared["zero_shot"]["piqa"]["acc_norm"]["difference"] == -50.0
    # Each task: differences 0, -1, 0, -1 in shares; standard deviation sqrt(1/3), over sqrt(4), in percent.
    error = 100 * np.sqrt(1 / 3) / 2
    assert compared["zero_shot"]["boolq"]["acc"]["standard_error"] == pytest.approx(error)
    assert compared["paper_rule"]["difference"] == -50.0
    assert compared["paper_rule"]["standard_error"] == pytest.approx(error / np.sqrt(7))


def test_other_rows_are_not_compared():
    generator = np.random.default_rng(2)
    nll = generator.normal(3, 1, 20)
    dense = result(nll, "11")
    assert compare(result(nll, "10", rows="other"), dense)["zero_shot"] == {}
    assert "paper_rule" not in compare(result(nll, "10", rows="other"), dense)
    for change in ({"fingerprint": "g"}, {"windows": 10}, {"seqlen": 64}, {"bos": "every window"}):
        other = result(nll, "11")
        other["perplexity"]["text"] |= change
        assert compare(other, dense)["perplexity"] == {}
    started = result(nll, "10")
    started["zero_shot"]["add_bos_token"] = True
    assert compare(started, dense)["zero_shot"] == {}
    assert compare({}, dense) == {"perplexity": {}, "zero_shot": {}}
    unhashed = result(nll, "11", rows=None)
    assert compare(unhashed, unhashed)["zero_shot"] == {}


def test_a_figure_with_its_error():
    assert with_error(1234.567, 0.051, 2) == "1,234.57 ± 0.05"
    assert with_error(0.5, None, 1, "+") == "+0.5" and with_error(-0.5, 0.25, 1, "+") == "-0.5 ± 0.2"
