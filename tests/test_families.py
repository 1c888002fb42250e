"""Every family, grouped and ungrouped heads, tied and untied embeddings: tiny models pruned, saved and used."""

import copy
import json
import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from called import call
from conftest import allocate, make_tokenizer, prune, prune_to, refused, write_pruned
from safetensors.torch import load_file, save_file
from tiny_families import PECULIARITIES, WINDOW, generate, kept_parameters, load, make_family
from torch import nn

import model_evaluate
import model_pruning
from olica.methods.recipes import RECIPES
from olica.model.configuration_olica import LayerShape
from olica.model.families import FAMILIES
from olica.model.modeling_olica import projections_of, separate_projections
from olica.model.skeleton import pruned_skeleton

ROOT = Path(__file__).parents[1]
CASES = [(family, grouped, tied) for family in FAMILIES for grouped in (True, False) for tied in (True, False)]
IDS = torch.randint(3, 319, (9, 23), generator=torch.Generator().manual_seed(0))
DENSE = [LayerShape(0, 0, 10, 177)] * 3
ODD = [LayerShape(13, 7, 7, 101), LayerShape(13, 0, 9, 101, correction_rank=5), LayerShape(0, 7, 7, 99)]


def of_cases(cases: list[tuple[str, bool, bool]]):
    names = [f"{f}-{'grouped' if g else 'ungrouped'}-{'tied' if t else 'untied'}" for f, g, t in cases]
    return pytest.mark.parametrize(("family", "grouped", "tied"), cases, ids=names)


every_case = of_cases(CASES)
# Whether embeddings are tied changes nothing of what a decoder layer does.
either_kind = of_cases([(family, grouped, tied) for family, grouped, tied in CASES if grouped == tied])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory):
    """Gives the folder of a case's model pruned to ODD; the logits on IDS in memory lie beside it."""
    root = tmp_path_factory.mktemp("families")

    @cache
    def folder_of(family: str, grouped: bool, tied: bool) -> Path:
        model = make_family(family, grouped, tied)
        prune_to(model, IDS, ODD)
        return save(model, ODD, root / f"{family}_{grouped}_{tied}")

    return folder_of


def save(model, plan: list[LayerShape], folder: Path) -> Path:
    """Write the checkpoint of a model that was pruned to a plan, and its logits on IDS beside the folder."""
    write_pruned(model, plan, None, folder)
    with torch.no_grad():
        save_file({"ids": IDS, "logits": model(IDS).logits}, folder.with_suffix(".safetensors"))
    return folder


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_every_family_is_tried_here():
    assert PECULIARITIES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("recipe", ["olica", "olica-paper"])
@either_kind
def test_rotating_without_removing_changes_nothing(family, grouped, tied, recipe):
    dense = make_family(family, grouped, tied)
    rotated = copy.deepcopy(dense)
    prune_to(rotated, IDS, DENSE, recipe)
    torch.testing.assert_close(rotated(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    for layer, dense_layer in zip(rotated.model.layers, dense.model.layers, strict=True):
        separate_projections(dense_layer, dense.config)
        for name in ("v_proj", "o_proj"):
            was = getattr(projections_of(dense_layer), name).weight
            moved = getattr(projections_of(layer), name).weight - was
            assert moved.norm() > 0.1 * was.norm(), "the rotation was not applied"


def expanded(layer: nn.Module, groups: int, heads: int, width: int) -> dict[str, tuple]:
    """Weights and biases of a pruned layer's projections, multiplied out and filled up with zeros (no correction)."""
    wide = {}
    for name, module in projections_of(layer)._asdict().items():
        parts = dict(module.named_children())
        last = parts.get("expand", parts.get("linear", module))
        weight = last.weight if "reduce" not in parts else last.weight @ parts["reduce"].weight
        bias = last.bias
        if name == "v_proj" and "linear" in parts:
            weight = nn.functional.pad(weight.unflatten(0, (groups, -1)), (0, 0, 0, width - module.kept)).flatten(0, 1)
            if bias is not None:
                bias = nn.functional.pad(bias.unflatten(0, (groups, -1)), (0, width - module.kept)).flatten()
        if name == "o_proj" and "linear" in parts:
            weight = nn.functional.pad(weight.unflatten(1, (heads, -1)), (0, width - module.kept)).flatten(1)
        wide[name] = (weight, bias)
    return wide


@either_kind
def test_the_pruned_model_is_the_librarys_with_its_weights_multiplied_out(family, grouped, tied):
    model, plan = make_family(family, grouped, tied), [LayerShape(13, 7, 7, 101)] * 3
    dense = copy.deepcopy(model)
    prune_to(model, IDS, plan)
    config = dense.config
    for layer, target in zip(model.model.layers, dense.model.layers, strict=True):
        sizes = (config.num_key_value_heads, config.num_attention_heads, config.head_dim)
        wide = expanded(layer, *sizes)
        separate_projections(target, config)
        for name, (weight, bias) in wide.items():
            projection = getattr(projections_of(target), name)
            weight = nn.functional.pad(weight, (0, projection.in_features - weight.shape[1]))
            weight = nn.functional.pad(weight, (0, 0, 0, projection.out_features - len(weight)))
            projection.weight = nn.Parameter(weight)
            if bias is not None:
                projection.bias = nn.Parameter(nn.functional.pad(bias, (0, projection.out_features - len(bias))))
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


FRESH_PROCESS = """
import sys
from pathlib import Path
from safetensors.torch import load_file
installed = {installed}
if installed:
    import olica
else:
    sys.modules["olica"] = None  # whoever imports it fails, as where it is not installed
from transformers import AutoModel, AutoModelForCausalLM
arguments = dict() if installed else dict(trust_remote_code=True)
for path in sys.argv[1:]:
    expected = load_file(Path(path).with_suffix(".safetensors"))
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **arguments)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (path, info)
    assert type(model).__module__.startswith("olica." if installed else "transformers_modules."), type(model)
    assert (model.eval()(expected["ids"]).logits == expected["logits"]).all(), path
    base = AutoModel.from_pretrained(path, **arguments)
    assert type(base) is type(model).base_class, (path, type(base))
print("equal logits", len(sys.argv) - 1)
"""


@pytest.fixture(scope="module")
def by_every_recipe(tmp_path_factory) -> list[Path]:
    """Folders of a llama pruned by each recipe."""
    root, folders = tmp_path_factory.mktemp("recipes"), []
    for recipe in RECIPES:
        model = make_family("llama")
        _, plan = prune(model, IDS, recipe, 0.2)
        folders.append(save(model, plan, root / recipe))
    return folders


@pytest.mark.parametrize("installed", [True, False])
def test_all_load_in_a_fresh_process_with_and_without_olica(
    pruned_folder, by_every_recipe, installed, tmp_path, fast_python
):
    folders = [*(pruned_folder(*case) for case in CASES), *by_every_recipe]
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT) if installed else ""}
    command = [fast_python, "-c", FRESH_PROCESS.format(installed=installed), *map(str, folders)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal", "logits", str(len(CASES) + len(RECIPES))]


@either_kind
def test_generation_is_the_same_whatever_the_cache_and_the_padding(pruned_folder, family, grouped, tied):
    model = load(pruned_folder(family, grouped, tied))
    prompts = IDS[:2, : WINDOW + 4]
    ids, logits = generate(model, prompts, use_cache=False)
    assert ids.shape == (2, WINDOW + 12)
    for kind in ("dynamic", "static"):
        cached_ids, cached_logits = generate(model, prompts, cache_implementation=kind)
        assert torch.equal(cached_ids, ids)
        torch.testing.assert_close(cached_logits, logits, rtol=1e-4, atol=1e-4)
    short_ids, short_logits = generate(model, prompts[:1, 5:])
    padded = torch.cat([nn.functional.pad(prompts[:1, 5:], (5, 0), value=0), prompts[1:]])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    batch_ids, batch_logits = generate(model, padded, attention_mask=mask)
    assert torch.equal(batch_ids[0, 5:], short_ids[0]) and torch.equal(batch_ids[1], ids[1])
    torch.testing.assert_close(batch_logits, torch.cat([short_logits, logits[1:]]), rtol=1e-4, atol=1e-4)
    _, unmasked = generate(model, padded, attention_mask=torch.ones_like(padded))
    assert relative_error(unmasked[0, 0], batch_logits[0, 0]) > 1e-3, "the mask makes no difference to this model"


@either_kind
def test_attention_kernels_agree(pruned_folder, family, grouped, tied):
    folder = pruned_folder(family, grouped, tied)
    eager = load(folder, attn_implementation="eager")(IDS).logits
    if family == "gemma2":  # its logit cap is in no fused kernel of torch, so the library has it run eager
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            load(folder, attn_implementation="sdpa")
        return
    sdpa = load(folder, attn_implementation="sdpa")
    assert sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(sdpa(IDS).logits, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@either_kind
def test_half_precision_is_no_worse_than_in_the_dense_model(pruned_folder, family, grouped, tied, dtype):
    folder, dense = pruned_folder(family, grouped, tied), make_family(family, grouped, tied)
    expected, dense_expected = load_file(folder.with_suffix(".safetensors"))["logits"], dense(IDS).logits
    found = load(folder, dtype=dtype)(IDS).logits
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert relative_error(found, expected) < 3 * relative_error(dense.to(dtype)(IDS).logits, dense_expected)


@every_case
def test_measured_parameters_are_the_planned_ones(family, grouped, tied):
    model = make_family(family, grouped, tied)
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.2, 3.0)
    plan[1] = replace(plan[1], correction_rank=5)
    by_hand = kept_parameters(model, plan)
    planned = pruned_skeleton(model.config, plan).num_parameters()
    prune_to(model, IDS, plan)
    assert model.num_parameters() == planned == by_hand


@every_case
def test_the_checkpoint_holds_what_was_planned(pruned_folder, family, grouped, tied):
    model = load(pruned_folder(family, grouped, tied))
    assert model.config.model_type == f"olica_{family}"
    assert model.config.layer_shapes == [shape.to_dict() for shape in ODD]
    assert model.num_parameters() == kept_parameters(make_family(family, grouped, tied), ODD)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@every_family
def test_every_recipe_prunes(family):
    for recipe in RECIPES:
        model = make_family(family)
        before = model(IDS).logits
        count = model.num_parameters()
        prune(model, IDS, recipe, 0.2)
        after = model(IDS).logits
        assert torch.isfinite(after).all() and relative_error(after, before) > 0.01
        if "mlp_num" not in RECIPES[recipe].parameter_names:  # whose sizes are the released code's, pinned elsewhere
            assert 1 - model.num_parameters() / count == pytest.approx(0.2, abs=0.01)


@every_family
def test_both_command_lines(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_family(family).save_pretrained("dense")
    make_tokenizer().save_pretrained("dense")
    save_file({"calibration_ids": IDS}, "ids.safetensors")
    Path("held.txt").write_text("seven wise owls read old books by candle light\n" * 20)
    flags = ["--base_model=dense", "--datasets=ids.safetensors", "--mlp_num=1", "--ratio=0.1"]
    assert call(model_pruning, *flags) == 0
    folder = Path("pruned_models/dense_sparsity-0.2")
    record = json.loads((folder / "olica_run.json").read_text())
    assert record["parameters"]["after"] == record["parameters"]["planned"] < record["parameters"]["before"]
    assert len(record["corrected_layers"]) == 1
    flags = ["--base_model=dense", "--ppl=held.txt", "--ppl_seqlen=64", "--with_dense", "--prompt=old books"]
    assert call(model_evaluate, *flags) == 0
    (path,) = folder.glob("olica_eval_*.json")
    results = json.loads(path.read_text())["results"]
    dense, pruned = (results[name]["perplexity"]["held.txt"]["value"] for name in ("dense", "pruned"))
    assert dense != pruned and 1 < dense < 1e5 and 1 < pruned < 1e5
    assert "this checkpoint is pruned already" in refused(capsys, call, model_pruning, f"--base_model={folder}")


REAL_FORMS = {
    "llama-old-scaling": ("llama", dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=500.0)),
    "llama-dynamic": ("llama", dict(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})),
    "llama-without-head-dim": ("llama", dict(hidden_size=90, head_dim=None)),
    "qwen2-yarn": ("qwen2", dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                  "original_max_position_embeddings": 64})),
    "phi3-longrope": ("phi3", dict(hidden_size=90, head_dim=None, original_max_position_embeddings=16, rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 5, "long_factor": [2.0] * 5})),
    "phi3-partial": ("phi3", dict(partial_rotary_factor=0.6)),
    "gemma3-pattern": ("gemma3_text", dict(sliding_window_pattern=2, layer_types=None)),
    "granite-plain": ("granite", dict(hidden_size=90, head_dim=None)),
}  # fmt: skip


@pytest.mark.parametrize("form", REAL_FORMS)
def test_configurations_in_the_forms_of_real_ones(form, tmp_path):
    family, overrides = REAL_FORMS[form]
    make_family(family, peculiar=False, **overrides).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    prune_to(model, IDS, ODD)
    write_pruned(model, ODD, None, tmp_path / "pruned")
    again = load(tmp_path / "pruned")
    assert again.config.rope_parameters == model.config.rope_parameters
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)
    torch.testing.assert_close(generate(again, IDS)[1], generate(model, IDS)[1])
