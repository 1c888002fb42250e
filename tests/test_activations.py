import pytest
import torch
from conftest import make_llama, no_memory_for_more_than, raising

from olica.machine import BatchSize
from olica.methods.moments import TAPS, Moments, cosine, cross, diagonal, full, total
from olica.pruning.activations import calibrate, propagate, record_layer_calls, recording

CPU = torch.device("cpu")
STATISTICS = [
    total("mlp_input"),
    full("mlp_input"),
    diagonal("attention_output"),
    cross("mlp_input", "mlp_output"),
]


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


def test_hidden_states_live_where_they_are_to(ids):
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
    assert torch.equal(seen["layer_input"], hidden)
    assert torch.equal(seen["layer_output"], layer(hidden, **calls[0]))
    assert not layer.mlp.down_proj._forward_hooks and not layer.mlp.down_proj._forward_pre_hooks


def with_tuples(layer) -> None:
    """Have a layer return a tuple, as those of some releases do."""
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("advance", [False, True])
@torch.no_grad()
def test_the_layers_own_taps_are_its_input_and_output(ids, dtype, as_tuple, advance):
    """Batch by batch, whose last is smaller; the cosine is between the two, token by token."""
    model = make_llama().to(dtype)
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    layer, start = model.model.layers[0], hidden.clone()
    outputs = torch.cat([layer(batch, **calls[0]) for batch in start.split(2)])
    if as_tuple:
        with_tuples(layer)
    both = cosine("layer_input", "layer_output")
    moments = Moments([total("layer_input"), diagonal("layer_output"), both], 4)
    calibrate(layer, hidden, calls[0], moments, BatchSize(2), advance=advance)
    assert torch.equal(hidden, outputs if advance else start)
    x, y = (states.flatten(0, 1).double() for states in (start, outputs))
    torch.testing.assert_close(moments[total("layer_input")], x.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments[diagonal("layer_output")], y.square().sum(0), rtol=1e-5, atol=1e-5)
    expected = ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum()
    assert moments[both].dtype == torch.float64 and moments.count == ids.numel()
    torch.testing.assert_close(moments[both], expected, rtol=1e-5, atol=1e-5)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


@torch.no_grad()
def test_the_cosine_of_batches_is_that_of_the_whole(ids):
    model, found = make_llama(), []
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    for size in (1, 3, 5):
        moments = Moments([cosine("layer_input", "layer_output"), cosine("mlp_input", "mlp_output")], 4)
        calibrate(model.model.layers[1], hidden.clone(), calls[1], moments, BatchSize(size), advance=False)
        found.append(torch.stack([moments[s] for s in sorted(moments.statistics, key=str)]))
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], found[2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_calibrate_advances_only_when_asked_to(ids):
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


@torch.no_grad()
def test_what_comes_behind_the_last_tap_is_not_computed(ids):
    model, calls_of_down = make_llama(), []
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    layer = model.model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda *_: calls_of_down.append(1))
    calibrate(layer, hidden, calls[0], Moments([diagonal("intermediate")], 4), BatchSize(2), advance=False)
    assert not calls_of_down
    calibrate(layer, hidden, calls[0], Moments([diagonal("mlp_output")], 4), BatchSize(2), advance=False)
    assert len(calls_of_down) == 3


@pytest.mark.parametrize("error", ["cuda", "cublas", "cpu"])
@pytest.mark.parametrize("advance", [False, True])
@torch.no_grad()
def test_out_of_memory_halves_the_batch_and_goes_on(ids, error, advance, caplog):
    model = make_llama()
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    layer, batch_size, expected_hidden = model.model.layers[0], BatchSize(5), hidden.clone()
    expected, found = Moments(STATISTICS, 4), Moments(STATISTICS, 4)
    calibrate(layer, expected_hidden, calls[0], expected, BatchSize(1), advance)
    layer.mlp.down_proj.register_forward_pre_hook(no_memory_for_more_than(2, error))
    calibrate(layer, hidden, calls[0], found, batch_size, advance)
    assert batch_size.size == 2 and "--batch_size 2" in caplog.text
    assert found.count == ids.numel()
    for statistic in STATISTICS:
        torch.testing.assert_close(found[statistic], expected[statistic], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden, expected_hidden)


@torch.no_grad()
def test_a_batch_that_does_not_fit_into_the_sums_is_not_half_added(ids, monkeypatch):
    model = make_llama()
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    expected, found = Moments(STATISTICS, 4), Moments(STATISTICS, 4)
    calibrate(model.model.layers[0], hidden, calls[0], expected, BatchSize(2), advance=False)
    empty_sum, failures = Moments._empty_sum, []

    def failing(self, *arguments):
        if len(failures) < 2 and len(self._sums) == 2:
            failures.append(1)
            torch.empty(2**60)
        return empty_sum(self, *arguments)

    monkeypatch.setattr(Moments, "_empty_sum", failing)
    calibrate(model.model.layers[0], hidden, calls[0], found, BatchSize(8), advance=False)
    assert len(failures) == 2
    for statistic in STATISTICS:
        torch.testing.assert_close(found[statistic], expected[statistic], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_single_sample_that_does_not_fit_ends_the_run(ids):
    model, batch_size = make_llama(), BatchSize(4)
    hidden, calls = record_layer_calls(model.model, ids, CPU)
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(no_memory_for_more_than(0, "cuda"))
    with pytest.raises(torch.OutOfMemoryError):
        propagate(model.model.layers[0], hidden, calls[0], batch_size)
    assert batch_size.size == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4).run(raising(RuntimeError("shapes do not match")), 8)
