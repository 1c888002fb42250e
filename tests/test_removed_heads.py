"""Layers that lost key/value heads with their query heads: every family, grouped and ungrouped, layers that differ."""

import pytest
import torch
from tiny_families import WINDOW, generate, make_family
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from olica.evaluation.cost import cache_bytes_per_token, count_macs
from olica.model.configuration_olica import LayerShape, norm_spans_heads
from olica.model.families import FAMILIES
from olica.model.modeling_olica import (
    Projections,
    module_paths,
    projections_of,
    separate_projections,
    shrink_layer,
)
from olica.model.skeleton import pruned_skeleton, try_out

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
PROMPTS = IDS[:2, : WINDOW + 4]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REST = ("gate_proj", "up_proj", "down_proj", "correction")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize(("family", "grouped"), [(f, g) for f in FAMILIES for g in (True, False)])


def plan_of(grouped: bool) -> list[LayerShape]:
    """Heads removed alone, with all else that narrows a layer, and from no more than two of the three layers."""
    few, fewer = (2, 1) if grouped else (7, 4)
    return [
        LayerShape(0, 0, 10, 177, kv_heads=few, o_bias=True),
        LayerShape(13, 7, 7, 101, v_rank=5, o_rank=6, kv_heads=fewer, down_bias=True),
        LayerShape(0, 0, 9, 177),
    ]


def make_pruned(family: str, grouped: bool, plan: list[LayerShape]):
    """A pruned model with random weights, none of them left at its neutral value."""
    dense = make_family(family, grouped)
    torch.manual_seed(1)
    model = FAMILIES[family](pruned_skeleton(dense.config, plan).config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def padded_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with random rows behind, which stand for those of heads whose outputs nobody reads."""
    return torch.cat([tensor, torch.randn(rows - len(tensor), *tensor.shape[1:])])


def fill_as_dense(dense, pruned, plan: list[LayerShape]) -> None:
    """Give `dense` the weights of `pruned`, multiplied out; o_proj reads zero from what was removed."""
    shared = {name: weight for name, weight in pruned.state_dict().items() if "proj" not in name}
    assert not dense.load_state_dict(shared, strict=False).unexpected_keys
    width = dense.config.head_dim
    for layer, target, shape in zip(pruned.model.layers, dense.model.layers, plan, strict=True):
        separate_projections(target, dense.config)
        wide, kept = projections_of(target)._asdict(), shape.v_head_dim
        for name, module in projections_of(layer)._asdict().items():
            module = getattr(module, "linear", module)
            last = getattr(module, "expand", module)
            weight, bias = last.weight, last.bias
            if hasattr(module, "reduce"):
                weight = weight @ module.reduce.weight
            if name == "v_proj":
                weight, bias = (
                    part
                    if part is None
                    else nn.functional.pad(
                        part.reshape(-1, kept, *part.shape[1:]), (0, 0) * (part.dim() - 1) + (0, width - kept)
                    ).flatten(0, 1)
                    for part in (weight, bias)
                )
            if name == "o_proj":
                weight = nn.functional.pad(weight.unflatten(1, (-1, kept)), (0, width - kept)).flatten(1)
            weight = nn.functional.pad(weight, (0, wide[name].in_features - weight.shape[1]))
            if name in ATTENTION:
                weight = padded_rows(weight, wide[name].out_features)
                bias = bias if bias is None else padded_rows(bias, wide[name].out_features)
            elif name != "down_proj":
                weight = nn.functional.pad(weight, (0, 0, 0, wide[name].out_features - len(weight)))
                bias = bias if bias is None else nn.functional.pad(bias, (0, wide[name].out_features - len(bias)))
            wide[name].weight = nn.Parameter(weight)
            wide[name].bias = None if bias is None else nn.Parameter(bias)


@torch.no_grad()
@every_case
def test_it_is_the_dense_model_whose_output_projection_does_not_read_them(family, grouped, tmp_path):
    plan = plan_of(grouped)
    pruned, dense = make_pruned(family, grouped, plan), make_family(family, grouped)
    fill_as_dense(dense, pruned, plan)
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    ids, logits = generate(dense, PROMPTS, use_cache=False)
    for kind in ("dynamic", "static"):
        cached_ids, cached_logits = generate(pruned, PROMPTS, cache_implementation=kind)
        assert torch.equal(cached_ids, ids)
        torch.testing.assert_close(cached_logits, logits, rtol=1e-4, atol=1e-4)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_shapes == [shape.to_dict() for shape in plan]
    assert torch.equal(again(IDS).logits, pruned(IDS).logits)
    try_out(pruned_skeleton(make_family(family, grouped).config, plan))


@torch.no_grad()
@every_case
def test_products_and_cache_are_counted_layer_by_layer(family, grouped):
    """As torch counts, two operations for every product; it does not know the CPU's attention kernel, hence eager."""
    tokens = WINDOW - 1  # a layer with a sliding window caches no more
    model = make_pruned(family, grouped, plan_of(grouped))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(IDS[:1, :tokens], use_cache=False)
    assert count_macs(model, tokens) == counter.get_total_flops() // 2
    cache = model(IDS[:1, :tokens], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes_per_token(model) * tokens == held


def test_what_goes_with_a_head():
    """Two of three groups of three query heads, of width 10, in a layer of hidden size 63."""
    plan = [LayerShape(0, 0, 10, 177, kv_heads=2)] * 3

    def sizes(family: str) -> list[int]:
        layer = make_pruned(family, True, plan).model.layers[0]
        q, k, v, o, *_ = (getattr(module, "linear", module) for module in projections_of(layer))
        return [q.out_features, k.out_features, v.out_features, o.in_features]

    assert all(sizes(family) == [60, 20, 20, 60] for family in FAMILIES if family != "olmo2")
    assert sizes("olmo2") == [90, 30, 20, 60]


@every_family
def test_norms_over_all_heads_are_known(family):
    model = make_pruned(family, True, plan_of(True))
    norms = [norm for name, norm in model.model.layers[0].self_attn.named_children() if name.endswith("_norm")]
    spans = any(norm.weight.numel() > model.config.head_dim for norm in norms)
    assert norm_spans_heads(model.config) == norm_spans_heads(make_family(family).config) == spans


@pytest.mark.parametrize("passes", [(ATTENTION, REST), (REST, ATTENTION), (("correction",), ATTENTION, REST[:3])])
@every_family
def test_a_layer_can_be_shrunk_in_passes(family, passes):
    shape = LayerShape(13, 0, 7, 101, correction_rank=5, kv_heads=2, o_bias=True, down_bias=True)
    dense = make_family(family)
    at_once, in_passes, *_ = dense.model.layers
    shrink_layer(at_once, dense.config, shape)
    assert set(REST[:3] + ATTENTION) == set(Projections._fields)
    for only in passes:
        before = {name: in_passes.get_submodule(path) for name, path in module_paths(in_passes).items()}
        shrink_layer(in_passes, dense.config, shape, only)
        after = {name: in_passes.get_submodule(path) for name, path in module_paths(in_passes).items()}
        assert all(after[name] is module for name, module in before.items() if name not in only)
    assert str(in_passes) == str(at_once)
    sizes = [{name: weight.shape for name, weight in layer.named_parameters()} for layer in (at_once, in_passes)]
    assert sizes[0] == sizes[1]


def test_a_new_bias_leaves_the_weight():
    dense = make_family("mistral")
    layer, shape = dense.model.layers[0], LayerShape(0, 0, 10, 177, o_bias=True, down_bias=True)
    before = projections_of(layer)
    weights = [module.weight for module in before]
    with torch.device("meta"):
        shrink_layer(layer, dense.config, shape)
    after = projections_of(layer)
    assert all(module.weight is weight for module, weight in zip(after, weights, strict=True))
    unfilled = {name for name, parameter in layer.named_parameters() if parameter.is_meta}
    assert unfilled == {"self_attn.o_proj.bias", "mlp.down_proj.bias"}
