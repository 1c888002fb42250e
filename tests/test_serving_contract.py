"""What vLLM's and SGLang's Transformers backends ask of a model's code, as their documentation and code have it.

None of the two runs here: they want a GPU.
"""

import inspect
import pickle
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import make_llama
from tiny_families import make_family
from torch import nn
from transformers import AutoModel

from olica.model.configuration_olica import LayerShape, head_dim
from olica.model.families import FAMILIES
from olica.model.modeling_olica import CorrectedMLP
from olica.model.skeleton import pruned_skeleton

IDS = torch.arange(3, 43).view(2, 20)
# The first layer is dense, as olica-plus may leave it; then queries, values, both, heads, and a correction.
CHANGES = (
    {},
    {"q_rank": 12},
    {"v_head_dim": 5},
    {"q_rank": 12, "v_head_dim": 5},
    {"kv_heads": 2},
    {"correction_rank": 3},
)


def uneven(family: str):
    """A pruned model of which no two layers are of the same kind."""
    config = make_family(family, peculiar=False, num_hidden_layers=len(CHANGES)).config
    dense = LayerShape(0, 0, head_dim(config), 100)
    plan = [replace(dense, intermediate_size=100 - index, **change) for index, change in enumerate(CHANGES)]
    return pruned_skeleton(config, plan)


@pytest.fixture(params=[family for family in FAMILIES if family not in ("olmo2", "phi3")])
def model(request):
    return uneven(request.param)


def test_no_module_is_a_linear_one_with_a_forward_of_its_own(model):
    """They are rebuilt from their sizes, and the forward would be lost."""
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}


def test_all_modules_of_an_attention_class_have_projections_of_the_same_kinds(model):
    found = defaultdict(set)
    for layer in model.model.layers:
        found[type(layer.self_attn)].add(tuple(type(module) for module in layer.self_attn.children()))
    assert len(found) == 4 and all(len(kinds) == 1 for kinds in found.values())
    base = type(model.model.layers[0].self_attn)
    assert all(issubclass(kind, base) for kind in found)


def test_pairs_of_factors_are_not_taken_for_linear_maps(model):
    wrapped = [m for layer in model.model.layers for m in layer.self_attn.children() if not isinstance(m, nn.Linear)]
    assert not any(hasattr(module, "in_features") for module in wrapped)


def test_the_mlp_says_how_gate_and_up_are_joined(model):
    """Their fusion goes by the text of the forward; a correction is beside it, in a class of its own."""
    mlps = [layer.mlp.mlp if isinstance(layer.mlp, CorrectedMLP) else layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        assert "act_fn(self.gate_proj(x)) * self.up_proj(x)" in inspect.getsource(type(mlp).forward)


def test_the_base_model_is_built_on_meta_with_real_buffers_and_passes_arguments_on(model):
    with torch.device("meta"):
        base = AutoModel.from_config(model.config)
    assert type(base) is type(model.model) and base._supports_attention_backend
    assert {name for name, _ in base.named_parameters()} == {name for name, _ in model.model.named_parameters()}
    assert any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(base).forward).parameters.values())


def test_models_are_copied_and_pickled_with_their_classes():
    model = make_llama(num_hidden_layers=2).requires_grad_(False)
    plan = [LayerShape(0, 0, 16, 100), LayerShape(5, 5, 7, 90)]
    pruned = FAMILIES["llama"](pruned_skeleton(model.config, plan).config).eval()
    expected = pruned(IDS).logits
    for again in (deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert [type(layer.self_attn) for layer in again.model.layers] == [
            type(layer.self_attn) for layer in pruned.model.layers
        ]
        assert torch.equal(again(IDS).logits, expected)
