"""LoRAP by numpy: weighted SVDs of the attention's projections, channels by L2 norms of Wanda's scores."""

import copy

import numpy as np
import pytest
import torch
from by_threshold import inputs_of
from conftest import make_llama, prune
from transformers import LlamaConfig

from olica.methods.lorap import RATIO, lorap, lorap_sparsities
from olica.methods.recipe import NoParameters
from olica.methods.sizes import Budget, Sizes

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32)
PARAMETERS_7B = 6_738_415_616


def plan_of(sparsity: float, sizes: list[Sizes], whole: int):
    return lorap(NoParameters()).allocate.before_survey(sizes, Budget(whole, sparsity))


def test_ranks_of_llama_7b():
    """At 20 % value and output are dense, and queries and keys have 40 % fewer parameters; at 50 % all are factors."""
    sizes = Sizes.of_all(LLAMA_7B)
    plan = plan_of(0.2, sizes, PARAMETERS_7B)
    assert {(s.q_rank, s.k_rank, s.v_rank, s.o_rank, s.v_head_dim) for s in plan} == {(1229, 1229, 0, 0, 128)}
    removed = 2 * 4096 * (4096 - 2 * 1229) + 3 * 4096 * (11008 - plan[0].intermediate_size)
    assert 32 * removed / PARAMETERS_7B == pytest.approx(0.2, abs=0.0005)
    shape = plan_of(0.5, sizes, PARAMETERS_7B)[0]
    assert (shape.q_rank, shape.k_rank, shape.v_rank, shape.o_rank) == (512, 512, 1536, 1536)
    assert shape.v_head_dim == 128


@pytest.mark.parametrize("layer", [Sizes(64, 8, 8, 8, 200), Sizes(64, 9, 3, 8, 200)], ids=["plain", "grouped"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.4, 0.41, 0.6])
def test_attention_loses_the_sparsity_and_the_mlps_the_rest(layer, sparsity):
    sizes, budget = [layer] * 3, Budget(200_000, sparsity)
    shares = lorap_sparsities(sizes, budget, RATIO)
    assert shares.query == shares.key
    assert shares.value_output == (0 if sparsity <= 0.4 else pytest.approx(shares.query / 3))
    attention = shares.query * (layer.query + layer.key) + shares.value_output * layer.value_output
    assert attention == pytest.approx(sparsity * (layer.layer - layer.feed_forward))
    assert 3 * (attention + shares.feed_forward * layer.feed_forward) == pytest.approx(sparsity * 200_000)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("sparsity", [0.2, 0.45])
def test_a_layer_is_what_numpy_makes_of_it(groups, sparsity):
    """The last layer, measured as it runs behind the pruned ones while it is intact."""
    dense, model = make_llama(num_key_value_heads=groups), make_llama(num_key_value_heads=groups)
    _, plan = prune(model, IDS, "lorap", sparsity)
    shape, new = plan[-1], model.model.layers[-1]
    hybrid = copy.deepcopy(model)
    hybrid.model.layers[-1] = dense.model.layers[-1]
    inputs, old = inputs_of(hybrid, IDS)[-1], dense.model.layers[-1]
    weights = {
        name: module.weight.detach().double().numpy()
        for name, module in (*old.self_attn.named_children(), *old.mlp.named_children())
        if name.endswith("_proj")
    }
    norms = {name: np.linalg.norm(x, axis=0) for name, x in inputs.items()}
    for name, rank in (("q", shape.q_rank), ("k", shape.k_rank), ("v", shape.v_rank), ("o", shape.o_rank)):
        name = f"{name}_proj"
        projection, weight = getattr(new.self_attn, name), weights[name]
        if rank:
            u, s, vt = np.linalg.svd(weight * norms[name], full_matrices=False)
            expected = (u[:, :rank] * s[:rank]) @ vt[:rank] / norms[name]
            found = (projection.expand.weight @ projection.reduce.weight).detach().numpy()
            assert projection.reduce.weight.shape == (rank, weight.shape[1])
            np.testing.assert_allclose(found, expected, atol=1e-5)
        else:
            assert name[0] in "vo" and sparsity <= 0.4
            np.testing.assert_array_equal(projection.weight.detach(), weight.astype(np.float32))
    scores = sum(np.linalg.norm(weights[n] * norms[n], axis=1) for n in ("gate_proj", "up_proj"))
    scores += np.linalg.norm(weights["down_proj"] * norms["down_proj"], axis=0)
    order = np.argsort(scores)
    kept = np.sort(np.concatenate([order[:1], order[176 - shape.intermediate_size + 1 :]]))  # int(0.01 x 176) lowest
    np.testing.assert_array_equal(new.mlp.down_proj.weight.detach(), weights["down_proj"][:, kept].astype(np.float32))
    for name in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(getattr(new.mlp, name).weight.detach(), weights[name][kept].astype(np.float32))


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="queries would have to lose 10[0-9.]*%"):
        plan_of(0.68, Sizes.of_all(LLAMA_7B), PARAMETERS_7B)
