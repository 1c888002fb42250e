"""OSSCAR: uniform ratios, and what its exchanges change; test_slimgpt.py has what both recipes share."""

import pytest
import torch
from conftest import as_method, make_llama, prune

from olica.methods.sizes import Budget, Sizes

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("groups", [8, 4])
def test_every_layer_loses_as_much(groups):
    sizes = [Sizes(64, 8, groups, 8, 1000)] * 6
    plan = as_method("osscar").allocate.before_survey(sizes, Budget(6 * sizes[0].layer, 0.25))
    assert [shape.kv_heads for shape in plan] == [groups * 3 // 4] * 6
    assert max(s.intermediate_size for s in plan) - min(s.intermediate_size for s in plan) <= 1
    assert not any(shape.o_bias or shape.down_bias for shape in plan)


def pruned(recipe: str, **parameters):
    """Weights of a small pruned model, and its plan."""
    model = make_llama(intermediate_size=44, num_hidden_layers=2)
    _, plan = prune(model, IDS, recipe, 0.3, **parameters)
    return model.state_dict(), plan


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, others[name]) for name, weight in some.items())


def test_without_exchanges_it_is_the_greedy_removal_at_uniform_ratios():
    none, plan = pruned("osscar", swaps=0)
    greedy, same_plan = pruned("slimgpt", first_ratio=1.0)
    assert plan == same_plan and equal(none, greedy)
    assert not equal(none, pruned("osscar")[0])
