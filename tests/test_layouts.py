"""Layouts: what a checkpoint can hold, and that one of bare projections is the dense model without what went."""

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama, refused, seen
from tiny_families import LLAMA3_SCALING, make_family
from tiny_run import LAYERS, bare, contents, killed_at
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

import olica
from olica.errors import UsageError
from olica.jobs import prepare
from olica.methods.heads import RemovedGroups, output_energy
from olica.methods.moments import Moments, full
from olica.methods.parts import DEFINITE, Heads
from olica.methods.ratios import AlikeUnits
from olica.methods.recipes import RECIPES
from olica.methods.refit import LeastSquares
from olica.methods.sizes import Budget, Sizes
from olica.model.configuration_olica import LayerShape
from olica.model.families import FAMILIES
from olica.model.layouts import FUSED_FAMILIES, LAYOUTS, check_fits, for_family
from olica.model.modeling_olica import projections_of
from olica.model.skeleton import count_parameters
from olica.outputs.gguf_layout import GgufLayout
from olica.settings import REFITS, settings_of

STOCK = LAYOUTS["stock"]
LLAMA3 = {name: value for name, value in LLAMA3_SCALING.items() if name != "rope_theta"}
ABLE = ("olica-plus", "magnitude", "wanda-sp", "slimgpt", "osscar")
# Recipes that make nothing but biases beside.
WITHOUT_BIASES = ("flap", "let-llm-tell", "slimllm")
# Families whose configuration has a width of heads, so that some can go.
WITH_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text")


def pruned(model: str = "tiny", **settings):
    asked = {"datasets": "ids.safetensors", "save_dir": "out", "layout": "stock", "sparsity_of": "layers"}
    return olica.prune(model, **asked | {"data_dir": "data", "round_to": 1} | settings)


def rows_in(dense: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """Where in a matrix each of some of its rows stands."""
    return [int((dense == row).all(1).nonzero()) for row in rows]


def without_what_went(dense, stock):
    """The dense model, in place, with zeros in down_proj and o_proj where units are missing in `stock`."""
    sizes = Sizes.of(dense.config)
    for whole, left in zip(dense.model.layers, stock.model.layers, strict=True):
        whole, left = projections_of(whole), projections_of(left)
        channels = torch.ones(sizes.intermediate_size, dtype=torch.bool)
        channels[rows_in(whole.gate_proj.weight, left.gate_proj.weight)] = False
        heads = torch.ones(sizes.num_kv_heads, sizes.head_dim, dtype=torch.bool)
        heads.view(-1)[rows_in(whole.v_proj.weight, left.v_proj.weight)] = False
        with torch.no_grad():
            whole.down_proj.weight[:, channels] = 0
            whole.o_proj.weight[:, heads[:, None].expand(-1, sizes.groups, -1).flatten()] = 0
    return dense


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FUSED_FAMILIES])
def test_every_family_gives_its_own_model_without_what_went(family, grouped, here):
    """The logits are those of the dense model that reads zeros in place of the channels and heads that are gone."""
    dense = make_family(family, grouped)
    dense.save_pretrained("dense")
    sparsity = 0.7 if family in WITH_HEAD_DIM else 0.4
    done = pruned("dense", recipe="wanda-sp", sparsity=sparsity)
    stock = AutoModelForCausalLM.from_pretrained(done.folder)
    assert type(stock) is type(dense) and not list(done.folder.glob("*.py"))
    (shape,) = set(done.plan)
    assert bool(shape.kv_heads) == (family in WITH_HEAD_DIM)
    assert done.record["measured_sparsity_of_layers"] == pytest.approx(sparsity, abs=0.02)
    ids = torch.randint(3, 319, (3, 23), generator=torch.Generator().manual_seed(0))
    expected = without_what_went(dense, stock)(ids).logits
    torch.testing.assert_close(stock(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_configuration_is_the_dense_one_but_for_sizes(dtype, here):
    make_family("llama").save_pretrained("dense")
    dense = json.loads(Path("dense/config.json").read_text())
    done = pruned("dense", recipe="wanda-sp", sparsity=0.7, dtype=dtype)
    stock = json.loads((done.folder / "config.json").read_text())
    changed = {name for name in dense | stock if dense.get(name) != stock.get(name)}
    sizes = {"intermediate_size", "num_attention_heads", "num_key_value_heads"}
    former = {"torch_dtype", "rope_theta", "rope_scaling"}
    assert changed == sizes | former | ({"dtype"} if dtype != "float32" else set())
    assert stock["torch_dtype"] == dtype and stock["rope_theta"] == dense["rope_parameters"]["rope_theta"]
    assert stock["head_dim"] == 10 and "auto_map" not in stock


def test_the_width_of_heads_is_said_where_the_dense_model_leaves_it_open(here):
    """64 hidden units and two heads of the four: engines that divide would take heads of 32."""
    config = json.loads(Path("tiny/config.json").read_text())
    del config["head_dim"]
    Path("tiny/config.json").write_text(json.dumps(config))
    stock = json.loads((pruned(recipe="magnitude", sparsity=0.5).folder / "config.json").read_text())
    assert (stock["head_dim"], stock["num_attention_heads"], stock["num_key_value_heads"]) == (16, 2, 1)


@pytest.mark.parametrize("recipe", [*ABLE, *WITHOUT_BIASES])
def test_a_stock_checkpoint_has_one_size_and_the_logits_of_our_own(recipe, here):
    """The layers of our own model, with weights put in place one by one, against the library's loading."""
    refit = "least-squares" if recipe in WITHOUT_BIASES else "recipe"
    done = pruned(recipe=recipe, sparsity=0.5, refit=refit)
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    assert type(model) is LlamaForCausalLM and len(set(done.plan)) == 1
    lost = 1 - count_parameters(model)["decoder_layers"] / 277248
    channel = 3 * 64 * LAYERS / 277248
    # One size for all that damage decides comes in steps, of which none is above the budget.
    assert lost == pytest.approx(0.5, abs=channel) or (recipe == "olica-plus" and 0.5 <= lost < 0.5 + channel)
    settings = make_llama(num_key_value_heads=2, num_hidden_layers=LAYERS).config.to_dict()
    del settings["model_type"]
    ours = FAMILIES["llama"].config_class(**settings, layer_shapes=[shape.to_dict() for shape in done.plan])
    same = FAMILIES["llama"](ours)
    same.load_state_dict(model.state_dict())
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(model(ids).logits, same.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_a_refit_still_applies(here):
    """The same units, and o_proj and down_proj nearer to what they gave."""
    plain, refitted = (
        AutoModelForCausalLM.from_pretrained(pruned(recipe="wanda-sp", sparsity=0.5, refit=refit).folder)
        for refit in ("recipe", "least-squares")
    )
    first, second = (projections_of(model.model.layers[0]) for model in (plain, refitted))
    assert torch.equal(first.gate_proj.weight, second.gate_proj.weight)
    assert torch.equal(first.v_proj.weight, second.v_proj.weight)
    assert not torch.equal(first.o_proj.weight, second.o_proj.weight)
    assert not torch.equal(first.down_proj.weight, second.down_proj.weight)
    dense = AutoModelForCausalLM.from_pretrained("tiny")
    ids = torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(0))  # those it was pruned on
    with torch.no_grad():
        expected, *found = (model.model(ids).last_hidden_state for model in (dense, plain, refitted))
    without, with_refit = ((expected - states).square().mean() for states in found)
    assert with_refit < without


@pytest.mark.parametrize(
    ("family", "rope", "expected"),
    [
        ("llama", LLAMA3 | {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("qwen3", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
    ],
)
def test_old_releases_find_the_rotary_settings_by_the_names_that_they_know(family, rope, expected, here):
    """They ignore rope_parameters, and quietly take a theta of 10,000 where there is no other."""
    make_family(family, rope_parameters=rope).save_pretrained("dense")
    folder = pruned("dense", recipe="magnitude").folder
    stock = json.loads((folder / "config.json").read_text())
    assert {name: stock[name] for name in expected} == expected
    assert AutoModelForCausalLM.from_pretrained(folder).config.rope_parameters == stock["rope_parameters"]


def test_old_releases_find_both_thetas_of_gemma_3(here):
    model = make_family("gemma3_text")
    model.save_pretrained("dense")
    rope = model.config.rope_parameters
    stock = json.loads((pruned("dense", recipe="magnitude").folder / "config.json").read_text())
    assert stock["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert stock["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_deci_is_a_llama_whose_mlps_have_widths_of_their_own(family, here):
    """The logits are those of the dense model that reads zeros in place of the channels that are gone."""
    peculiar = {} if family == "llama" else {"sliding_window": None}
    make_family(family, **peculiar).save_pretrained("dense")
    # The ridge is so large that nothing is refitted.
    done = pruned("dense", recipe="olica-plus", layout="deci", sparsity=0.4, ridge=1e9)
    dense, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("dense", done.folder))
    widths = [shape.intermediate_size for shape in done.plan]
    assert len(set(widths)) > 1 and {shape.kv_heads for shape in done.plan} == {0}
    assert done.record["measured_sparsity_of_layers"] == pytest.approx(0.4, abs=0.02)
    ids = torch.randint(3, 319, (3, 23), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, without_what_went(dense, model)(ids).logits, rtol=1e-3, atol=1e-3)
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == widths
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {3}
    assert config["intermediate_size"] == max(widths)
    # Engines read attributes, and take another rule where there is an ffn_mult.
    first = model.config.block_configs[0]
    assert first.ffn.intermediate_size == widths[0] and not first.attention.no_op and not hasattr(first.ffn, "ffn_mult")


def test_deci_as_a_gguf_file(here):
    """The architecture that llama.cpp has for it, with the width of every layer."""
    done = pruned(recipe="olica-plus", layout="deci", round_to=32)
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    layout = GgufLayout(model.config, {name: tuple(weight.shape) for name, weight in model.named_parameters()})
    widths = [shape.intermediate_size for shape in done.plan]
    assert layout.name == "deci" and [size.channels for size in layout.sizes] == widths
    assert len(set(widths)) > 1 and not any(width % 32 for width in widths if width < max(widths))


@pytest.mark.parametrize("layout", ["stock", "deci"])
def test_it_loads_where_this_package_is_not(layout, here, fast_python):
    """Greedy text and logits of a process that cannot import olica are those of this one."""
    folder = pruned(recipe="olica-plus", layout=layout, sparsity=0.5).folder
    trust = ", trust_remote_code=True" if layout == "deci" else ""
    script = f"""
import sys
sys.modules["olica"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(folder)!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder{trust}), AutoTokenizer.from_pretrained(folder)
tokens = tokenizer("seven owls", return_tensors="pt").input_ids
text = model.generate(tokens, max_new_tokens=8, do_sample=False)
torch.save((type(model).__name__, model(tokens).logits, text), "out.pt")
"""
    environment = os.environ | {"HF_HOME": str(here / "home")}
    subprocess.run([fast_python, "-c", script], env=environment, capture_output=True, text=True, check=True)
    name, logits, text = torch.load("out.pt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("seven owls", return_tensors="pt").input_ids
    assert name == {"stock": "LlamaForCausalLM", "deci": "DeciLMForCausalLM"}[layout]
    torch.testing.assert_close(logits, model(tokens).logits)
    assert torch.equal(text, model.generate(tokens, max_new_tokens=8, do_sample=False))
    card = (folder / "README.md").read_text()
    assert ("trust_remote_code" in card) == (layout == "deci") and f"--layout {layout}" in card
    assert ("--sizes_of" in card) == (layout == "deci"), "of a stock one all layers have the same whatever it says"
    assert layout == "deci" or "import olica" not in card


@pytest.mark.parametrize(("given", "multiple"), [({}, 32), ({"round_to": 8}, 8), ({"round_to": 1}, 1)])
def test_sizes_are_multiples_that_engines_want_unless_others_are_asked_for(given, multiple, here):
    asked = {"base_model": "tiny", "datasets": "ids.safetensors", "recipe": "wanda-sp", "layout": "stock"}
    settings = settings_of(asked | given)
    (job,) = prepare(settings, [0.37])
    assert settings.flat()["round_to"] == job.budget.round_to == multiple
    assert all(shape.intermediate_size % multiple == 0 for shape in job.plan)


def test_other_layouts_round_nothing_unless_asked(here):
    asked = {"base_model": "tiny", "datasets": "ids.safetensors", "recipe": "wanda-sp"}
    assert settings_of(asked).flat()["round_to"] == 1
    (job,) = prepare(settings_of(asked), [0.37])
    assert job.budget.round_to == 1 and not job.notes and job.folder.name == "tiny_sparsity-0.37_wanda-sp"
    for wrong in ("all", 8.5, True, None):
        with pytest.raises(UsageError, match="--round_to"):
            settings_of(asked | {"round_to": wrong})


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ABLE])
def test_a_recipe_that_makes_something_else_is_refused_with_what_can_be_given(recipe, here):
    asked = {"base_model": "tiny", "datasets": "ids.safetensors", "recipe": recipe, "layout": "stock"}
    with pytest.raises(UsageError, match=f"^--layout stock cannot hold what --recipe {recipe} does: it makes") as said:
        prepare(settings_of(asked), [0.2])
    assert f"--recipe {', '.join(ABLE)}" in str(said.value)
    assert ("give --refit none or least-squares, or --recipe" in str(said.value)) == (recipe in WITHOUT_BIASES)
    for refit in REFITS:  # what is named is possible, what is not is not
        with suppress(UsageError):
            prepare(settings_of(asked | {"refit": refit}), [0.2])
            assert recipe in WITHOUT_BIASES and refit != "recipe"


def test_the_command_says_what_the_layout_costs(here, capsys):
    flags = ["--base_model=tiny", "--datasets=ids.safetensors", "--save_dir=out", "--recipe=flap", "--dry_run"]
    assert bare(*flags, "--layout=stock", "--refit=none") == 0
    said = capsys.readouterr().out
    assert f"note         {STOCK.about}\n" in said and said.count("note  ") == 1
    assert bare(*flags, "--refit=none") == 0
    assert "note  " not in capsys.readouterr().out
    assert "it makes biases; give --refit none" in refused(capsys, bare, *flags, "--layout=stock")
    assert not Path("out").exists()


def test_unknown_layouts_and_families_that_are_not_written_are_refused(here):
    with pytest.raises(UsageError, match="--layout vanilla is none of olica, stock, deci"):
        settings_of({"layout": "vanilla"})
    make_family("phi3").save_pretrained("phi3")
    with pytest.raises(UsageError, match="--layout stock is not written for phi3, whose projections are fused"):
        pruned("phi3", recipe="osscar")
    make_family("qwen3").save_pretrained("qwen3")
    with pytest.raises(UsageError, match="--layout deci holds models of llama, mistral, and this is one of qwen3"):
        pruned("qwen3", recipe="olica-plus", layout="deci")
    make_family("mistral", sliding_window=16).save_pretrained("mistral")
    with pytest.raises(UsageError, match="--layout deci has no attention windows, and the model has one of 16"):
        pruned("mistral", recipe="olica-plus", layout="deci")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("family", "settings", "counts"),
    [
        ("llama", dict(num_attention_heads=9, num_key_value_heads=3), "1, 3"),  # 63 units do not make six heads
        ("qwen2", {}, "3"),
        ("olmo2", {}, "3"),
        ("mistral", {}, None),
    ],
)
def test_heads_that_have_to_stay_are_said_to(family, settings, counts, here):
    make_family(family, **settings).save_pretrained("dense")
    asked = {"base_model": "dense", "datasets": "ids.safetensors", "recipe": "osscar", "layout": "stock"}
    (job,) = prepare(settings_of(asked), [0.4])
    about = f"; of 3 key/value heads a layer keeps {counts}, since {family} can have no other number"
    assert job.notes == [STOCK.about + (about if counts else "")]
    assert {shape.kv_heads for shape in job.plan} == {0 if counts else 2}


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (LlamaConfig(hidden_size=4096, num_attention_heads=32), (1, 2, 4, 8, 16, 32)),
        (LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8), (1, 2, 4, 8)),
        (LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3), (1, 2, 3)),
        (Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128), (*range(1, 9),)),
        (Qwen2Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8), (8,)),
    ],
)
def test_the_numbers_of_heads_are_those_that_the_family_can_have(config, counts):
    assert for_family(STOCK, config).kv_heads == counts
    assert for_family(LAYOUTS["olica"], config) is LAYOUTS["olica"]


def test_a_stopped_run_ends_with_the_same_bits(here):
    """It goes on after the last finished layer, and one of another layout has a folder of its own."""
    flags = ["--base_model=tiny", "--datasets=ids.safetensors", "--recipe=osscar", "--layout=stock", "--data_dir=data"]
    assert bare(*flags, "--save_dir=whole") == 0
    with killed_at(3):
        bare(*flags, "--save_dir=out")
    assert bare(*flags, "--save_dir=out") == 0
    name = "tiny_sparsity-0.2_osscar_layout-stock"
    assert contents(Path("out") / name) == contents(Path("whole") / name)
    assert json.loads(Path(f"out/{name}/olica_run.json").read_text())["went_on_after"] == [3]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"q_rank": 5}, "factors"),
        ({"o_rank": 5}, "factors"),
        ({"v_head_dim": 8}, "narrower value heads"),
        ({"correction_rank": 2}, "corrections"),
        ({"o_bias": True}, "biases"),
        ({"o_bias": True, "k_rank": 3}, "factors, biases"),
        ({"kv_heads": 3}, "3 key/value heads"),  # 64 units do not make three heads
    ],
)
def test_a_plan_that_a_layout_cannot_hold_is_known(shape, words):
    config, whole = make_llama().config, LayerShape(0, 0, 16, 100)
    stock = for_family(STOCK, config)
    check_fits(stock, [whole] * 3, config)
    check_fits(stock, [replace(whole, kv_heads=2)] * 3, config)
    with pytest.raises(ValueError, match=f"the layout stock cannot hold {words}$"):
        check_fits(stock, [replace(whole, **shape)] * 3, config)
    with pytest.raises(ValueError, match="layers of different sizes"):
        check_fits(stock, [whole, replace(whole, intermediate_size=99)], config)
    check_fits(LAYOUTS["olica"], [whole, replace(whole, **shape)], config)


@pytest.mark.parametrize("counts", [(8,), (1, 2, 4, 8), (*range(1, 9),)])
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.375, 0.5])
def test_units_that_are_alike_meet_the_budget(counts, sparsity):
    """Every key/value head has 64 x 8 weights in v, as many in k, and three times as many in q and in o."""
    layer = Sizes(64, 24, 8, 8, 900)
    plan = AlikeUnits(counts).before_survey([layer] * 4, Budget(4 * layer.layer, sparsity))
    (shape,) = set(plan)
    kept = shape.kv_heads or 8
    lost = (8 - kept) * 8 * 64 * 8 + (900 - shape.intermediate_size) * 3 * 64
    assert lost == pytest.approx(sparsity * layer.layer, abs=3 * 64 / 2)
    assert kept == min(count for count in counts if count >= 8 * (1 - sparsity))
    with pytest.raises(ValueError, match="no channel"):
        AlikeUnits(counts).before_survey([layer] * 4, Budget(4 * layer.layer, 0.999))


def test_the_heads_error_is_that_of_removing_and_refitting():
    """For every number of key/value heads against numpy's least squares on the same features."""
    model = make_llama(num_key_value_heads=4, num_attention_heads=4).requires_grad_(False)
    z = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.3, 2, 64)
    moments = Moments([full("heads")], 8)
    moments.update({"heads": z})
    layer = seen(projections_of(model.model.layers[0]), moments, 4)
    part = Heads(RemovedGroups(output_energy, refit=LeastSquares(DEFINITE)), (1, 2, 3, 4))
    features, weight = z.double().numpy(), layer.weights.o_proj.weight.double().numpy()
    columns = [slice(16 * head, 16 * head + 16) for head in range(4)]
    energy = [((features[:, column] @ weight[:, column].T) ** 2).sum() for column in columns]
    np.testing.assert_allclose(output_energy(layer), energy, rtol=1e-4)
    order, dense = np.argsort(energy)[::-1], features @ weight.T
    errors = part.errors(layer)
    assert len(errors) == 5 and errors[0] == 1 and errors[4] == 0
    assert part.candidates(layer.sizes, 32) == [1, 2, 3, 4] and part.tried_size(layer.sizes) == 3
    for size in (1, 2, 3):
        kept = np.concatenate([features[:, columns[head]] for head in order[:size]], axis=1)
        fitted = kept @ np.linalg.lstsq(kept, dense, rcond=None)[0]
        expected = ((dense - fitted) ** 2).sum() / (dense**2).sum()
        assert errors[size].item() == pytest.approx(expected, rel=0.1)
