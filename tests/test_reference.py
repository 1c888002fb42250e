"""The released code's figures on a tiny random LLaMA (float32, autocast off), which `--recipe olica` repeats."""

import json

import pytest
import torch
from conftest import TEST_DATA, allocate, prune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from olica.machine import BatchSize

FOLDER = TEST_DATA / "reference_tiny_llama"
FIGURES = json.loads((FOLDER / "figures.json").read_text())


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "figures.safetensors")


def test_the_dense_model_is_the_one_that_was_measured(tensors):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    torch.testing.assert_close(model(tensors["probe_ids"]).logits, tensors["dense_logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", list(FIGURES))
def test_olica_repeats_the_released_code(case, tensors):
    figures = FIGURES[case]
    asked = figures["options"]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    config, total = model.config, model.num_parameters()
    assert total == figures["parameters_before"]

    _, shares = allocate("olica", config, total, asked["sparsity"], asked["k"])
    given = {name: asked[name] for name in ("k", "mlp_num", "ratio", "percdamp")}
    _, plan = prune(model, tensors["calibration_ids"], "olica", asked["sparsity"], batch_size=BatchSize(7), **given)

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
