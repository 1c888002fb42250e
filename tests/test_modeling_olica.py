import pickle
import sys

import pytest
import torch
from conftest import make_llama
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny_families import make_family
from torch import nn

from olica.model import configuration_olica, modeling_olica
from olica.model.configuration_olica import FORMAT, LayerShape, OlicaLlamaConfig
from olica.model.families import FAMILIES, pruned_models
from olica.model.modeling_olica import (
    CorrectedMLP,
    CroppedHeadsLinear,
    LowRankLinear,
    OlicaLlamaForCausalLM,
    PaddedHeadsLinear,
    projections_of,
    separate_projections,
)


def config_of(shapes: list[LayerShape] | None, **overrides) -> OlicaLlamaConfig:
    settings = make_llama(**overrides).config.to_dict()
    settings.pop("model_type")
    return OlicaLlamaConfig(**settings, layer_shapes=shapes and [shape.to_dict() for shape in shapes])


def test_without_shapes_the_model_is_the_dense_one():
    dense = make_llama()
    model = OlicaLlamaForCausalLM(config_of(None)).eval()
    model.load_state_dict(dense.state_dict())
    ids = torch.arange(30).view(2, 15)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits)


def test_low_rank_linear_is_the_product_of_its_factors():
    module = LowRankLinear(7, 5, 3, bias=True)
    x = torch.randn(2, 4, 7)
    expected = x @ (module.expand.weight @ module.reduce.weight).T + module.expand.bias
    torch.testing.assert_close(module(x), expected)
    assert sum(p.numel() for p in module.parameters()) == 3 * (7 + 5) + 5


def test_padding_and_cropping_undo_each_other():
    padded = PaddedHeadsLinear(nn.Linear(8, 6), kept=2, width=5, heads=4)
    cropped = CroppedHeadsLinear(nn.Linear(6, 8, bias=False), kept=2, width=5, heads=3)
    x = torch.randn(4, 6, 8)
    wide = padded(x)
    assert wide.shape == (4, 6, 20)
    assert (wide.view(4, 6, 4, 5)[:, :, :3, 2:] == 0).all() and (wide[..., 15:] == 0).all()
    assert torch.equal(wide.view(4, 6, 4, 5)[:, :, :3, :2].flatten(-2), padded.linear(x))
    torch.testing.assert_close(cropped(wide), padded.linear(x) @ cropped.linear.weight.T)


def test_only_what_shrinks_is_replaced():
    model = OlicaLlamaForCausalLM(
        config_of([LayerShape(0, 0, 16, 176), LayerShape(8, 0, 12, 100, 4), LayerShape(0, 5, 16, 100)])
    )
    first, second, third = model.model.layers
    linear = nn.Linear
    assert all(type(module) is linear for module in (first.self_attn.v_proj, first.mlp.up_proj, first.self_attn.o_proj))
    assert isinstance(second.self_attn.q_proj, LowRankLinear) and type(second.self_attn.k_proj) is linear
    assert isinstance(second.mlp, CorrectedMLP) and second.mlp.mlp.down_proj.in_features == 100
    assert isinstance(third.self_attn.k_proj, LowRankLinear) and type(third.self_attn.v_proj) is linear
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([], "0 rows for 3 layers"),
        ([{"q_rank": 1}] * 3, "has the keys"),
        ([LayerShape(1, 1, 17, 100).to_dict()] * 3, "v_head_dim = 17"),
        ([LayerShape(1, 1, 8, 0).to_dict()] * 3, "intermediate_size = 0"),
        ([LayerShape(-1, 1, 8, 10).to_dict()] * 3, "q_rank = -1"),
        ([LayerShape(1, 1, 8, 10, kv_heads=5).to_dict()] * 3, "kv_heads = 5"),
        ([LayerShape(1, 1, 8, 10, kv_heads=-1).to_dict()] * 3, "kv_heads = -1"),
        ([LayerShape(1, 1, 8, 10, kv_heads=True).to_dict()] * 3, "kv_heads = True"),
        ([LayerShape(1, 1, 8, 10, o_bias=1).to_dict()] * 3, "o_bias = 1"),
        ([LayerShape(1, 1, 8, 10, down_bias=2).to_dict()] * 3, "down_bias = 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    settings = make_llama().config.to_dict()
    settings.pop("model_type")
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        OlicaLlamaConfig(**settings, layer_shapes=shapes)


@pytest.mark.parametrize("bias", [True, False])
def test_separated_projections_do_what_the_fused_one_did(bias):
    layer = make_family("phi3").model.layers[0]
    config, x = make_family("phi3").config, torch.randn(2, 5, 63)
    layer.self_attn.qkv_proj = nn.Linear(63, (9 + 3 + 3) * 10, bias=bias)
    fused, expected = layer.self_attn.qkv_proj, layer.self_attn.qkv_proj(x)
    separate_projections(layer, config)
    torch.testing.assert_close(layer.self_attn.qkv_proj(x), expected)
    projections = projections_of(layer)
    assert torch.equal(projections.k_proj.weight, fused.weight[90:120])
    assert torch.equal(projections.v_proj.weight, fused.weight[120:])
    assert projections.gate_proj.weight.shape == projections.up_proj.weight.shape == (177, 63)
    assert projections.q_proj.weight.untyped_storage().nbytes() == 90 * 63 * 4, "the fused matrix would stay in memory"
    before = layer.self_attn.qkv_proj
    separate_projections(layer, config)
    assert layer.self_attn.qkv_proj is before


def test_a_correction_is_added_to_the_mlp():
    mlp = make_llama().model.layers[0].mlp
    corrected, x = CorrectedMLP(mlp, 64, 3), torch.randn(2, 5, 64)
    factors = corrected.correction
    torch.testing.assert_close(corrected(x), mlp(x) + x @ (factors.expand.weight @ factors.reduce.weight).T)


def test_a_later_format_is_refused():
    settings = config_of(None).to_dict()
    assert settings["olica_format"] == FORMAT
    message = f"olica_format is {FORMAT + 1}, .* update olica"
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        OlicaLlamaConfig.from_dict(settings | {"olica_format": FORMAT + 1})


def test_classes_are_made_once_and_found_by_their_names():
    for family in FAMILIES.values():
        for made in (family, family.base_class, family.config_class):
            assert getattr(sys.modules[made.__module__], made.__name__) is made
            assert pickle.loads(pickle.dumps(made)) is made
            assert made.__qualname__ == made.__name__ and "pruned" in made.__doc__.lower()
    assert FAMILIES["llama"] is OlicaLlamaForCausalLM and FAMILIES["llama"].config_class is OlicaLlamaConfig
    assert FAMILIES["gemma3_text"].__name__ == "OlicaGemma3TextForCausalLM"
    for module in (configuration_olica, modeling_olica):
        with pytest.raises(AttributeError, match="has no attribute 'OlicaLlamaForPoetry'"):
            module.OlicaLlamaForPoetry  # noqa: B018


def test_a_family_that_the_library_lacks_is_passed_over(monkeypatch):
    monkeypatch.setitem(configuration_olica.FAMILY_NAMES, "llama9", "Llama9")
    with pytest.raises(ImportError, match="no models of the type llama9: update transformers"):
        modeling_olica.OlicaLlama9ForCausalLM  # noqa: B018
    for kind in modeling_olica.KINDS:
        assert "llama9" not in pruned_models(kind)
    assert pruned_models("ForCausalLM") == FAMILIES
