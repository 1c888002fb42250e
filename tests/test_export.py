"""Checkpoints of the layout `olica` made into others: the library's own models, with the logits of the pruned ones."""

import json
import math
import subprocess
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_config, make_tokenizer, refused
from made_records import RECORD
from safetensors.torch import load_file
from tiny_commands import export_model
from tiny_families import SIZES, make_family
from tiny_run import contents
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from olica.errors import UsageError
from olica.model.configuration_olica import LayerShape
from olica.model.families import FAMILIES
from olica.model.layouts import EXPORTS
from olica.model.skeleton import pruned_skeleton
from olica.outputs import export as export_module
from olica.outputs.export import export
from olica.sources.model_files import folder_weight_bytes

IDS = torch.randint(3, 319, (3, 23), generator=torch.Generator().manual_seed(0))
WHOLE = LayerShape(0, 0, SIZES["head_dim"], SIZES["intermediate_size"])
# Everything that a layer can be, in families of three key/value heads; a layer that lost nothing; and single factors.
PLAN = [
    LayerShape(5, 4, 6, 100, v_rank=4, o_rank=7, kv_heads=2),
    WHOLE,
    LayerShape(0, 3, 10, 150, kv_heads=1),
]
WITH_O_BIAS = ("llama", "qwen3", "smollm3", "granite", "olmo2", "gemma2", "gemma3_text")
WITH_MLP_BIAS = ("llama", "smollm3", "granite")


def write(family: str, plan: list[LayerShape], folder: Path, dtype: str = "float32", **settings) -> PreTrainedModel:
    """A seeded random pruned model with its tokenizer in a folder, in which no norm or bias is neutral."""
    config = make_family(family, **settings).config
    own = config.to_dict()
    del own["model_type"]
    kind = FAMILIES[family]
    torch.manual_seed(1)
    model = kind(kind.config_class(**own, layer_shapes=[shape.to_dict() for shape in plan])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


def plan_for(family: str) -> list[LayerShape]:
    """PLAN with the biases and corrections that the family's own models have a place for."""
    first = replace(PLAN[0], o_bias=family in WITH_O_BIAS)
    if family in WITH_MLP_BIAS:
        first = replace(first, down_bias=True, correction_rank=7)
    return [first, *PLAN[1:]]


# What a configuration may have otherwise than that of the dense model.
ABOUT_FILES = {"_name_or_path", "architectures", "dtype"}
BIASES = {"attention_bias", "mlp_bias"}
FORMER_NAMES = {"torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq"}
FORMER_NAMES |= {"partial_rotary_factor", "sliding_window_pattern"}

# Loads what was made of every family where this package is not.
WITHOUT_OLICA = """
import sys
sys.modules["olica"] = None
import torch
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
found = {}
for family in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(f"{family}-dense").eval()
    text = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    found[family] = type(model).__name__, model(ids).logits.detach(), text
torch.save(found, "found.pt")
"""


def test_the_dense_form_is_the_familys_own_model_and_loads_without_this_package(tmp_path, monkeypatch, fast_python):
    """Logits and greedy text; factors, narrower and fewer heads, biases and corrections are all in it."""
    monkeypatch.chdir(tmp_path)
    models = {}
    for family in FAMILIES:
        models[family] = write(family, plan_for(family), tmp_path / family)
        export(family, f"{family}-dense", "dense", 10**9)
    torch.save(IDS, "ids.pt")
    subprocess.run([fast_python, "-c", WITHOUT_OLICA, *FAMILIES], check=True)
    for family, (name, logits, text) in torch.load("found.pt").items():
        dense = make_family(family)
        assert name == type(dense).__name__
        torch.testing.assert_close(logits, models[family](IDS).logits, rtol=1e-4, atol=1e-4, msg=family)
        expected = models[family].generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(text, expected), family
        folder = Path(f"{family}-dense")
        assert not list(folder.glob("*.py")) and (folder / "tokenizer.json").is_file()
        made, own = (AutoConfig.from_pretrained(folder).to_dict(), dense.config.to_dict())
        changed = {key for key in made if made[key] != own.get(key)} - ABOUT_FILES
        assert changed <= BIASES | FORMER_NAMES, family


def test_every_matrix_is_what_the_factors_and_zeros_make(tmp_path):
    """By numpy, of a layer with two of its three key/value heads, six of ten directions of values and a correction."""
    plan = plan_for("llama")
    state = write("llama", plan, tmp_path / "pruned").state_dict()
    export(tmp_path / "pruned", tmp_path / "dense", "dense", 10**9)
    found = {name: weight.numpy() for name, weight in load_file(tmp_path / "dense/model.safetensors").items()}
    ours = {name: weight.double().numpy() for name, weight in state.items()}

    def product(path: str) -> np.ndarray:
        return ours[f"model.layers.0.{path}.expand.weight"] @ ours[f"model.layers.0.{path}.reduce.weight"]

    query = np.zeros((90, 63))
    query[:60] = product("self_attn.q_proj")
    value = np.zeros((3, 10, 63))
    value[:2, :6] = product("self_attn.v_proj.linear").reshape(2, 6, 63)
    output = np.zeros((63, 9, 10))
    output[:, :6, :6] = product("self_attn.o_proj.linear").reshape(63, 6, 6)
    down = np.zeros((63, 177))
    down[:, :100] = ours["model.layers.0.mlp.mlp.down_proj.weight"]
    down[:, 100:107] = ours["model.layers.0.mlp.correction.expand.weight"]
    expected = {"self_attn.q_proj": query, "self_attn.v_proj": value.reshape(30, 63)}
    expected |= {"self_attn.o_proj": output.reshape(63, 90), "mlp.down_proj": down}
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[f"model.layers.0.{name}.weight"], matrix, rtol=1e-6, atol=1e-7)
    gates = found["model.layers.0.mlp.gate_proj.weight"]
    assert gates.shape == (177, 63) and not gates[100:].any()
    assert folder_weight_bytes(tmp_path / "dense") > folder_weight_bytes(tmp_path / "pruned")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_stays_and_the_rounding_is_its_own(dtype, tmp_path):
    """The matrices are rounded once, from products in more digits; what was whole keeps its bits."""
    model = write("llama", plan_for("llama"), tmp_path / "pruned", dtype)
    export(tmp_path / "pruned", tmp_path / "dense", "dense", 10**9)
    found, state = load_file(tmp_path / "dense/model.safetensors"), model.state_dict()
    assert {weight.dtype for weight in found.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "dense/config.json").read_text())["torch_dtype"] == dtype
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(found[name], state[name])
    factors = [state[f"model.layers.0.self_attn.q_proj.{part}.weight"].double() for part in ("expand", "reduce")]
    product = (factors[0] @ factors[1]).to(getattr(torch, dtype))
    assert torch.equal(found["model.layers.0.self_attn.q_proj.weight"][:60], product)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    error = (dense(IDS).logits - model.float()(IDS).logits).square().mean().sqrt()
    assert error < 0.05 * model(IDS).logits.std()


@pytest.mark.parametrize("family", WITH_MLP_BIAS)
def test_biases_that_the_dense_model_lacks_are_turned_on(family, tmp_path):
    """For a new bias, or for corrections alone; all but the open gates and the new bias are zero."""
    plan = [replace(PLAN[0], correction_rank=7), replace(WHOLE, o_bias=True), PLAN[2]]
    model = write(family, plan, tmp_path / "pruned", peculiar=False)
    export(tmp_path / "pruned", tmp_path / "dense", "dense", 10**9)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert made.config.attention_bias and made.config.mlp_bias
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    biases = {name: weight for name, weight in made.named_parameters() if name.endswith("bias") and weight.any()}
    assert biases.keys() == {"model.layers.0.mlp.gate_proj.bias", "model.layers.1.self_attn.o_proj.bias"}
    assert [*biases["model.layers.0.mlp.gate_proj.bias"].nonzero().flatten()] == [*range(100, 107)]


def test_all_that_families_have_no_place_for_is_known():
    """That their own models have these places, and no others, is seen in the models."""
    for family in FAMILIES:
        config = make_family(family).config
        for size, able in (("o_bias", WITH_O_BIAS), ("down_bias", WITH_MLP_BIAS), ("correction_rank", WITH_MLP_BIAS)):
            plan = [replace(WHOLE, intermediate_size=100, **{size: 5 if size == "correction_rank" else True})] * 3
            if family not in able:
                with pytest.raises(ValueError, match="the layout dense cannot hold (biases of|corrections beside)"):
                    pruned_skeleton(config, plan, EXPORTS["dense"])
                continue
            names = {name for name, _ in pruned_skeleton(config, plan, EXPORTS["dense"]).named_parameters()}
            wanted = "self_attn.o_proj.bias" if size == "o_bias" else "mlp.gate_proj.bias"
            assert f"model.layers.2.{wanted}" in names, family


@pytest.mark.parametrize("kv_heads", [0, 1])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stock_is_made_of_layers_of_the_same_sizes(family, kv_heads, tmp_path):
    model = write(family, [replace(WHOLE, intermediate_size=100, kv_heads=kv_heads)] * 3, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "stock", "stock", 60_000)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert type(made) is type(make_family(family)) and made.config.intermediate_size == 100
    assert made.config.num_key_value_heads == (kv_heads or 3)
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in made.state_dict().items())
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    files = [load_file(path) for path in (tmp_path / "stock").glob("model-*.safetensors")]
    assert len(files) > 2
    for held in files:
        assert len(held) == 1 or sum(4 * weight.numel() for weight in held.values()) <= 60_000
    index = json.loads((tmp_path / "stock/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == made.num_parameters()
    assert index["weight_map"].keys() == {name for held in files for name in held}


def test_deci_is_made_of_a_llama_whose_mlps_alone_are_narrower(tmp_path):
    plan = [replace(WHOLE, intermediate_size=width) for width in (100, 177, 64)]
    model = write("llama", plan, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "deci", "deci", 10**9)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "deci")
    assert type(made).__name__ == "DeciLMForCausalLM" and (tmp_path / "deci/modeling_deci.py").is_file()
    assert [block.ffn.intermediate_size for block in made.config.block_configs] == [100, 177, 64]
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_a_layout_cannot_hold_is_said_in_a_sentence(tmp_path, capsys):
    factors = [replace(WHOLE, q_rank=5, v_head_dim=6)] * 3
    wide = [replace(WHOLE, intermediate_size=173, correction_rank=5)] * 3
    corrected = [replace(WHOLE, intermediate_size=100, correction_rank=5)] * 3
    uneven = [replace(WHOLE, intermediate_size=width) for width in (100, 177, 64)]
    for name, family, plan, layout, words in (
        ("factors", "llama", factors, "stock", "cannot hold factors, narrower value heads; give --layout dense"),
        ("factors", "llama", factors, "deci", "cannot hold factors, narrower value heads; give --layout dense"),
        ("uneven", "llama", uneven, "stock", "cannot hold layers of different sizes; give --layout dense"),
        ("heads", "llama", [replace(WHOLE, kv_heads=2)] * 3, "deci", "cannot hold 2 key/value heads"),
        ("wide", "llama", wide, "dense", "cannot hold corrections of a higher rank than channels have gone\n"),
        ("qwen2", "qwen2", corrected, "dense", "corrections beside MLPs, whose gates have no biases in this family\n"),
        ("bias", "mistral", [replace(WHOLE, o_bias=True)] * 3, "dense", "biases of o_proj, which the family lacks\n"),
        ("qwen2", "qwen2", corrected, "deci", "--layout deci holds models of llama, mistral"),
        ("phi3", "phi3", [WHOLE] * 3, "stock", "is not written for phi3, whose projections are fused"),
    ):
        if not (tmp_path / name).exists():
            write(family, plan, tmp_path / name)
        new = tmp_path / "new"
        said = refused(capsys, export_model, tmp_path / name, f"--layout={layout}", f"--output_path={new}")
        assert words in f"{said}\n"
    write("llama", corrected, tmp_path / "relu", hidden_act="tanh")
    assert "corrections, with this activation" in refused(
        capsys, export_model, tmp_path / "relu", "--layout=dense", f"--output_path={tmp_path / 'new'}"
    )
    assert not (tmp_path / "new").exists() and not [*tmp_path.glob(".*")]


def test_wrong_input_ends_in_a_sentence_and_changes_nothing(tmp_path, capsys, monkeypatch):
    write("llama", PLAN, tmp_path / "pruned")
    make_family("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/held.txt").write_text("seven owls")
    flags = ["--layout=dense", f"--output_path={tmp_path / 'new'}"]
    assert "only checkpoints of the layout olica" in refused(capsys, export_model, tmp_path / "dense", *flags)
    assert "--max_shard_size much: give a size" in refused(
        capsys, export_model, tmp_path / "pruned", *flags, "--max_shard_size=much"
    )
    assert "there is no such folder" in refused(capsys, export_model, tmp_path / "none/of/it", *flags)
    before = contents(tmp_path)
    for path, words in (
        (tmp_path / "texts", "is there and no folder of a checkpoint"),
        (tmp_path / "texts/held.txt", "is there and no folder of a checkpoint"),
        (tmp_path / "texts/held.txt/new", "is not a folder that can be written to"),
        (tmp_path / "pruned", "is or holds CHECKPOINT itself"),
    ):
        message = refused(
            capsys, export_model, tmp_path / "pruned", "--layout=dense", f"--output_path={path}", "--overwrite"
        )
        assert words in message
    assert "exists already; give --overwrite" in refused(
        capsys, export_model, tmp_path / "pruned", "--layout=dense", f"--output_path={tmp_path / 'dense'}"
    )
    edit_config(tmp_path / "pruned", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "this checkpoint is quantised" in refused(capsys, export_model, tmp_path / "pruned", *flags)
    edit_config(tmp_path / "pruned", quantization_config=None)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert "--output_path: the checkpoint takes 0.00 GB" in refused(capsys, export_model, tmp_path / "pruned", *flags)
    del before["pruned/config.json"]
    after = contents(tmp_path)
    del after["pruned/config.json"]
    assert after == before
    assert "not allowed with argument" in refused(capsys, export_model, tmp_path / "pruned", *flags, "--gguf=f16")


@pytest.mark.parametrize("error", [UsageError("the disk has gone"), OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, error):
    write("llama", PLAN, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "out", "dense", 10**9)
    before, fill, seen = contents(tmp_path), export_module.filled, []

    def failing(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise error
        return fill(*arguments)

    monkeypatch.setattr(export_module, "filled", failing)
    with pytest.raises(UsageError if isinstance(error, OSError) else type(error)):
        export(tmp_path / "pruned", tmp_path / "out", "dense", 100_000, overwrite=True)
    assert contents(tmp_path) == before and not [*tmp_path.glob(".*")]


def test_the_record_and_the_card_of_the_pruning_come_along(tmp_path):
    write("llama", [WHOLE] * 3, tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "bare", "stock", 10**9)
    assert not {"README.md", "olica_run.json"} & {path.name for path in (tmp_path / "bare").iterdir()}
    (tmp_path / "pruned/olica_run.json").write_text(json.dumps(RECORD | {"weight_bytes_on_disk": 1}))
    size = export(tmp_path / "pruned", tmp_path / "dense", "dense", 10**9)
    written = json.loads((tmp_path / "dense/olica_run.json").read_text())
    assert written == RECORD | {"exported": "dense", "weight_bytes_on_disk": size}
    card = (tmp_path / "dense/README.md").read_text()
    assert "Written in the layout `dense` afterwards" in card and "AutoTokenizer" in card


@pytest.mark.parametrize(("damage", "words"), [({"calibration": []}, "unpack|indices"), ({"date": math.nan}, "nan")])
def test_a_damaged_record_is_named(tmp_path, damage, words):
    write("llama", [WHOLE] * 3, tmp_path / "pruned")
    path = tmp_path / "pruned/olica_run.json"
    path.write_text(json.dumps(RECORD | damage))
    with pytest.raises(UsageError, match=f"^{path} is not the record of a pruning .*({words}).*; remove it"):
        export(tmp_path / "pruned", tmp_path / "dense", "dense", 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_the_command_replaces_a_checkpoint_when_asked_to_and_says_its_size(tmp_path, capsys):
    model = write("llama", PLAN, tmp_path / "pruned")
    make_family("qwen2").save_pretrained(tmp_path / "out")
    flags = [tmp_path / "pruned", "--layout=dense", f"--output_path={tmp_path / 'out'}", "--overwrite"]
    assert export_model(*flags, "--max_shard_size=100KB") == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert capsys.readouterr().out == f"saved {tmp_path / 'out'}, {size / 1e6:,.1f} MB\n"
    assert not (tmp_path / "out/model.safetensors").exists(), "nothing of the old one is left"
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pruned"]


def test_layers_are_made_one_at_a_time(tmp_path, monkeypatch):
    """When the next one is made, no weight of those before it is held any more but the one that was written last."""
    write("llama", PLAN, tmp_path / "pruned")
    fill, made, held = export_module.filled, [], []

    def watched(*arguments):
        held.append(sum(weight() is not None for weight in made))
        weights = fill(*arguments)
        made.extend(weakref.ref(weight) for weight in weights.values())
        return weights

    monkeypatch.setattr(export_module, "filled", watched)
    export(tmp_path / "pruned", tmp_path / "out", "dense", 10**9)
    assert len(made) > 30 and max(held) <= 1


def test_products_that_the_dtype_cannot_hold_are_named(tmp_path):
    model = write("llama", PLAN, tmp_path / "pruned", "float16")
    factors = model.model.layers[0].self_attn.q_proj
    for factor in (factors.reduce, factors.expand):
        torch.nn.init.constant_(factor.weight, 300.0)
    model.save_pretrained(tmp_path / "pruned")
    with pytest.raises(UsageError, match="layer 0: a product of factors of q_proj is beyond the largest number"):
        export(tmp_path / "pruned", tmp_path / "out", "dense", 10**9)
    assert not (tmp_path / "out").exists()
