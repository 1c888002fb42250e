"""Evaluations that were stopped, and what takes up what they had measured."""

import json
from functools import cache
from pathlib import Path

import pytest
from called import call
from conftest import make_llama
from tiny_evaluations import FLAGS, MEASURES, evaluate, fill_with_evaluation
from tiny_run import Killed
from tiny_tasks import ROWS, write_rows
from transformers import GenerationMixin

import model_evaluate
from olica.evaluation import measures
from olica.outputs import identity

pytestmark = pytest.mark.usefixtures("stock_tasks")
fill_here = fill_with_evaluation


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Names of the measures that are really made."""
    made, read = [], measures.perplexity
    monkeypatch.setattr(measures, "perplexity", lambda *a, **k: made.append("text") or read(*a, **k))
    score = measures.zero_shot

    def counting(*arguments):
        for task, scores in score(*arguments):
            made.append(task)
            yield task, scores

    monkeypatch.setattr(measures, "zero_shot", counting)
    return made


PROMPTED = [*FLAGS, "--prompt=old books"]


@cache
def undisturbed() -> dict:
    """The results of an evaluation of `here` that nobody stops: the same in every test."""
    results = evaluate(*PROMPTED)["results"]
    Path("eval.json").unlink()
    return results


@cache
def all_measures() -> str:
    """The file of an evaluation of `here` that has made all measures and not ended: the same in every test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measures.Measures, "forget", lambda self: None)
        evaluate(*FLAGS)
    Path("eval.json").unlink()
    return Path(".eval.json.measures").read_text()


@pytest.fixture
def stopped(here) -> None:
    Path(".eval.json.measures").write_text(all_measures())


@pytest.mark.parametrize("after", [1, 3, 4, 6])
def test_a_stopped_evaluation_goes_on(here, caplog, monkeypatch, counted, after):
    expected = undisturbed()
    counted.clear()
    with monkeypatch.context() as patched:
        take = measures.Measures.take

        def dying(self, name, work):
            if len(self._rows) == after:
                raise Killed
            return take(self, name, work)

        patched.setattr(measures.Measures, "take", dying)
        with pytest.raises(Killed):
            evaluate(*PROMPTED)
    assert not Path("eval.json").exists() and len(counted) == after - 1
    caplog.clear()
    record = evaluate(*PROMPTED)
    assert f"measured before: {after}" in caplog.text
    assert counted == ["text", "text", "piqa", "hellaswag", "boolq"]
    assert record["results"] == expected
    assert set(record["stages"]) == {"model: read", *(f"model: {name}" for name in [*MEASURES, "continuation"])}


@pytest.mark.parametrize("change", ["flag", "model", "text", "rows", "damage"])
def test_another_evaluation_is_not_taken_up(here, stopped, counted, caplog, change):
    match change:
        case "flag":
            evaluate(*FLAGS, "--limit=4")
        case "model":
            make_llama(1, num_key_value_heads=2).save_pretrained("tiny")
            evaluate(*FLAGS)
        case "text":
            Path("two.txt").write_text(Path("two.txt").read_text()[::-1])
            evaluate(*FLAGS)
        case "rows":
            write_rows(here / "rows", "piqa_validation", [ROWS["piqa_validation"] | {"label": 1}] * 5)
            evaluate(*FLAGS)
        case "damage":
            (path,) = here.glob(".eval.json.measures")
            path.write_text(path.read_text()[:-5])
            evaluate(*FLAGS)
    assert len(counted) == 5
    said = {"flag": "of other settings", "model": "of other models", "damage": "damaged"}.get(change, "of other data")
    assert f".eval.json.measures is {said}: measuring" in caplog.text


def test_a_commit_that_leaves_the_code_alone_changes_nothing(here, stopped, monkeypatch, counted):
    real = identity.environment
    monkeypatch.setattr(identity, "environment", lambda device: real(device) | {"git_commit": "another"})
    evaluate(*FLAGS)
    assert not counted


def test_another_evaluation_in_between_leaves_a_stopped_one(here, monkeypatch, counted):
    """Without --output_path, where the record of each has a name of its own."""
    pruning = {"model": {"name": "x", "source": "x"}, "parameters": {"before": make_llama().num_parameters()}}
    Path("tiny/olica_run.json").write_text(json.dumps(pruning))

    with monkeypatch.context() as patched:
        patched.setattr(measures.Measures, "forget", lambda self: None)
        call(model_evaluate, *FLAGS)
    call(model_evaluate, *FLAGS, "--limit=2")
    counted.clear()
    call(model_evaluate, *FLAGS)
    assert not counted and not list(Path("tiny").glob(".olica_eval*"))


def test_a_failure_keeps_what_was_measured(here, monkeypatch, counted):
    """Whatever fails at last: the same command takes up the rest."""
    with monkeypatch.context() as patched:
        patched.setattr(GenerationMixin, "generate", lambda self, **settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(*FLAGS, "--prompt=old books")
    assert counted == ["text", "text", "piqa", "hellaswag", "boolq"]
    evaluate(*FLAGS, "--prompt=old books")
    assert len(counted) == 5
