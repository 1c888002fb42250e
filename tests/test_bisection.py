"""Sweeps to a target: which sparsities are tried, and what numbers and ranges are taken for."""

import math

import pytest
from conftest import refused
from tiny_sweep import FOLDER, fill_with_sweep, sweep, without_times
from transformers import AutoModelForCausalLM

from olica.sweeping import work as sweep_module
from olica.sweeping.bisection import Target, as_parameters, as_sparsities, bracket, next_trial

fill_here = fill_with_sweep


@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.03])
@pytest.mark.parametrize("threshold", [0.0123, 0.1, 0.2 - 1e-4, 0.25, 0.4999])
@pytest.mark.parametrize("guess", [None, 0.25, 0.9])
def test_bisection_finds_the_multiple_beside_the_threshold(tolerance, threshold, guess):
    """What no multiple of the tolerance between the two ends of the bracket could change."""
    beyond = {sparsity: sparsity >= threshold for sparsity in (0.1, 0.3, 0.5)}
    trials = 0
    while (trial := next_trial(beyond, tolerance, guess)) is not None:
        assert trial not in beyond and trial / tolerance == pytest.approx(round(trial / tolerance))
        beyond[trial] = trial >= threshold
        trials += 1
    near, far = bracket(beyond)
    assert near < threshold <= far and far - near <= tolerance + 1e-9
    assert trials <= math.ceil(math.log2(0.2 / tolerance)) + 2 * (guess is not None)


def test_there_is_nothing_to_try_without_a_far_side():
    assert next_trial({0.1: False, 0.5: False}, 0.01) is None


def test_where_a_curve_falls_again_its_first_crossing_counts():
    assert bracket({0.1: False, 0.2: True, 0.3: False, 0.4: True}) == (0.1, 0.2)


@pytest.fixture
def known_curve(monkeypatch):
    """Perplexity ratios that follow from the parameters left, by a rule that is known: (before / after)^2."""
    compare = sweep_module.compare

    def compared(ours, dense):
        result = compare(ours, dense)
        ratio = (dense["parameters"]["total"] / ours["parameters"]["total"]) ** 2
        result["perplexity"][sweep_module.HELD_BACK]["ratio"] = ratio
        return result

    monkeypatch.setattr(sweep_module, "compare", compared)


def test_a_ratio_of_perplexities_is_met(here, known_curve, capsys):
    """1 / (1 - s)^2 <= 1.75 up to s = 0.244; of multiples of 0.02 that is 0.24."""
    flags = ["--sparsity=0.1,0.3", "--mlp_num=0", "--target_ppl_ratio=1.75", "--tolerance=0.02"]
    record = sweep(*flags)
    answer = record["answer"]
    assert answer["sparsity"] == 0.24 and answer["ratio"] <= 1.75
    assert next(point for point in record["points"] if point["sparsity"] == 0.26)["ratio"] > 1.75
    assert len(record["points"]) <= 2 + math.ceil(math.log2(0.2 / 0.02))
    said = capsys.readouterr().out
    assert "the largest sparsity with at most 1.75 times the dense perplexity is 0.24, within 0.02" in said
    assert said.splitlines()[-3].startswith("python model_pruning.py --base_model tiny --sparsity 0.24 ")
    again = sweep(*flags)
    assert without_times(again) == without_times(record)


def test_a_number_of_parameters_is_met(here):
    dense = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained("tiny").parameters())
    most = round(0.833 * dense)
    record = sweep("--sparsity=0.1,0.3", f"--max_params={most / 1e6}M", "--tolerance=0.01")
    answer, points = record["answer"], {point["sparsity"]: point for point in record["points"]}
    assert answer["parameters"]["total"] == points[answer["sparsity"]]["parameters"]["total"] <= most
    before = round(answer["sparsity"] - 0.01, 2)
    assert points[before]["parameters"]["total"] > most
    assert sorted(points) == [0.1, before, answer["sparsity"], 0.3], "where it has to be is tried first"


def test_a_target_that_no_sparsity_meets(here, known_curve, capsys):
    """The points are there all the same."""
    beyond = refused(capsys, sweep, "--sparsity=0.1,0.2", "--target_ppl_ratio=9")
    assert "even --sparsity 0.2 leaves" in beyond and "goes further" in beyond
    assert "already --sparsity 0.05 has" in refused(
        capsys, sweep, "--sparsity=0.1,0.2", "--target_ppl_ratio=1.001", "--tolerance=0.05"
    )
    assert (FOLDER / "sweep.html").read_text().count("<h3>Sparsity 0.2</h3>") == 2
    assert "the largest --sparsity, 0.2, leaves" in refused(capsys, sweep, "--sparsity=0.1,0.2", "--max_params=1000")
    assert "the dense model has no more" in refused(capsys, sweep, "--sparsity=0.1,0.2", "--max_params=1B")


@pytest.mark.parametrize(
    ("given", "count"), [("1.0B", 10**9), ("900M", 9 * 10**8), ("12", 12), (134515008, 134515008), ("1.5k", 1500)]
)
def test_numbers_of_parameters(given, count):
    assert as_parameters("max_params", given) == count


@pytest.mark.parametrize(
    ("given", "sparsities"),
    [
        ("0.1:0.5:0.05", [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
        ("0.2:0.2:0.1", [0.2]),
        ("0.3, 0.1", [0.1, 0.3]),
        ([0.25], [0.25]),
        (0.2, [0.2]),
    ],
)
def test_ranges(given, sparsities):
    assert as_sparsities(given) == sparsities


def test_which_side_is_beyond():
    ratio, size = Target("target_ppl_ratio", 1.2), Target("max_params", 100)
    assert [ratio.is_beyond(value, 0) for value in (1.1, 1.2, 1.3)] == [False, False, True]
    assert [size.is_beyond(0, value) for value in (99, 100, 101)] == [True, True, False]
