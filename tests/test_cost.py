"""Run with: pytest tests/test_cost.py."""

import struct
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from olica.evaluation import cost
from olica.evaluation.measures import sizes
from olica.model.skeleton import count_parameters
from olica.sources.model_files import folder_weight_bytes

# The grouped tiny LLaMA, by hand: D 64, F 176, 4 query and 2 key/value heads of width 16, 3 layers, V 320.
GROUPED_LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 2 * 64
GROUPED_TOTAL = 3 * GROUPED_LAYER + 320 * 64 + 64
FULL_LAYER = 64 * 64 * 4 + 3 * 64 * 176 + 2 * 64
FULL_TOTAL = 3 * FULL_LAYER + 2 * 320 * 64 + 64


def test_tied_parameters_count_once(grouped_llama):
    counts = count_parameters(grouped_llama)
    assert counts == {"total": GROUPED_TOTAL, "decoder_layers": 3 * GROUPED_LAYER}


def test_untied_head_counts_apart():
    assert count_parameters(make_llama()) == {"total": FULL_TOTAL, "decoder_layers": 3 * FULL_LAYER}


def test_parameters_of_a_base_model(grouped_llama):
    assert count_parameters(grouped_llama.model) == count_parameters(grouped_llama)


@pytest.mark.parametrize("pruned", [False, True])
def test_macs_are_those_that_torch_counts(pruned):
    """torch counts two operations for every product; it does not know the CPU's attention kernel, hence eager."""
    model = make_llama(num_key_value_heads=2, attn_implementation="eager")
    if pruned:
        prune(model, torch.arange(3, 203).view(10, 20), "olica", 0.3, mlp_num=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 40)[None], use_cache=False)
    assert cost.count_macs(model, 37) == counter.get_total_flops() // 2


def test_macs_of_dense_llama_7b():
    """The paper's Table 4 prints 424.02 G for what its text does not say are 64 tokens."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    assert cost.count_macs(model, 64) == pytest.approx(424.02e9, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_are_those_of_a_filled_cache(dtype):
    model = make_llama(num_key_value_heads=2).to(dtype)
    prune(model, torch.arange(3, 203).view(10, 20), "olica", 0.2, mlp_num=0)
    cache = model(torch.arange(3, 40)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.cache_bytes_per_token(model) * 37 == held


def test_weight_bytes_follow_the_dtype(grouped_llama):
    assert sizes(grouped_llama)["weight_bytes"] == 4 * GROUPED_TOTAL
    assert sizes(grouped_llama.bfloat16())["weight_bytes"] == 2 * GROUPED_TOTAL


def test_folder_bytes_are_weights_and_headers_of_every_shard(grouped_llama, tmp_path):
    grouped_llama.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    headers = [struct.unpack("<Q", path.read_bytes()[:8])[0] + 8 for path in shards]
    assert len(shards) > 1
    assert folder_weight_bytes(tmp_path) == 4 * GROUPED_TOTAL + sum(headers)


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert folder_weight_bytes(tmp_path) == 0


def test_generation_takes_turns_and_is_the_librarys(monkeypatch, grouped_llama):
    clock, calls = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock.now)
    prompts, models = torch.arange(12).view(2, 6), {"dense": grouped_llama, "deep": make_llama(num_hidden_layers=5)}
    for name, model in models.items():

        def hook(module, args, kwargs, output, name=name):
            clock.now += len(module.layers)
            calls.append((name, args[0] if args else kwargs["input_ids"]))

        model.model.register_forward_hook(hook, with_kwargs=True)
    result = cost.generation_latency(models, prompts, new_tokens=4, repeats=2)
    assert [name for name, _ in calls] == ["dense", "deep"] * 5 * 3  # the prompt and four tokens, three times
    for name, model in models.items():
        given = torch.cat([ids for called, ids in calls[:10] if called == name], dim=1)
        expected = model.generate(prompts, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(given, expected), name
    assert result["dense"]["prefill"] == {"median_s": 3, "min_s": 3, "max_s": 3, "ratio": 1}
    assert result["deep"]["prefill"]["ratio"] == result["deep"]["decode"]["ratio"] == pytest.approx(5 / 3)
    assert result["deep"]["decode"]["median_s"] == 5
