"""GGUF files: read back by transformers and the gguf package, which did not write them."""

import weakref
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from called import load
from conftest import edit_config, make_llama, raising, refused, write_pruned
from tiny_commands import export_model
from tiny_families import LLAMA3_SCALING, make_family
from tiny_gguf import GEMMA, GGUF_SIZES, config_of, fields_of, merging_tokenizer, rounded, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from olica.errors import UsageError
from olica.model.configuration_olica import LayerShape
from olica.outputs.gguf_file import FORMS, Weights, write_gguf, write_model
from olica.outputs.gguf_layout import GgufLayout, neighbouring

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma3_text": ("gemma3", GEMMA),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_back_what_was_written(family, tied, tmp_path):
    architecture, settings = FAMILIES[family]
    model = make_family(family, tied=tied, peculiar=False, **GGUF_SIZES | settings)
    size = write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf")
    assert size == (tmp_path / "tiny.gguf").stat().st_size
    assert fields_of(tmp_path / "tiny.gguf")["general.architecture"] == architecture
    how = dict(gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    read, info = AutoModelForCausalLM.from_pretrained(tmp_path, **how, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.half().float()
    torch.testing.assert_close(read.eval()(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    text = "seven owls 12 don't"
    assert tokenizer(text).input_ids == merging_tokenizer()(text).input_ids


def test_rows_of_heads_are_ordered_as_the_equations_have_them():
    """What turns x_i with x_{i + d/2} turns, of the rows in the file's order, each with its neighbour."""
    generator = torch.Generator().manual_seed(0)
    width, position = 12, 5
    states = torch.randn(1, 3, 1, width, generator=generator)  # (batch, heads, tokens, d)
    angles = position * 10000.0 ** -(torch.arange(0, width, 2) / width)
    both = torch.cat([angles, angles])[None, None]
    turned, _ = apply_rotary_pos_emb(states, states, both.cos(), both.sin())
    order = neighbouring(3 * width, width)
    assert sorted(order.tolist()) == list(range(3 * width))
    pairs = torch.view_as_complex(states.flatten()[order].view(-1, 2)) * torch.polar(torch.ones(18), angles.repeat(3))
    torch.testing.assert_close(torch.view_as_real(pairs).flatten(), turned.flatten()[order])


def test_the_order_of_rows_is_that_of_an_independent_writer(tmp_path):
    model = make_family("llama", peculiar=False, attention_bias=True, **GGUF_SIZES)
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf", "bf16")
    found, weights = tensors_of(tmp_path / "tiny.gguf"), model.state_dict()
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2), ("attn_v", "v_proj", None)):
        for end in ("weight", "bias"):
            weight = weights[f"model.layers.1.self_attn.{theirs}.{end}"].numpy()
            if heads:
                weight = weight.reshape(heads, 2, 8, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
            tolerance = 2**-8 if end == "weight" else 0
            np.testing.assert_allclose(found[f"blk.1.{ours}.{end}"], weight, rtol=tolerance)


def test_q8_0_is_what_its_definition_says(tmp_path):
    model = make_family("qwen2", peculiar=False, **GGUF_SIZES)
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in kinds.items() if name.endswith(("norm.weight", "bias"))} == {"F32"}
    found, weights = tensors_of(tmp_path / "tiny.gguf"), model.state_dict()
    for ours, theirs in (("token_embd", "model.embed_tokens"), ("blk.2.ffn_down", "model.layers.2.mlp.down_proj")):
        assert kinds[f"{ours}.weight"] == "Q8_0"
        weight = weights[f"{theirs}.weight"].numpy()
        np.testing.assert_allclose(found[f"{ours}.weight"], rounded(weight), rtol=1e-6, atol=1e-8)
        largest = np.abs(weight.reshape(-1, 32)).max(1, keepdims=True)
        assert (np.abs((found[f"{ours}.weight"] - weight).reshape(-1, 32)) <= largest * (0.5 / 127 + 2**-10)).all()


def test_what_a_file_says_are_keys_and_tensors_that_the_gguf_package_knows(tmp_path):
    model = make_family("gemma3_text", peculiar=False, **GGUF_SIZES | GEMMA)
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf", "q8_0")
    kinds = (gguf.Keys, *(kind for kind in vars(gguf.Keys).values() if isinstance(kind, type)))
    known = {
        value.replace("{arch}", "gemma3") for kind in kinds for value in vars(kind).values() if isinstance(value, str)
    }
    fields = fields_of(tmp_path / "tiny.gguf")
    assert {name for name in fields if not name.startswith("GGUF.")} <= known
    assert fields["general.file_type"] == 7 and fields["general.name"] == "dense"
    assert fields["gemma3.attention.sliding_window"] == model.config.sliding_window
    known = {
        gguf.TENSOR_NAMES[kind].format(bid=bid)
        for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA3]
        for bid in range(3)
    }
    assert {name.removesuffix(".weight") for name in tensors_of(tmp_path / "tiny.gguf")} <= known


def test_the_frequencies_of_llama_3_are_divided_as_its_equation_says(tmp_path):
    model = make_family("llama", peculiar=False, rope_parameters=LLAMA3_SCALING, **GGUF_SIZES)
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf")
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    wavelength, original, factor = 2 * np.pi / plain, 32, 8.0  # low_freq_factor 1, high_freq_factor 4
    smooth = np.clip((original / wavelength - 1) / (4 - 1), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    np.testing.assert_allclose(tensors_of(tmp_path / "tiny.gguf")["rope_freqs.weight"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_rotary_embeddings_are_named(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    write_gguf(
        save(make_family("qwen2", peculiar=False, rope_parameters=rope, **GGUF_SIZES), tmp_path / "a"),
        tmp_path / "a.gguf",
    )
    fields = fields_of(tmp_path / "a.gguf")
    assert (fields["qwen2.rope.scaling.type"], fields["qwen2.rope.scaling.factor"]) == (kind, 4)
    assert fields.get("qwen2.rope.scaling.original_context_length") == (64 if kind == "yarn" else None)


def test_a_window_that_llama_cpp_lacks_bounds_the_context(tmp_path, caplog):
    model = make_family("mistral", peculiar=False, sliding_window=24, **GGUF_SIZES)
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf")
    assert fields_of(tmp_path / "tiny.gguf")["llama.context_length"] == 24
    assert "the model takes 24 tokens, not 256" in caplog.text


def test_a_qwen2_with_fewer_heads_than_fill_its_hidden_size_is_a_llama(tmp_path):
    model = make_family("qwen2", peculiar=False, **GGUF_SIZES | dict(num_attention_heads=2, num_key_value_heads=1))
    write_gguf(save(model, tmp_path / "dense"), tmp_path / "tiny.gguf")
    fields = fields_of(tmp_path / "tiny.gguf")
    assert fields["general.architecture"] == "llama" and fields["llama.attention.key_length"] == 16
    assert "blk.0.attn_q.bias" in tensors_of(tmp_path / "tiny.gguf")


class Reader:
    """Gives random weights of these shapes, and counts how many of those it gave are still held."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], fail_at: str = ""):
        self.shapes, self.given, self.held, self.fail_at = shapes, [], 0, fail_at

    def __call__(self, name: str) -> torch.Tensor:
        if name == self.fail_at:
            raise UsageError("the disk has gone")
        self.held = max(self.held, sum(given() is not None for given in self.given))
        weight = torch.randn(self.shapes[name])
        self.given.append(weakref.ref(weight))
        return weight


def shapes_of(channels: list[int], kv_heads: list[int]) -> dict[str, tuple[int, ...]]:
    """Those of a LLaMA of GGUF_SIZES whose layers have these channels and key/value heads, two query heads for each."""
    shapes = {"model.embed_tokens.weight": (320, 64), "model.norm.weight": (64,), "lm_head.weight": (320, 64)}
    for index, (width, heads) in enumerate(zip(channels, kv_heads, strict=True)):
        rows = {"self_attn.q_proj": 32 * heads, "self_attn.k_proj": 16 * heads, "self_attn.v_proj": 16 * heads}
        rows |= {"mlp.gate_proj": width, "mlp.up_proj": width}
        layer = {f"{name}.weight": (count, 64) for name, count in rows.items()}
        layer |= {"self_attn.o_proj.weight": (64, 32 * heads), "mlp.down_proj.weight": (64, width)}
        layer |= {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def test_layers_of_different_sizes_are_written_as_deci(tmp_path):
    reader = Reader(shapes_of([96, 160, 32], [2, 1, 2]))
    write_model(config_of(), Weights(reader.shapes, reader), merging_tokenizer(), tmp_path / "a.gguf", "q8_0", name="a")
    fields, found = fields_of(tmp_path / "a.gguf"), tensors_of(tmp_path / "a.gguf")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.feed_forward_length"] == [96, 160, 32]
    assert fields["deci.attention.head_count"] == [4, 2, 4]
    assert fields["deci.attention.head_count_kv"] == [2, 1, 2]
    assert found["blk.1.ffn_down.weight"].shape == (64, 160) and found["blk.1.attn_q.weight"].shape == (32, 64)
    assert reader.held <= 1, "weights are read one at a time"


def test_nothing_half_written_is_left(tmp_path):
    shapes = shapes_of([64] * 3, [2] * 3)
    (tmp_path / "a.gguf").write_text("older")
    reader = Reader(shapes, fail_at="model.layers.2.mlp.up_proj.weight")
    with pytest.raises(UsageError, match="the disk has gone"):
        write_model(config_of(), Weights(shapes, reader), merging_tokenizer(), tmp_path / "a.gguf", "f16", name="a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_text() == "older"


def unwritten(shapes: dict, form: str, path: Path, value: float = 1.0) -> str:
    """Why a llama of these shapes, all of whose weights have this value, is not written."""
    read = Weights(shapes, lambda name: torch.full(shapes[name], value))
    with pytest.raises(UsageError) as caught:
        write_model(config_of(), read, merging_tokenizer(), path / "a.gguf", form, name="a")
    assert not list(path.iterdir())
    return str(caught.value)


def test_matrices_that_a_form_does_not_hold_are_named(tmp_path):
    shapes = shapes_of([72] * 3, [2] * 3)
    message = unwritten(shapes, "q8_0", tmp_path)
    assert message.startswith(
        "--gguf q8_0 wants rows that are multiples of 32, and those of model.layers.0.mlp.down_proj"
    )
    assert "have 72; give f16 or bf16, or prune with --round_to 32" in message
    assert "has values beyond 65504" in unwritten(shapes, "f16", tmp_path, value=7e4)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA_SIZES = GEMMA | {"query_pre_attn_scalar": 256}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("olmo2", {}, "the family olmo2 are not written; llama, mistral, qwen2, qwen3, gemma3_text, nemotron-nas are"),
        ("llama", {"hidden_act": "relu"}, "the activation relu is none of llama.cpp's llama, which has silu"),
        ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}}, "no rotary embeddings of type dynamic"),
        ("qwen2", {"rope_parameters": LLAMA3_SCALING}, "no rotary embeddings of type llama3"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 20}}, "YaRN with beta_fast of its own"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "YaRN with attention_factor of its own"),
        ("qwen3", {"attention_bias": True}, "qwen3 of llama.cpp has no place for model.layers.0.self_attn.q_proj.bias"),
        ("gemma3_text", GEMMA_SIZES | {"query_pre_attn_scalar": 100}, "attention scaled by 100"),
        ("gemma3_text", GEMMA_SIZES | {"layer_types": ["full_attention"] * 3}, "another order of sliding and full"),
        ("gemma3_text", GEMMA_SIZES | {"final_logit_softcapping": 3.0}, "capped logits"),
        ("gemma3_text", GEMMA_SIZES | {"use_bidirectional_attention": True}, "attention to later tokens"),
    ],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(family, settings, message):
    model = make_family(family, peculiar=False, **GGUF_SIZES | settings)
    with pytest.raises(UsageError, match=message):
        GgufLayout(model.config, {name: tuple(weight.shape) for name, weight in model.named_parameters()})


def test_sizes_that_no_architecture_holds_are_refused():
    shapes = shapes_of([64, 96, 64], [2] * 3)
    with pytest.raises(
        UsageError, match="layers differ in their sizes, which llama.cpp knows of llama, mistral, qwen2"
    ):
        GgufLayout(config_of("qwen3"), shapes)
    without = {name: shape for name, shape in shapes.items() if "layers.1.self_attn" not in name}
    with pytest.raises(UsageError, match="does not run layers without attention"):
        GgufLayout(config_of(), without)


def test_the_command_writes_and_says_how_large_the_file_is(tmp_path, capsys):
    folder = save(make_llama(), tmp_path / "dense")
    for form in FORMS:
        path = tmp_path / "new" / f"{form}.gguf"
        if form == "q8_0":
            said = refused(capsys, export_model, folder, f"--gguf={form}", f"--output_path={path}")
            assert "wants rows that are multiples of 32" in said  # of which 176 channels are none
        else:
            assert export_model(folder, f"--gguf={form}", f"--output_path={path}") == 0
            assert capsys.readouterr().out == f"saved {path}, {path.stat().st_size / 1e6:.1f} MB\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bf16.gguf", "f16.gguf"]


def test_wrong_input_ends_in_one_sentence(tmp_path, capsys):
    folder = save(make_llama(), tmp_path / "dense")
    there = tmp_path / "there.gguf"
    there.write_text("older")
    bare = tmp_path / "bare"
    make_llama().save_pretrained(bare)
    pruned = make_llama(num_key_value_heads=4)
    write_pruned(pruned, [LayerShape(0, 0, 16, 176)] * 3, merging_tokenizer(), tmp_path / "pruned")
    quantised = save(make_llama(), tmp_path / "quantised")
    edit_config(quantised, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    new = tmp_path / "new.gguf"
    for arguments, message in (
        ((folder, f"--output_path={there}"), "there.gguf exists already; give --overwrite"),
        ((folder, f"--output_path={tmp_path / 'a.bin'}"), "give a name that ends in .gguf"),
        ((bare, f"--output_path={new}"), "bare: the folder has no tokenizer"),
        ((tmp_path / "pruned", f"--output_path={new}"), "of the layout olica, which GGUF cannot hold"),
        ((quantised, f"--output_path={new}"), "this checkpoint is quantised"),
        ((tmp_path / "none" / "of" / "it", f"--output_path={new}"), "there is no such folder"),
    ):
        assert message in refused(capsys, export_model, *arguments, alone=True)
    assert not new.exists() and there.read_text() == "older"
    assert export_model(folder, f"--output_path={there}", "--overwrite") == 0
    assert fields_of(there)["llama.block_count"] == 3


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    folder = save(make_llama(), tmp_path / "dense")
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UsageError, match="--output_path: the file takes 0.00 GB"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_disk_that_fills_up_ends_in_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    folder = save(make_llama(), tmp_path / "dense")
    said_by_numpy = OSError("8192 requested and 480 written")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", raising(said_by_numpy))
    with pytest.raises(UsageError, match="--output_path: .* cannot be written to .8192 requested.*; make room"):
        write_gguf(folder, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_llama_cpp_that_is_not_at_hand_is_said(monkeypatch):
    script = load("scripts/llama_cpp.py")
    monkeypatch.delenv(script.VARIABLE, raising=False)
    with pytest.raises(UsageError, match="llama.cpp is not at hand: OLICA_LLAMA_CPP=FOLDER bash scripts/llama_cpp.sh"):
        script.ask({})
