import pytest
import torch
from conftest import make_llama

from olica.activations import BatchSize, calibrate, propagate, record_layer_calls, recording
from olica.moments import TAPS, Moments, full

CPU = torch.device("cpu")


@pytest.fixture
def ids():
    return torch.randint(0, 320, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_replaying_the_layers_gives_the_models_hidden_states(ids, attention):
    model = make_llama(num_key_value_heads=2)
    model.set_attn_implementation(attention)
    expected = model.model(ids, output_hidden_states=True).hidden_states
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    torch.testing.assert_close(hidden, expected[0])
    for index, layer in enumerate(model.model.layers):
        propagate(layer, hidden, calls[index], BatchSize(2))
        if index + 1 < len(model.model.layers):  # the last of HF's states is behind the final norm
            torch.testing.assert_close(hidden, expected[index + 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model.norm(hidden), expected[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_recording_calls_leaves_the_model_as_it_was(ids):
    model = make_llama()
    before = model(ids).logits
    record_layer_calls(model.model, ids, CPU)
    assert torch.equal(model(ids).logits, before)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


def test_hidden_states_live_where_they_are_told(ids):
    hidden, _ = record_layer_calls(make_llama().model, ids, torch.device("meta"))
    assert hidden.device.type == "meta" and hidden.shape == (5, 12, 64)


@torch.no_grad()
def test_batches_give_what_single_samples_give(ids):
    model = make_llama()
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    layer = model.model.layers[1]
    single, batched = hidden.clone(), hidden.clone()
    propagate(layer, single, calls[1], BatchSize(1))
    propagate(layer, batched, calls[1], BatchSize(3))
    torch.testing.assert_close(batched, single)
    assert not torch.equal(batched, hidden)


@torch.no_grad()
def test_taps_are_what_the_projections_see(ids):
    model = make_llama()
    layer = model.model.layers[0]
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    with recording(layer, set(TAPS), stop=False) as seen:
        layer(hidden, **calls[0])
    torch.testing.assert_close(seen["attention_input"], layer.input_layernorm(hidden))
    torch.testing.assert_close(layer.self_attn.o_proj(seen["heads"]), seen["attention_output"])
    torch.testing.assert_close(layer.mlp(seen["mlp_input"]), seen["mlp_output"])
    torch.testing.assert_close(layer.mlp.down_proj(seen["intermediate"]), seen["mlp_output"])
    assert not layer.mlp.down_proj._forward_hooks and not layer.mlp.down_proj._forward_pre_hooks


@torch.no_grad()
def test_calibrate_advances_only_when_told(ids):
    model = make_llama()
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    layer, start = model.model.layers[0], hidden.clone()
    staying, moving = Moments([full("mlp_input")], 4), Moments([full("mlp_input")], 4)
    calibrate(layer, hidden, calls[0], staying, BatchSize(2), advance=False)
    assert torch.equal(hidden, start)
    calibrate(layer, hidden, calls[0], moving, BatchSize(2), advance=True)
    assert torch.equal(staying[full("mlp_input")], moving[full("mlp_input")])
    propagate(layer, start, calls[0], BatchSize(2))
    assert torch.equal(hidden, start)
    assert moving.count == ids.numel()
