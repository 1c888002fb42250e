import numpy as np
import pytest
import torch

from olica.evaluation.paired import (
    PAPER_METRIC,
    compare,
    pack_floats,
    pack_hits,
    paired_difference,
    perplexity_error,
    standard_error,
    unpack_floats,
    unpack_hits,
)
from olica.terminal import with_error


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


def test_error_of_consecutive_values_is_newey_and_wests():
    """As one quadratic form with weights that fall with the distance, instead of a sum over lags."""
    values = np.random.default_rng(3).normal(size=40).cumsum()
    centred, places = values - values.mean(), np.arange(40)
    weights = np.clip(1 - np.abs(places[:, None] - places) / 7, 0, None)  # up to a lag of 6, the root of 40
    expected = np.sqrt(centred @ weights @ centred / 40 / 39)
    assert standard_error(values, consecutive=True) == pytest.approx(expected)
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / np.sqrt(40))
    assert standard_error(values[:1], consecutive=True) is None
    assert standard_error(np.ones(9), consecutive=True) == 0.0


def test_error_of_consecutive_values_is_that_of_a_known_process():
    """x_i = 0.5 x_{i-1} + e_i: the mean of n has the error 2 / sqrt(n), where std / sqrt(n) says 1.15 / sqrt(n)."""
    noise = np.random.default_rng(4).normal(size=20_000)
    values = np.zeros(20_000)
    for index in range(1, 20_000):
        values[index] = 0.5 * values[index - 1] + noise[index]
    assert standard_error(values, consecutive=True) == pytest.approx(2 / np.sqrt(20_000), rel=0.1)
    assert standard_error(noise, consecutive=True) == pytest.approx(1 / np.sqrt(20_000), rel=0.1)


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
    apart = (unpack_floats(model["perplexity"]["text"]["nll_by_window"]) for model in (ours, dense))
    assert text["standard_error"] == standard_error(np.subtract(*apart), consecutive=True)
    measured = ours["perplexity"]["text"]
    of_mean = standard_error(unpack_floats(measured["nll_by_window"]), consecutive=True)
    assert perplexity_error(measured) == pytest.approx(measured["value"] * of_mean)
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
