"""The released code's figures on a tiny random LLaMA (float32, autocast off), which `--recipe olica` repeats."""

import json

import pytest
import torch
from conftest import TEST_DATA, allocate
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from olica.machine import BatchSize
from olica.methods.allocation import allocate, correction_rank
from olica.methods.recipes import RECIPES
from olica.pruning.layers import prune_layers
from olica.pruning.options import PruningOptions
from olica.pruning.progress import Progress
from olica.pruning.survey import choose_corrected, survey_layers
from olica.sources.dense_model import DenseModel

FOLDER = TEST_DATA / "reference_tiny_llama"
FIGURES = json.loads((FOLDER / "figures.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "figures.safetensors")


def test_the_dense_model_is_the_one_that_was_measured(tensors):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    torch.testing.assert_close(model(tensors["probe_ids"]).logits, tensors["dense_logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", list(FIGURES))
def test_olica_repeats_the_released_code(case, tensors):
    figures, recipe = FIGURES[case], RECIPES["olica"]
    asked = figures["options"]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    config, total = model.config, model.num_parameters()
    assert total == figures["parameters_before"]

    plan, shares = allocate(recipe, config, total, asked["sparsity"], asked["k"])
    options = PruningOptions(
        percdamp=asked["percdamp"],
        mlp_num=asked["mlp_num"],
        correction_rank=correction_rank(config, asked["ratio"]),
        batch_size=BatchSize(7),
        device=CPU,
        cache_device=CPU,
    )
    ids = tensors["calibration_ids"]
    dense, work = DenseModel(model), (recipe, options, Progress())
    survey = survey_layers(dense, ids, plan, *work)
    plan = choose_corrected(plan, survey, recipe, options)
    prune_layers(dense, ids, plan, survey, *work)

    named = {"query": "query_key", "key": "query_key", "value_output": "value_output", "feed_forward": "feed_forward"}
    expected_shares = {name: figures[f"{part}_sparsity"] for name, part in named.items()}
    assert vars(shares) == pytest.approx(expected_shares, rel=1e-12)
    expected = figures["shape"]
    assert [s.correction_rank for s in plan] == expected["calibration_rank"]
    assert [i for i, s in enumerate(plan) if s.correction_rank] == figures["calibrated_layers"]
    for shape in plan:
        assert (shape.q_rank, shape.k_rank) == (expected["q_rank"], expected["k_rank"])
        assert shape.v_head_dim * config.num_key_value_heads == expected["v_width"]
        assert shape.intermediate_size == expected["intermediate_size"]
    after = model.num_parameters()
    assert after == figures["parameters_after"]
    assert 1 - after / total == pytest.approx(figures["measured_sparsity"], rel=1e-12)

    logits, reference = model(tensors["probe_ids"]).logits, tensors[f"{case}_logits"]
    difference = (logits - reference).norm() / reference.norm()
    assert difference < 1e-3
    dense = tensors["dense_logits"]
    moved = (logits - dense).norm() / dense.norm()
    assert moved.item() == pytest.approx(figures["relative_logit_change"], rel=1e-3)
