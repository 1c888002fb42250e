"""`--refit`: the same choice and the same size, another repair or none."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import as_method, make_llama, work_on

from olica.errors import UsageError
from olica.jobs import method_of
from olica.methods.feed_forward import ThinnedMLP
from olica.methods.plus import PlusParameters
from olica.methods.recipes import RECIPES
from olica.methods.refit import LeastSquares
from olica.methods.sizes import Budget
from olica.model.layouts import LAYOUTS
from olica.model.modeling_olica import projections_of
from olica.outputs.names import checkpoint_folder
from olica.pruning.layers import prune_layers
from olica.pruning.progress import Progress, SurveyProgress
from olica.run import measure_and_decide
from olica.settings import REFITS, Settings, settings_of

IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
WIDTH = 64


def pruned(method, dense):
    model = copy.deepcopy(dense)
    work = work_on(model, IDS, method)
    plan, findings = measure_and_decide(work, Budget(dense.num_parameters(), 0.25), SurveyProgress())
    prune_layers(work, plan, findings, Progress())
    return model, plan


def lost_columns(model, dense) -> list[torch.Tensor]:
    """For each layer how far each column of down_proj is from the nearest of the dense ones."""
    pairs = zip(model.model.layers, dense.model.layers, strict=True)
    weights = [
        (projections_of(layer).down_proj.weight, projections_of(whole).down_proj.weight) for layer, whole in pairs
    ]
    return [torch.cdist(weight.T.double(), whole.T.double()).amin(1) for weight, whole in weights]


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_repairs_what_stays_is_what_it_was_and_the_size_is_the_same(recipe):
    dense = make_llama(num_key_value_heads=2).requires_grad_(False)
    method = as_method(recipe)
    whole, _ = pruned(method, dense)
    bare, plan = pruned(method.refitted(None), dense)
    assert abs(bare.num_parameters() - whole.num_parameters()) <= 3 * 3 * WIDTH  # a channel in each layer
    assert not any(shape.correction_rank or shape.o_bias or shape.down_bias for shape in plan)
    assert all(distances.max() < 1e-5 for distances in lost_columns(bare, dense))


@pytest.mark.parametrize("recipe", RECIPES)
def test_least_squares_refits_what_the_recipe_chose(recipe):
    """The first layer that loses channels has none as it was, and has those of the bare cut."""
    dense = make_llama(num_key_value_heads=2).requires_grad_(False)
    method = as_method(recipe)
    bare, plan = pruned(method.refitted(None), dense)
    refitted, same = pruned(method.refitted(LeastSquares(0.5)), dense)
    assert plan == same
    first = next(number for number, shape in enumerate(plan) if shape.intermediate_size < 176)
    gates = [projections_of(model.model.layers[first]).gate_proj.weight for model in (bare, refitted)]
    if first == 0 and len(method.passes) == 1:  # else what is measured differs
        assert torch.equal(*gates)
    assert lost_columns(refitted, dense)[first].min() > 1e-5


@pytest.mark.parametrize(("recipe", "is_surveyed"), [
    ("olica-paper", False), ("olica-wanda", False), ("olica", True), ("flap", True), ("olica-plus", True),
])  # fmt: skip
def test_nothing_is_surveyed_that_nothing_reads(recipe, is_surveyed):
    """Which MLPs would be corrected has no part in it where none is; the basis of value heads still has."""
    method = as_method(recipe)
    assert method.survey is not None and (method.refitted(None).survey is not None) == is_surveyed


@pytest.mark.parametrize(("recipe", "parameters", "ridge"), [
    ("olica-plus", {"ridge": 5.0}, 5.0), ("wanda-sp", {}, PlusParameters.ridge),
])  # fmt: skip
def test_least_squares_has_the_ridge_of_the_recipe_if_it_has_one(recipe, parameters, ridge):
    settings = settings_of({"recipe": recipe, "refit": "least-squares"} | parameters)
    method = method_of(RECIPES[recipe], settings, LAYOUTS[settings.layout])
    mlp = next(stage for stages in method.passes for stage in stages if isinstance(stage, ThinnedMLP))
    assert mlp.refit.ridge == ridge


def test_the_flag_is_checked_and_names_the_folder():
    assert [*REFITS] == ["recipe", "none", "least-squares"]
    with pytest.raises(UsageError, match="--refit some is none of recipe, none, least-squares"):
        Settings(refit="some")
    assert checkpoint_folder("out", "7b", 0.2, recipe="flap", refit="none") == Path(
        "out/7b_sparsity-0.2_flap_refit-none"
    )
    assert settings_of({"refit": "none"}).flat()["refit"] == "none"
