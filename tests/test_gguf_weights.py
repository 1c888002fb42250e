"""Weights of GGUF files, dequantised a few at a time: bit for bit what transformers reads."""

import gguf
import numpy as np
import psutil
import pytest
import torch
from tiny_families import make_family
from tiny_gguf import GGUF_FAMILIES, GGUF_SIZES, write_gguf
from transformers import AutoModelForCausalLM, GgufConfig

from olica.errors import UsageError
from olica.model.modeling_olica import separate_projections
from olica.sources import gguf_weights
from olica.sources.dense_model import DenseModel, StreamedModel, open_dense_model
from olica.sources.gguf_weights import GgufTensor, GgufWeights, tensors_of
from olica.sources.locate import locate

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
    streamed, whole = open_dense_model(location).model, read_by_transformers(location, torch.float32)
    ours, theirs = streamed.config.to_dict(), whole.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
    assert streamed.generation_config.to_dict() == whole.generation_config.to_dict()


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


def test_the_table_of_tensors_is_that_of_gguf(tmp_path):
    path = tmp_path / "any.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{kind}")(f"test.{kind}", 7)
    writer.add_bool("test.bool", True)
    for name, values in {"strings": ["a", "ü", ""], "numbers": [1, 2, 3], "truths": [True], "reals": [0.5]}.items():
        writer.add_array(f"test.{name}", values)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("half", np.ones((3, 7), np.float16))
    blocks = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tensors_of(path) == {
        tensor.name: GgufTensor(tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset)
        for tensor in gguf.GGUFReader(path).tensors
    }


def test_a_file_with_tensors_that_we_do_not_know_is_left_to_transformers(tmp_path):
    with pytest.raises(UsageError, match="holds 41 tensors, of which transformers reads 29"):
        open_dense_model(write_family(tmp_path, "llama", tied=True, attention_bias=True))


@pytest.mark.parametrize("missing", ["architecture", "heads"])
def test_a_file_that_does_not_say_enough_is_read_as_a_whole(missing, tmp_path, monkeypatch, caplog):
    location = write_family(tmp_path, "llama", tied=False, num_key_value_heads=4)
    if missing == "architecture":
        monkeypatch.setattr(gguf_weights, "PERMUTED", ())
    else:
        path = tmp_path / "tiny.gguf"
        path.write_bytes(path.read_bytes().replace(b".attention.head_count_kv", b".attention.head_count_xx"))
    dense = open_dense_model(location)
    assert type(dense) is DenseModel and "it is read into memory as a whole" in caplog.text


def test_a_bad_weight_is_named_when_it_is_read(tmp_path):
    dense = make_family("qwen2", tied=True, peculiar=False, **GGUF_SIZES)
    with torch.no_grad():
        dense.model.layers[2].input_layernorm.weight[3] = float("nan")
    write_gguf(dense, "qwen2", tmp_path / "tiny.gguf")
    streamed = open_dense_model(locate(str(tmp_path / "tiny.gguf")))
    with pytest.raises(UsageError, match=r"NaN or infinite .*model.layers.2.input_layernorm.weight"):
        list(streamed.layers(CPU, "test"))


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    location = write_family(tmp_path, "llama", tied=True)
    streamed, path = open_dense_model(location), tmp_path / "tiny.gguf"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="tiny.gguf: its weights cannot be read"):
        weights = [streamed.read(names) for names in streamed.other_names()]
        weights += list(streamed.layers(CPU, "test"))
    with pytest.raises(UsageError, match="tiny.gguf: its configuration cannot be read"):
        open_dense_model(location)
