"""FLAP by brute force: what fluctuates least goes, and biases take up its mean."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from by_threshold import (
    KEPT_CHANNELS,
    KEPT_HEADS,
    counts_by_hand,
    family_plan,
    features,
    inputs_of,
    lowest,
    silenced,
    weights_of,
)
from conftest import make_llama, prune, prune_to, uncorrected, work_on, write_pruned
from tiny_families import make_family
from transformers import AutoModelForCausalLM

import olica
from olica.errors import UsageError
from olica.machine import BatchSize
from olica.methods import flap
from olica.methods.sizes import Budget
from olica.model.families import FAMILIES
from olica.model.skeleton import count_parameters
from olica.pruning.layers import prune_layers
from olica.pruning.progress import Progress, SurveyProgress
from olica.run import measure_and_decide

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))


def scores(model, ids) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fluctuations Var(x_j) ||W_:,j||^2 of the groups (sums over their features) and of the channels."""
    found = []
    for inputs, weights in zip(inputs_of(model, ids), weights_of(model), strict=True):
        heads, channels = (inputs[n].var(axis=0) * (weights[n] ** 2).sum(0) for n in ("o_proj", "down_proj"))
        found.append((heads.reshape(model.config.num_key_value_heads, -1).sum(1), channels))
    return found


def standardised(part: np.ndarray) -> np.ndarray:
    return (part - part.mean()) / part.std()


def test_the_survey_finds_the_fluctuations_and_the_means():
    model = make_llama(num_key_value_heads=2)
    expected, inputs = scores(model, IDS), inputs_of(model, IDS)
    findings, _ = prune(model, IDS, "flap", 0.0, batch_size=BatchSize(2))
    for found, (groups, channels), taken in zip(findings, expected, inputs, strict=True):
        np.testing.assert_allclose(found["group_scores"], groups, rtol=1e-4)
        np.testing.assert_allclose(found["channel_scores"], channels, rtol=1e-4)
        np.testing.assert_allclose(found["heads"], taken["o_proj"].mean(0), atol=1e-6)
        np.testing.assert_allclose(found["intermediate"], taken["down_proj"].mean(0), atol=1e-6)


@pytest.mark.parametrize("scores", [[0.1] * 3, [0.0] * 3, [7.0]])
def test_equal_scores_are_standardised_to_zero(scores):
    assert flap.standardised(torch.tensor(scores, dtype=torch.float64)).eq(0).all()


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.45])
@pytest.mark.parametrize("groups", [4, 2])
def test_one_threshold_over_all_layers_decides_what_goes(groups, sparsity):
    model = make_llama(num_key_value_heads=groups, intermediate_size=80)
    dense = copy.deepcopy(model)
    ranked = [tuple(map(standardised, parts)) for parts in scores(dense, IDS)]
    added = 3 * 2 * 64  # biases of o_proj and down_proj
    costs = 2 * 64 * 16 * (1 + 4 // groups), 3 * 64
    gone = counts_by_hand(ranked, costs, sparsity * dense.num_parameters() + added)
    _, plan = prune(model, IDS, "flap", sparsity)
    assert [(groups - s.kv_heads if s.kv_heads else 0, 80 - s.intermediate_size) for s in plan] == list(
        map(tuple, gone)
    )
    assert [(s.o_bias, s.down_bias) for s in plan] == [(g > 0, c > 0) for g, c in gone]
    assert sparsity < 0.3 or sum(g for g, _ in gone) > 0 < sum(c for _, c in gone)


@pytest.mark.parametrize("groups", [4, 2])
def test_what_stays_stays_as_it_is_and_biases_take_up_the_means(groups):
    model = make_llama(num_key_value_heads=groups, mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.normal_()
    dense = copy.deepcopy(model)
    _, plan = prune(model, IDS, "flap", 0.5)
    rows, width = 4 // groups * 16, 16
    for layer, old, shape, parts, inputs in zip(
        model.model.layers, dense.model.layers, plan, scores(dense, IDS), inputs_of(dense, IDS), strict=True
    ):
        new, was = dict(layer.named_parameters()), {n: p.detach() for n, p in old.named_parameters()}
        heads = lowest(parts[0], shape.kv_heads or groups)
        channels = lowest(parts[1], shape.intermediate_size)
        queries = np.setdiff1d(np.arange(64), (heads[:, None] * rows + np.arange(rows)).flatten())
        keys = np.setdiff1d(np.arange(groups * width), (heads[:, None] * width + np.arange(width)).flatten())
        stay = np.setdiff1d(np.arange(176), channels)
        for name, kept in (("q", queries), ("k", keys), ("v", keys)):
            assert torch.equal(new[f"self_attn.{name}_proj.weight"], was[f"self_attn.{name}_proj.weight"][kept])
        assert torch.equal(new["self_attn.o_proj.weight"], was["self_attn.o_proj.weight"][:, queries])
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(new[f"mlp.{name}.weight"], was[f"mlp.{name}.weight"][stay])
            assert torch.equal(new[f"mlp.{name}.bias"], was[f"mlp.{name}.bias"][stay])
        assert torch.equal(new["mlp.down_proj.weight"], was["mlp.down_proj.weight"][:, stay])
        lost = np.setdiff1d(np.arange(64), queries)
        if shape.kv_heads:
            expected = was["self_attn.o_proj.weight"].double().numpy()[:, lost] @ inputs["o_proj"].mean(0)[lost]
            np.testing.assert_allclose(new["self_attn.o_proj.bias"].detach(), expected, atol=1e-5)
        else:
            assert "self_attn.o_proj.bias" not in new
        expected = was["mlp.down_proj.weight"].double().numpy()[:, channels] @ inputs["down_proj"].mean(0)[channels]
        expected += was["mlp.down_proj.bias"].double().numpy()
        np.testing.assert_allclose(new["mlp.down_proj.bias"].detach(), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_the_dense_model_with_means_for_what_is_gone(family, tmp_path):
    model = make_family(family)
    ranked, inputs = scores(model, IDS), inputs_of(model, IDS)
    gone = [
        {"o_proj": features(lowest(parts[0], heads), model.config), "down_proj": lowest(parts[1], channels)}
        for parts, heads, channels in zip(ranked, KEPT_HEADS, KEPT_CHANNELS, strict=True)
    ]
    means = [{name: x.mean(0) for name, x in taken.items()} for taken in inputs]
    with silenced(model, gone, means), torch.no_grad():
        expected = model(IDS).logits
    before = model(IDS).logits
    plan = family_plan(biases=True)
    prune_to(model, IDS, plan, "flap")
    write_pruned(model, plan, None, tmp_path / "pruned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("recipe", ["flap", "magnitude"])
def test_a_sparsity_of_the_layers_is_theirs(recipe):
    """And with rounded sizes channels are multiples, which the heads are anyway."""
    model = make_llama(num_key_value_heads=2, vocab_size=4000, intermediate_size=512)
    work = work_on(model, IDS, uncorrected(recipe))
    before = count_parameters(model)["decoder_layers"]
    plan, findings = measure_and_decide(work, Budget(before, 0.3, round_to=8), SurveyProgress())
    assert all(shape.intermediate_size % 8 == 0 for shape in plan)
    plan, _ = measure_and_decide(work, Budget(before, 0.3), SurveyProgress())
    prune_layers(work, plan, findings, Progress())
    assert 1 - count_parameters(model)["decoder_layers"] / before == pytest.approx(0.3, abs=0.005)


@pytest.mark.parametrize("recipe", ["flap", "magnitude"])
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_read(here, recipe):
    Path("tiny/model.safetensors").write_bytes(Path("tiny/model.safetensors").read_bytes()[:-1000])
    asked = dict(datasets="ids.safetensors", recipe=recipe, save_dir="out", sparsity=0.95)
    with pytest.raises(UsageError, match=f"--sparsity 0.95 is impossible .*--recipe {recipe}: .*largest possible is 0"):
        olica.prune("tiny", **asked)
    assert not Path("out").exists() and not Path("data").exists()
