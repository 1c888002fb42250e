"""Calibration sets and weights that break careless numerics: a sound result, or an error that names the place."""

import numpy as np
import pytest
import torch
from conftest import make_llama, prune, raising

from olica.errors import UsageError
from olica.methods.recipes import RECIPES
from olica.pruning.soundness import cast_weights

IDS = torch.randint(3, 259, (8, 24), generator=torch.Generator().manual_seed(0))
ALL_RECIPES = pytest.mark.parametrize("recipe", list(RECIPES))


def pruned_soundly(model, ids, recipe: str = "olica", **overrides) -> torch.Tensor:
    """Logits after pruning, which have to be finite, as have all weights."""
    prune(model, ids, recipe, 0.2, **overrides)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    logits = model(IDS).logits.detach()
    assert torch.isfinite(logits).all()
    return logits


@ALL_RECIPES
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_fewer_tokens_than_features(recipe, tokens):
    pruned_soundly(make_llama(num_key_value_heads=2), IDS[:1, :tokens], recipe)


@ALL_RECIPES
def test_features_that_are_always_zero_or_constant(recipe):
    model = make_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:9] = 0
            layer.mlp.up_proj.weight[:30] = 0  # dead channels
            layer.self_attn.v_proj.weight[:20] = 0  # a dead value head and part of another
        model.model.embed_tokens.weight[:, 9:20] = 1.5
    pruned_soundly(model, IDS, recipe)


@ALL_RECIPES
def test_samples_that_are_all_the_same(recipe):
    pruned_soundly(make_llama(), IDS[:1].expand(8, -1).clone(), recipe)
    pruned_soundly(make_llama(), torch.full((8, 24), 7), recipe)


def test_repeating_a_calibration_set_decides_nothing():
    """The ridge of the paper grows with the sums, so twice the same text is the same text."""
    once, twice = (pruned_soundly(make_llama(), ids, "olica-paper") for ids in (IDS, IDS.repeat(2, 1)))
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-3)


@ALL_RECIPES
def test_massive_activations(recipe):
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 3e4
        model.model.embed_tokens.weight[5] *= 1e3
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[3] = 300.0
    pruned_soundly(model, IDS, recipe)


@pytest.mark.parametrize("scale", [6.0, 60.0, 600.0])
def test_the_correlation_survives_a_massive_constant_feature(scale):
    """Against numpy in float64 on the raw activations; the other features are of size 0.2."""
    model = make_llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = scale
        model.model.layers[0].post_attention_layernorm.weight[3] = 10.0
    seen = {}
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    model(IDS)
    handle.remove()
    x, y = (seen[name].detach().flatten(0, 1).double().numpy() for name in "xy")
    released = 0.5 * (x**2).sum(0).mean() / (IDS.numel() / 128**2)
    predicted = x @ np.linalg.solve(x.T @ x + released * np.eye(x.shape[1]), x.T @ y)
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(predicted.T, y.T, strict=True)])
    findings, _ = prune(model, IDS, "olica", 0.2)
    assert findings[0]["correlation"].item() == pytest.approx(expected, abs=1e-3)


def test_an_mlp_whose_input_is_zero_names_the_layer_and_the_projection():
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    with pytest.raises(UsageError, match=r"--percdamp .* layer 1 .*gate_proj.* singular"):
        prune(model, IDS, "olica", 0.2)


@pytest.mark.parametrize(("projection", "place"), [("self_attn.v_proj", "o_proj"), ("mlp.up_proj", "down_proj")])
def test_activations_that_overflow_name_the_layer_and_the_projection(projection, place):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].get_submodule(projection).weight.mul_(1e38)
    with pytest.raises(UsageError, match=rf"in layer 1 .*output of {place}.* are NaN or infinite; .*--base_model"):
        prune(model, IDS, "olica", 0.2)


@pytest.mark.parametrize(
    ("place", "projections"),
    [
        ("olica.methods.linalg", "in layer 0 the decomposition of q_proj or k_proj"),
        ("olica.methods.value_output", "in layer 0 the decomposition of v_proj and o_proj"),
        ("olica.methods.correction", "in layer [01] the decomposition of the MLP"),
    ],
)
def test_a_decomposition_that_fails_names_the_layer_and_the_projections(monkeypatch, place, projections):
    monkeypatch.setattr(f"{place}.principal_components", raising(torch.linalg.LinAlgError("did not converge")))
    with pytest.raises(UsageError, match=projections):
        prune(make_llama(), IDS, "olica", 0.2)


def test_new_weights_that_the_dtype_cannot_hold():
    like = torch.zeros(1, dtype=torch.float16)
    assert cast_weights({"q_proj.reduce.weight": torch.ones(2)}, 3, like)["q_proj.reduce.weight"].dtype == like.dtype
    with pytest.raises(UsageError, match="in layer 3 the new correction.expand.weight .*--dtype bfloat16"):
        cast_weights({"correction.expand.weight": torch.tensor([1e6])}, 3, like)


@ALL_RECIPES
@pytest.mark.parametrize(("key_value_heads", "head_dim"), [(4, 80), (2, 160)])
def test_heads_that_are_wider_than_what_they_write(recipe, key_value_heads, head_dim):
    """As those of tiny Gemmas, whose heads have 256 features whatever the hidden size, here 64."""
    pruned_soundly(make_llama(num_key_value_heads=key_value_heads, head_dim=head_dim), IDS, recipe)


def test_logits_that_overflow_decide_no_sizes():
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = -1e38
    with pytest.raises(UsageError, match="the model's logits of the calibration set are NaN or infinite; .*base_model"):
        prune(model, IDS, "olica-plus", 0.2)
