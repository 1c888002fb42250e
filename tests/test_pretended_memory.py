"""Memory that runs out on a pretended GPU: batches are halved, or a sentence names the flags that help."""

import importlib
from functools import wraps

import pytest
import torch
from conftest import load_weights, raising, refused
from tiny_pretended import (
    MEASURES,
    assert_same_weights,
    checkpoint,
    device_peak,
    evaluate,
    fill_with_shards,
    perplexity_in,
    prune,
)
from tiny_run import killed_at

fill_here = fill_with_shards


@pytest.mark.parametrize(("recipe", "cache_dev"), [("olica", "cpu"), ("olica-paper", "cuda")])
def test_a_device_that_is_too_small_halves_the_batch(here, gpu, caplog, recipe, cache_dev):
    flags = [f"--recipe={recipe}", f"--cache_dev={cache_dev}"]
    peaks = [device_peak(prune(f"{size}", *flags, f"--batch_size={size}")) for size in (1, 12)]
    gpu.memory = sum(peaks) // 2
    record = prune("out", *flags, "--batch_size=12")
    assert record["batch_size"] < 12 and "going on with --batch_size" in caplog.text
    assert_same_weights("out", load_weights(checkpoint("1")))
    caplog.clear()
    gpu.memory = int(1.3 * sum(peaks) / 2)
    chosen = prune("auto", *flags, "--batch_size=auto")["batch_size"]
    assert 1 <= chosen < 12 and "out of memory" not in caplog.text
    assert_same_weights("auto", load_weights(checkpoint("1")))


def rows_of(value) -> int:
    tensors = value.values() if isinstance(value, dict) else [value]
    return max((len(t) for t in tensors if isinstance(t, torch.Tensor) and t.ndim > 1), default=0)


def no_memory_in(monkeypatch, gpu, place: str, above: int = 0) -> list:
    """Let the device have no room while the function at `place` runs with more than `above` rows; returns its calls."""
    owner, _, name = place.rpartition(".")
    module, _, last = owner.rpartition(".")
    owner = getattr(importlib.import_module(module), last) if last[0].isupper() else importlib.import_module(owner)
    original, calls = getattr(owner, name), []

    @wraps(original)
    def without_memory(*arguments, **settings):
        calls.append(place)
        if above and max(map(rows_of, [*arguments, settings])) <= above:
            return original(*arguments, **settings)
        with gpu.full():
            return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, without_memory)
    return calls


@pytest.mark.parametrize("recipe", ["olica", "olica-paper"])
@pytest.mark.parametrize("place", ["olica.pruning.activations._forward", "olica.methods.moments.Moments.update"])
def test_no_memory_in_a_batch_halves_it(here, gpu, monkeypatch, caplog, place, recipe):
    prune("expected", f"--recipe={recipe}")
    with monkeypatch.context() as patched:
        no_memory_in(patched, gpu, place, above=3)
        assert prune("out", f"--recipe={recipe}", "--batch_size=12")["batch_size"] == 3
    assert "going on with --batch_size 3" in caplog.text
    assert_same_weights("out", load_weights(checkpoint("expected")))


@pytest.mark.parametrize(
    ("place", "recipe"),
    [
        ("olica.pruning.activations.record_layer_calls", "olica"),
        ("olica.pruning.survey.calibrate", "olica"),
        ("olica.methods.olica.ridge_regression", "olica"),
        ("olica.methods.olica.multiple_correlation", "olica"),
        ("olica.pruning.layers.calibrate", "olica-paper"),
        ("olica.methods.feed_forward.thin", "olica"),
        ("olica.methods.correction.residual_sums", "olica"),
        ("olica.methods.correction.low_rank_correction", "olica-paper"),
        ("olica.methods.query_key.low_rank_factors", "olica"),
        ("olica.methods.value_output.rotate", "olica"),
        ("torch.linalg.qr", "olica-ond"),
        ("olica.pruning.cutting.cast_weights", "olica"),
        ("olica.pruning.layers.propagate", "olica"),
        ("torch.nn.Module.to", "olica"),
    ],
)
def test_no_memory_elsewhere_names_the_flags(here, gpu, capsys, monkeypatch, place, recipe):
    no_memory_in(monkeypatch, gpu, place)
    message = refused(capsys, prune, "out", f"--recipe={recipe}", "--batch_size=1", alone=True)
    ways = "a --dtype of half the width, a smaller calibration set (--num_samples, --seqlen) or --device cpu"
    assert message.startswith("out of memory (CUDA out of memory. Tried to allocate")
    assert message.endswith(f"; give --cache_dev cpu, {ways}")


@pytest.mark.parametrize(
    "place", ["olica.outputs.run_progress.RunProgress.save_layer", "olica.outputs.journal.Journal.write"]
)
def test_no_memory_of_the_host_for_a_layer_that_is_kept(here, gpu, capsys, monkeypatch, place):
    with monkeypatch.context() as patched:
        patched.setattr(place, raising(MemoryError()))
        message = refused(capsys, prune, "out", "--cache_dev=cpu")
    assert message.endswith("; give --cache_dev cuda, a --dtype of half the width or a smaller calibration set "
                            "(--num_samples, --seqlen)")  # fmt: skip
    prune("out", "--cache_dev=cpu")


def test_no_memory_for_a_finished_layer_that_is_read_again(here, gpu, capsys, monkeypatch):
    prune("expected")
    with killed_at(1):
        prune("out")
    with monkeypatch.context() as patched:
        no_memory_in(patched, gpu, "olica.pruning.layers.restore")
        assert "give --cache_dev cpu" in refused(capsys, prune, "out")
    assert prune("out")["went_on_after"] == [1]
    assert_same_weights("out", load_weights(checkpoint("expected")))


def test_no_memory_for_batches_of_an_evaluation_halves_them(here, gpu, caplog):
    flags = [*MEASURES[:4], "--tasks=piqa", "--data_dir=rows"]
    expected = evaluate(*flags, "--batch_size=1")
    gpu.memory = int(1.05 * gpu.peak)
    found = evaluate(*flags, "--batch_size=10")
    assert caplog.text.count("going on with --batch_size") >= 2
    assert perplexity_in(found) == pytest.approx(perplexity_in(expected), rel=1e-5)
    assert found["zero_shot"]["tasks"] == expected["zero_shot"]["tasks"]


@pytest.mark.parametrize(
    "place",
    [
        "torch.nn.Module.to",
        "olica.evaluation.measures.perplexity",
        "olica.evaluation.harness_model.tail_logits",
        "olica.evaluation.measures.latencies",
        "olica.evaluation.measures.continuation",
    ],
)
def test_no_memory_for_a_measure_names_the_flags(here, gpu, capsys, monkeypatch, place):
    no_memory_in(monkeypatch, gpu, place)
    message = refused(capsys, evaluate, *MEASURES, "--batch_size=1")
    assert message.startswith("out of memory (CUDA out of memory. Tried to allocate")
    assert message.endswith("; give a --dtype of half the width or --device_map auto or --device cpu")
