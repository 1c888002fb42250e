"""A method of two passes: statistics of the MLP are those behind the pruned attention."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import CPU, make_llama, uncorrected, work_on, write_pruned
from tiny_run import killed_at
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from olica.evaluation import cost
from olica.machine import BatchSize
from olica.methods.correction import LowRankCorrection, equal_output_weights, paper_ridge
from olica.methods.feed_forward import ThinnedMLP, paper_importance
from olica.methods.moments import diagonal, full
from olica.methods.query_key import LowRankQueryKey
from olica.methods.value_output import NarrowedHeads, released_importance, value_directions
from olica.model.configuration_olica import LayerShape
from olica.model.skeleton import count_parameters, pruned_skeleton
from olica.outputs import run_progress
from olica.outputs.run_folder import RunFolder
from olica.outputs.run_progress import Shards
from olica.pruning.activations import propagate, record_layer_calls, recording
from olica.pruning.layers import prune_layers
from olica.pruning.progress import Progress

IDS = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(0))
ATTENTION = (LowRankQueryKey(), NarrowedHeads(value_directions, released_importance))
MLP = ThinnedMLP(paper_importance, repairs=(LowRankCorrection(paper_ridge, 0.1, equal_output_weights),))
# Layers that differ in every size.
PLAN = [
    LayerShape(20, 10, 9, 100),
    LayerShape(0, 7, 16, 50, correction_rank=5),
    LayerShape(12, 0, 11, 176),
    LayerShape(0, 0, 7, 33, correction_rank=9),
]
STREAMS = pytest.mark.parametrize("stream", ["dense", "pruned"])


def dense_model():
    return make_llama(num_key_value_heads=2, num_hidden_layers=4, attn_implementation="eager")


def two_passes(stream: str, *watching):
    return replace(uncorrected("olica"), stream=stream, survey=None, passes=(ATTENTION, (*watching, MLP)))


def pruned(method, model=None, progress=None):
    model = model or dense_model()
    prune_layers(work_on(model, IDS, method), PLAN, [{}] * 4, progress or Progress())
    return model


class Watching:
    """A stage that looks at the second moments of the MLP's input and channels, and changes nothing."""

    about = "nothing"

    def __init__(self):
        self.seen = []

    def needs(self, shape):
        return frozenset({full("mlp_input"), diagonal("intermediate")})

    def workspace(self, sizes, shape):
        return 0

    def __call__(self, layer, shape):
        self.seen.append((layer.moments[full("mlp_input")], layer.moments[diagonal("intermediate")]))
        return {}


@STREAMS
@torch.no_grad()
def test_the_second_pass_sees_the_layer_with_pruned_attention(stream):
    """Against a forward of every layer with the attention of the pruned model and the MLP of the dense one."""
    watching, dense = Watching(), dense_model()
    model = pruned(two_passes(stream, watching))
    hidden, calls = record_layer_calls(dense.model, IDS, CPU)
    assert len(watching.seen) == len(PLAN)
    for index, (second, channels) in enumerate(watching.seen):
        hybrid = copy.deepcopy(model.model.layers[index])
        hybrid.mlp = copy.deepcopy(dense.model.layers[index].mlp)
        with recording(hybrid, {"mlp_input", "intermediate"}, stop=False) as taken:
            hybrid(hidden, **calls[index])
        x, h = (taken[tap].flatten(0, 1).double() for tap in ("mlp_input", "intermediate"))
        torch.testing.assert_close(second, x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(channels, h.square().sum(0), rtol=1e-4, atol=1e-3)
        before = hidden.clone()
        propagate((dense if stream == "dense" else model).model.layers[index], hidden, calls[index], BatchSize(4))
        with recording(dense.model.layers[index], {"mlp_input"}, stop=False) as taken:
            dense.model.layers[index](before, **calls[index])
        x = taken["mlp_input"].flatten(0, 1).double()
        assert not torch.allclose(second, x.T @ x, rtol=1e-3, atol=1e-2), "the pruned attention makes no difference"


@pytest.mark.parametrize("seconds", [run_progress.SAVED_EVERY, -1.0])
@pytest.mark.parametrize("layers", [0, 1, 3])
@STREAMS
def test_equal_bits_after_a_resume(tmp_path, monkeypatch, stream, layers, seconds):
    expected = pruned(two_passes(stream)).model.layers
    monkeypatch.setattr(run_progress, "SAVED_EVERY", seconds)

    def run():
        with RunFolder.locked(tmp_path / "run") as folder:
            progress = folder.begin({}, False, Shards("model.layers.", 4), BatchSize(4))
            pruned(two_passes(stream), progress=progress)
            return [progress.weights(index) for index in range(4)]

    with killed_at(layers):
        run()
    for layer, found in zip(expected, run(), strict=True):
        weights = layer.state_dict()
        assert weights.keys() == found.keys()
        assert all(torch.equal(weights[name], found[name]) for name in weights)


@STREAMS
def test_layers_of_different_sizes_are_saved_loaded_and_counted(tmp_path, stream):
    model, dense = pruned(two_passes(stream)), dense_model()
    write_pruned(model, PLAN, None, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", attn_implementation="eager").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.config.layer_shapes == [shape.to_dict() for shape in PLAN]
    planned = count_parameters(pruned_skeleton(dense.config, PLAN))
    assert count_parameters(loaded) == planned
    # By hand, D 64, 4 query and 2 key/value heads of 16; norms of 2 D.
    by_hand = sum(
        (shape.q_rank * (64 + 64) or 64 * 64) + (shape.k_rank * (64 + 32) or 64 * 32)
        + shape.v_head_dim * 64 * (2 + 4) + 3 * 64 * shape.intermediate_size + 2 * 64 * shape.correction_rank + 2 * 64
        for shape in PLAN
    )  # fmt: skip
    assert planned["decoder_layers"] == by_hand
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loaded(torch.arange(3, 40)[None], use_cache=False)
    assert cost.count_macs(loaded, 37) == counter.get_total_flops() // 2
