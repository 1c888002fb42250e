import copy
from dataclasses import replace

import pytest
import torch
from conftest import allocate, make_llama, prune, pruning_options

from olica.errors import UsageError
from olica.machine import BatchSize
from olica.methods.moments import diagonal, full, needs
from olica.methods.recipes import RECIPES
from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of, shrink_layer
from olica.pruning.layers import _replace_weights, prune_layers
from olica.pruning.options import check_mlp_num
from olica.pruning.progress import Progress
from olica.pruning.survey import survey_layers
from olica.sources.dense_model import DenseModel

UNROTATED = ("olica-svd", "olica-awsvd", "olica-wanda")


@pytest.fixture
def ids():
    return torch.randint(0, 320, (9, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True},
                                       {"num_key_value_heads": 1, "attention_bias": True}])  # fmt: skip
def test_sparsity_zero_changes_nothing_and_rotates_where_it_should(ids, recipe, overrides):
    model = make_llama(**overrides)
    dense = copy.deepcopy(model)
    prune(model, ids, recipe, 0.0, mlp_num=0)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    for pruned_layer, dense_layer in zip(model.model.layers, dense.model.layers, strict=True):
        moved = pruned_layer.self_attn.v_proj.weight - dense_layer.self_attn.v_proj.weight
        is_rotated = moved.norm() > 0.1 * dense_layer.self_attn.v_proj.weight.norm()
        assert is_rotated == (recipe not in UNROTATED)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_batches_decide_nothing(ids, recipe):
    one, many = make_llama(num_key_value_heads=2), make_llama(num_key_value_heads=2)
    prune(one, ids, recipe, 0.2, batch_size=BatchSize(1))
    prune(many, ids, recipe, 0.2, batch_size=BatchSize(5))
    torch.testing.assert_close(one(ids).logits, many(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_calibrates_on_the_stream_that_it_names(ids, name):
    dense, model, seen = make_llama(), make_llama(), []
    inputs = {}
    for index, layer in enumerate(dense.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args, i=index: inputs.update({i: args[0]}))
    dense(ids)
    expected = [x.square().sum((0, 1)).double() for x in inputs.values()]

    @needs(*RECIPES[name].query_key.needs)
    def watched(layer, moments, shape):
        seen.append(moments[diagonal("attention_input")])
        return RECIPES[name].query_key(layer, moments, shape)

    recipe, source = replace(RECIPES[name], query_key=watched), DenseModel(model)
    plan, _ = allocate(recipe, model.config, model.num_parameters(), 0.3, 3.0)
    work = (recipe, pruning_options(), Progress())
    prune_layers(source, ids, plan, survey_layers(source, ids, plan, *work), *work)
    same = [torch.allclose(a, b, rtol=1e-3) for a, b in zip(seen, expected, strict=True)]
    expected_same = [True] * 3 if recipe.dense_stream else [True, False, False]
    assert same == expected_same


def test_without_calibration_nothing_is_ranked(ids):
    model = make_llama()
    survey, plan = prune(model, ids, "olica", 0.2, mlp_num=0)
    assert [layer.correlation for layer in survey] == [None] * 3
    assert not any(shape.correction_rank for shape in plan)
    recipe = RECIPES["olica"]
    assert full("mlp_input") not in recipe.survey_needs(ranking=False)
    assert full("intermediate") not in recipe.calibration_needs(calibrated=False)


def test_pruning_is_repeatable_to_the_bit(ids):
    first, second = make_llama(), make_llama()
    prune(first, ids, "olica", 0.2)
    prune(second, ids, "olica", 0.2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pruned_in_its_dtype(ids, dtype):
    model, single = make_llama().to(dtype), make_llama().to(dtype).float()  # the same weights
    dense = single(ids).logits
    prune(model, ids, "olica", 0.2)
    prune(single, ids, "olica", 0.2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = single(ids).logits
    change, moved = (model(ids).logits.float() - expected).norm(), (expected - dense).norm()
    assert change < 0.3 * moved, "a few channels of nearly equal importance may swap, no more"


def test_overflowing_activations_name_the_layer_and_the_place(ids):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(UsageError, match=r"in layer 1 .*output of down_proj are NaN or infinite"):
        prune(model, ids, "olica", 0.2)


def test_mlp_num_is_checked_against_the_layers():
    check_mlp_num(2, 3, RECIPES["olica"])
    check_mlp_num(3, 3, RECIPES["olica-paper"])
    for number, recipe in ((3, "olica"), (4, "olica-paper"), (-1, "olica")):
        with pytest.raises(UsageError, match=f"--mlp_num {number} .*3 layers"):
            check_mlp_num(number, 3, RECIPES[recipe])


@pytest.mark.parametrize(
    ("lacking", "added", "message"),
    [
        ([], ["v_proj.linear.bias"], "no place for self_attn.v_proj.linear.bias"),
        ([], ["q_proj.weight"], "no place for self_attn.q_proj.weight"),
        ([], ["correction.reduce.weight"], "no place for correction.reduce.weight"),
        (["q_proj.expand.weight"], [], "no weights were computed for self_attn.q_proj.expand.weight"),
        (["up_proj.weight", "k_proj.reduce.weight"], [], "k_proj.reduce.weight, mlp.up_proj.weight"),
        ([], [], None),
    ],
)
def test_every_computed_weight_finds_its_place_and_every_place_its_weight(lacking, added, message):
    layer, shape = make_llama().model.layers[0], LayerShape(5, 6, 7, 100)
    target = copy.deepcopy(layer)
    shrink_layer(target, make_llama().config, shape)
    weights = {
        f"{name}.{rest}": torch.randn_like(weight)
        for name, module in projections_of(target)._asdict().items()
        for rest, weight in module.named_parameters()
        if f"{name}.{rest}" not in lacking
    } | {name: torch.ones(5, 64) for name in added}
    if message is None:
        _replace_weights(layer, make_llama().config, shape, weights)
        assert layer.self_attn.v_proj.linear.weight is not None and layer.mlp.up_proj.weight.shape == (100, 64)
        return
    with pytest.raises(RuntimeError, match=message):
        _replace_weights(layer, make_llama().config, shape, weights)
