"""Allocation by ratios: exact budgets, proportions, caps."""

import pytest
import torch

from olica.methods.ratios import LayerRatios, scaled, uniform
from olica.methods.sizes import Budget, Sizes

LAYER = Sizes(hidden_size=64, num_heads=8, num_kv_heads=8, head_dim=8, intermediate_size=200)
GROUPED = Sizes(hidden_size=64, num_heads=9, num_kv_heads=3, head_dim=8, intermediate_size=200)


def relative(values):
    return lambda _findings, _layers: torch.tensor(values, dtype=torch.float64)


def parameters(shape, layer: Sizes) -> int:
    groups = layer.num_kv_heads - (shape.kv_heads or layer.num_kv_heads)
    heads = groups * 2 * layer.hidden_size * layer.head_dim * (1 + layer.groups)
    biases = layer.hidden_size * (shape.o_bias + shape.down_bias)
    return layer.layer - heads - 3 * layer.hidden_size * (layer.intermediate_size - shape.intermediate_size) + biases


def test_ratios_keep_their_proportions_until_a_cap():
    found = scaled(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([10.0, 10.0, 10.0]), torch.full((3,), 0.9), 6.0)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4, 0.0], dtype=torch.float64))
    found = scaled(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([10.0, 10.0, 10.0]), torch.full((3,), 0.5), 9.0)
    torch.testing.assert_close(found, torch.tensor([0.4, 0.5, 0.0], dtype=torch.float64))
    assert not scaled(torch.ones(2), torch.ones(2), torch.ones(2), 0.0).any()
    with pytest.raises(ValueError, match="too few parameters"):
        scaled(torch.tensor([1.0, 0.0]), torch.ones(2), torch.ones(2), 1.5)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("layer", [LAYER, GROUPED], ids=["plain", "grouped"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.6])
def test_the_budget_is_met_within_a_channel(layer, sparsity, biases):
    sizes = [layer] * 4
    budget = Budget(4 * layer.layer, sparsity)
    allocate = LayerRatios(relative([[1.0, 1.0], [1.0, 2.0], [3.0, 1.0], [0.5, 0.5]]), False, biases=biases)
    plan = allocate.before_survey(sizes, budget)
    left = sum(parameters(shape, layer) for shape in plan)
    assert abs(4 * layer.layer - left - budget.to_remove) <= 3 * 64 + 4 * 2 * 64 * biases
    assert all(shape.intermediate_size >= 1 for shape in plan)


def test_more_goes_where_the_ratio_is_higher_and_nothing_where_it_is_zero():
    allocate = LayerRatios(relative([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]), False, biases=False)
    plan = allocate.before_survey([LAYER] * 3, Budget(3 * LAYER.layer, 0.2))
    assert [shape.kv_heads for shape in plan] == [6, 5, 0]  # .2 and .4 of eight, rounded with what is owed
    lost = [200 - shape.intermediate_size for shape in plan]
    assert lost[2] == 0 and lost[1] == pytest.approx(2 * lost[0], abs=2)


def test_uniform_ratios_take_as_much_from_every_layer():
    plan = LayerRatios(uniform, False, biases=False).before_survey([LAYER] * 4, Budget(4 * LAYER.layer, 0.25))
    assert [(shape.kv_heads, shape.intermediate_size) for shape in plan] == [(6, 150)] * 4


def test_sizes_are_multiples_and_the_rest_goes_to_the_next_layer():
    allocate = LayerRatios(relative([[1.0, 1.0]] * 4), False, biases=False)
    plan = allocate.before_survey([LAYER] * 4, Budget(4 * LAYER.layer, 0.25, round_to=8))
    assert all(shape.intermediate_size % 8 == 0 for shape in plan)
    left = sum(parameters(shape, LAYER) for shape in plan)
    assert abs(0.75 * 4 * LAYER.layer - left) <= 8 * 3 * 64


def test_what_cannot_be_met_is_refused_before_anything_is_measured():
    reading = LayerRatios(relative([[1.0, 1.0]] * 2), True, biases=False)
    with pytest.raises(ValueError, match="one head and one channel"):
        reading.before_survey([LAYER] * 2, Budget(2 * LAYER.layer, 0.99))
    assert reading.before_survey([LAYER] * 2, Budget(2 * LAYER.layer, 0.5)) is None


@pytest.mark.parametrize("most", [0.9, 1.0])
def test_heads_go_where_channels_cannot_make_up_for_those_that_rounding_left(most):
    """Channels are at their cap, and half a head of what is to go would be left over."""
    layer = Sizes(hidden_size=64, num_heads=32, num_kv_heads=32, head_dim=16, intermediate_size=200)
    allocate = LayerRatios(relative([[0.25, 2.0]]), True, biases=False, most=most)
    head, channels = 4 * 64 * 16, 3 * 64 * int(most * 200)
    for heads in (7.1, 7.4, 7.9, 8.0):
        budget = Budget(layer.layer, (channels + heads * head - 3 * 64) / layer.layer)
        assert allocate.before_survey([layer], budget) is None
        (shape,) = allocate([layer], budget, [{}])
        assert shape.kv_heads == 32 - 8
        assert abs(layer.layer - parameters(shape, layer) - budget.to_remove) <= 3 * 64
