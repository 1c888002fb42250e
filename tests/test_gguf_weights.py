"""Weights of GGUF files, dequantised a few at a time: bit for bit what transformers reads."""

import gguf
import numpy as np
import psutil
import pytest
import torch
from conftest import opened
from tiny_families import make_family
from tiny_gguf import GGUF_FAMILIES, GGUF_SIZES, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from olica.errors import UsageError
from olica.model.modeling_olica import separate_projections
from olica.sources import gguf_weights
from olica.sources.configuration import read_config
from olica.sources.dense_model import StreamedModel
from olica.sources.gguf import describe_file, header_of
from olica.sources.gguf_header import GgufTensor
from olica.sources.gguf_weights import GgufWeights
from olica.sources.locate import locate
from olica.sources.opening import open_dense_model
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model

CPU = torch.device("cpu")


def write_family(folder, family: str, tied: bool, **overrides):
    architecture, settings = GGUF_FAMILIES[family]
    dense = make_family(family, tied=tied, peculiar=False, **GGUF_SIZES | settings | overrides)
    write_gguf(dense, architecture, folder / "tiny.gguf")
    return locate(str(folder / "tiny.gguf"))


def read_by_transformers(location, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(
        location.path, gguf_file=location.gguf_file, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )


def rename(path, old: bytes, new: bytes) -> None:
    """Put another name of the same length in the place of one, wherever it is."""
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def assert_same_weights(model, whole) -> None:
    """Parameters and buffers, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(one, kind)()) for one in (model, whole))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in GGUF_FAMILIES for tied in (True, False) if tied or family != "gemma2"],
)
def test_every_family_is_streamed_with_the_bits_of_transformers(family, tied, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "VALUES", 1000)  # several parts of most matrices
    location = write_family(tmp_path, family, tied)
    # What lies beside the file is of another model.
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 77}')
    streamed = open_dense_model(location, dtype)
    assert type(streamed) is StreamedModel and all(p.is_meta for p in streamed.model.parameters())
    whole = read_by_transformers(location, torch.float32 if dtype == "auto" else torch.bfloat16)
    assert_same_weights(read_model(location, dtype), whole)
    for names in streamed.other_names():
        for name, weight in streamed.read(names).items():
            assert weight.dtype == whole.dtype and torch.equal(weight, whole.get_parameter(name)), name
    read = {name for names in streamed.other_names() for name in names}
    assert read == {name for name, _ in whole.named_parameters() if not name.startswith("model.layers.")}
    for index, layer in streamed.layers(CPU, "test"):
        expected = whole.model.layers[index]
        separate_projections(expected, whole.config)
        assert layer.state_dict().keys() == expected.state_dict().keys()
        for name, weight in expected.state_dict().items():
            assert torch.equal(layer.state_dict()[name], weight), name
    assert index == 2
    buffers = dict(whole.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in streamed.model.named_buffers())


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_settings_are_those_of_transformers(family, tmp_path):
    location = write_family(tmp_path, family, tied=True)
    whole = read_by_transformers(location, torch.float32)
    theirs = whole.config.to_dict() | {"quantization_config": None}
    for model in (open_dense_model(location).model, read_model(location)):
        ours = model.config.to_dict() | {"quantization_config": None}
        assert ours | {"_name_or_path": ""} == theirs | {"_name_or_path": ""}
        assert model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_nothing_of_a_file_stays_mapped(tmp_path):
    streamed, process = open_dense_model(write_family(tmp_path, "llama", tied=False)), psutil.Process()
    for _, layer in streamed.layers(CPU, "test"):
        assert not any(map_.path.endswith(".gguf") for map_ in process.memory_maps())
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in layer.parameters())


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_parts_of_a_matrix_are_dequantised_as_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "VALUES", 3 * 512)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (10, 512 // values * size), dtype=np.uint8)
    (tmp_path / "raw").write_bytes(b"x" * 5 + raw.tobytes())
    try:
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(np.array(gguf.dequantize(raw, kind)))
    except NotImplementedError:
        pytest.skip("gguf does not dequantise it")
    files = GgufWeights(tmp_path / "raw", {"weight": GgufTensor(kind, (10, 512), 5)}, {}, 0)
    with np.errstate(all="ignore"):
        torch.testing.assert_close(
            files.read(["weight"], torch.float32)["weight"], expected, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("read", [open_dense_model, read_model])
def test_a_file_with_tensors_that_its_settings_have_no_place_for_is_refused(read, tmp_path):
    """A llama's file does not say that the model has biases."""
    location = write_family(tmp_path, "llama", tied=True, attention_bias=True)
    with pytest.raises(UsageError, match=r"holds 12 tensors .* no place, such as blk\.0\.attn_k\.bias"):
        read(location)


@pytest.mark.parametrize("read", [open_dense_model, read_model])
def test_a_file_that_lacks_tensors_is_refused(read, tmp_path):
    location = write_family(tmp_path, "qwen2", tied=True)
    rename(tmp_path / "tiny.gguf", b"general.name", b"general.nome")  # another state of the file, to be read anew
    header = header_of(location)
    del header.tensors["blk.1.attn_q.weight"]
    with pytest.raises(UsageError, match=r"lacks 1 weights \(model\.layers\.1\.self_attn\.q_proj\.weight\)"):
        read(location)


def test_a_family_of_which_we_do_not_know_how_it_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_weights, "PERMUTED", ())
    with pytest.raises(UsageError, match="do not know how GGUF files hold the weights of llama"):
        open_dense_model(write_family(tmp_path, "llama", tied=False))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_without_a_number_of_key_value_heads_there_are_as_many_as_heads(family, tmp_path):
    heads = 2 if family.startswith("gemma") else 4
    location = write_family(tmp_path, family, tied=True, num_attention_heads=heads, num_key_value_heads=heads)
    config, whole = read_config(location).to_dict(), read_by_transformers(location, torch.float32)
    rename(tmp_path / "tiny.gguf", b".attention.head_count_kv", b".attention.head_count_xx")
    assert read_config(location).to_dict() == config and config["num_key_value_heads"] == heads
    assert_same_weights(read_model(location), whole)
    streamed = open_dense_model(location)
    for name, weight in streamed.read(list(streamed.files.stored)).items():
        assert torch.equal(weight, whole.get_parameter(name)), name


def test_without_a_number_of_heads_a_file_is_refused(tmp_path):
    location = write_family(tmp_path, "qwen2", tied=True)
    rename(tmp_path / "tiny.gguf", b".attention.head_count", b".attention.heads_coun")
    with pytest.raises(UsageError, match="does not say how many attention heads the model has"):
        read_config(location)


def test_a_file_of_the_name_mistral(tmp_path):
    """transformers takes its settings for a Mistral's, and then does not find the names of its tensors."""
    dense = make_family("mistral", tied=False, peculiar=False, **GGUF_SIZES, sliding_window=None)
    write_gguf(dense, "llama", tmp_path / "tiny.gguf", name="mistral")
    location = locate(str(tmp_path / "tiny.gguf"))
    assert read_config(location).model_type == "mistral"
    for name, weight in read_model(location).named_parameters():
        torch.testing.assert_close(weight, dense.get_parameter(name), rtol=1e-6, atol=1e-7)
    assert type(read_tokenizer(location)) is type(AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"))


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_tokenizer_is_that_of_transformers(family, tmp_path):
    location = write_family(tmp_path, family, tied=True)
    ours, theirs = read_tokenizer(location), AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert type(ours) is type(theirs) and ours.special_tokens_map == theirs.special_tokens_map
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


def test_settings_are_read_once_for_every_state_of_the_file(tmp_path, monkeypatch):
    location, read = write_family(tmp_path, "llama", tied=True), []
    load = modeling_gguf_pytorch_utils.load_gguf_checkpoint

    def counted(path, *args, **settings):
        read.append(path)
        return load(path, *args, **settings)

    monkeypatch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", counted)
    read_config(location).vocab_size = 1  # of this copy
    assert read_config(location).vocab_size == 320
    for work in (open_dense_model, read_model, read_tokenizer, describe_file):
        work(location)
    assert len(read) == 1
    rename(tmp_path / "tiny.gguf", b"Tiny llama", b"Tidy llama")
    assert describe_file(location).startswith("Tidy") and read_config(location).vocab_size == 320
    assert len(read) == 2


def test_a_bad_weight_is_named_when_it_is_read(tmp_path):
    dense = make_family("qwen2", tied=True, peculiar=False, **GGUF_SIZES)
    with torch.no_grad():
        dense.model.layers[2].input_layernorm.weight[3] = float("nan")
    write_gguf(dense, "qwen2", tmp_path / "tiny.gguf")
    streamed = opened(tmp_path / "tiny.gguf")
    with pytest.raises(UsageError, match=r"NaN or infinite .*model.layers.2.input_layernorm.weight"):
        list(streamed.layers(CPU, "test"))


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    location = write_family(tmp_path, "llama", tied=True)
    streamed, path = open_dense_model(location), tmp_path / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="tiny.gguf: its weights cannot be read"):
        weights = [streamed.read(names) for names in streamed.other_names()]
        weights += list(streamed.layers(CPU, "test"))
    with pytest.raises(UsageError, match="tiny.gguf: its configuration cannot be read.*it is cut short"):
        open_dense_model(location)
