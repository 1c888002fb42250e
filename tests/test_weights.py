import pytest
import torch
from conftest import edit_config, make_llama
from safetensors.torch import load_file, save_file

from olica.errors import UsageError
from olica.sources.configuration import read_config
from olica.sources.locate import locate
from olica.sources.weights import bytes_per_weight, read_model

IDS = torch.arange(120).view(6, 20)


def test_missing_weights_are_named(saved_llama):
    file = saved_llama / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights \(model.layers.1.mlp.up_proj.weight\)"):
        read_model(locate(str(saved_llama)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_weights_are_named(saved_llama, value):
    file = saved_llama / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.self_attn.k_proj.weight"][0, 0] = value
    save_file(weights, file, metadata={"format": "pt"})
    named = r"NaN or infinite values in 1 weights \(model.layers.2.self_attn.k_proj.weight\)"
    with pytest.raises(UsageError, match=named):
        read_model(locate(str(saved_llama)))


def test_a_truncated_file_is_refused(saved_llama):
    file = saved_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="its weights cannot be read"):
        read_model(locate(str(saved_llama)))


def test_a_folder_without_weights_is_refused(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its weights cannot be read"):
        read_model(locate(str(saved_llama)))


def test_bin_checkpoints_are_read(grouped_llama, tmp_path):
    folder = tmp_path / "bin"
    grouped_llama.config.save_pretrained(folder)
    torch.save(grouped_llama.state_dict(), folder / "pytorch_model.bin")
    model = read_model(locate(str(folder)))
    assert torch.equal(model(IDS).logits, grouped_llama(IDS).logits)


def test_dtypes(saved_llama):
    location = locate(str(saved_llama))
    assert read_model(location).dtype == torch.float32
    assert read_model(location, "bfloat16").dtype == torch.bfloat16
    config = read_config(location)
    assert bytes_per_weight(location, config, "auto") == 4
    assert bytes_per_weight(location, config, "float16") == 2
    make_llama().to(torch.bfloat16).save_pretrained(saved_llama)
    assert bytes_per_weight(location, read_config(location), "auto") == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02K\x01."])
def test_bin_files_that_hold_no_weights(saved_llama, content):
    (saved_llama / "model.safetensors").unlink()
    (saved_llama / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UsageError, match="its weights cannot be read"):
        read_model(locate(str(saved_llama)))


def test_weights_of_another_size_are_named(saved_llama):
    edit_config(saved_llama, intermediate_size=175)
    with pytest.raises(UsageError, match=r"holds in another size 9 weights \(model.layers.0.mlp.down_proj.weight, "):
        read_model(locate(str(saved_llama)))


def test_weights_without_a_place_are_named(saved_llama):
    edit_config(saved_llama, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"has no place for, 9 weights \(model.layers.2.input_layernorm.weight, "):
        read_model(locate(str(saved_llama)))


def test_buffers_of_old_checkpoints_are_ignored(saved_llama):
    file, location = saved_llama / "model.safetensors", locate(str(saved_llama))
    expected = read_model(location)(IDS).logits
    old = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(old, file, metadata={"format": "pt"})
    assert torch.equal(read_model(location)(IDS).logits, expected)
