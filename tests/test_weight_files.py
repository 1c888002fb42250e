"""Weights in .bin files, read in part."""

import psutil
import pytest
import torch
from conftest import hub_snapshot, make_llama, opened, save_bin
from transformers import AutoModelForCausalLM

from olica.errors import UsageError
from olica.sources.dense_model import DenseModel, StreamedModel

CPU = torch.device("cpu")


def weights_of(dense: DenseModel) -> dict[str, torch.Tensor]:
    """All weights, as pruning goes through them."""
    found = {name: weight for names in dense.other_names() for name, weight in dense.read(names).items()}
    for index, layer in dense.layers(CPU, "test"):
        found |= {f"model.layers.{index}.{name}": p.detach().clone() for name, p in layer.named_parameters()}
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_bin_files_are_streamed_with_the_bits_of_transformers(shards, tied, dtype, tmp_path):
    save_bin(make_llama(num_key_value_heads=2, tie_word_embeddings=tied).half(), tmp_path, shards)
    streamed = opened(tmp_path, dtype)
    assert type(streamed) is StreamedModel and all(p.is_meta for p in streamed.model.parameters())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    weights = weights_of(streamed)
    assert weights.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert weights[name].dtype == parameter.dtype and torch.equal(weights[name], parameter), name


def test_no_bin_file_stays_mapped(tmp_path):
    save_bin(make_llama(), tmp_path, shards=3)
    streamed, process = opened(tmp_path), psutil.Process()
    for _, layer in streamed.layers(CPU, "test"):
        assert not any(map_.path.endswith(".bin") for map_ in process.memory_maps())
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in layer.parameters())


def test_weights_that_are_stored_as_views_are_read_contiguous(tmp_path):
    model = make_llama()
    name = "model.layers.1.mlp.up_proj.weight"
    turned = model.state_dict()[name].T.contiguous().T
    save_bin(model, tmp_path, **{name: turned})
    (read,) = opened(tmp_path).read([name]).values()
    assert read.is_contiguous() and torch.equal(read, turned)


def test_bin_files_that_hold_more_than_the_model_are_left_to_transformers(tmp_path):
    save_bin(make_llama(), tmp_path, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert type(opened(tmp_path)) is StreamedModel, "old buffers are no weights"
    save_bin(make_llama(), tmp_path, **{"model.extra.weight": torch.ones(8)})
    with pytest.raises(UsageError, match="has no place for, 1 weights \\(model.extra.weight\\)"):
        opened(tmp_path)


def test_a_bin_file_that_is_cut_short_is_refused(tmp_path):
    save_bin(make_llama(), tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UsageError, match="--base_model .*its weights cannot be read"):
        opened(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_of_the_hub_is_streamed_from_its_bin_files(shards, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = make_llama()
    save_bin(model, hub_snapshot(tmp_path), shards)
    dense = opened("team/model")
    assert type(dense) is StreamedModel
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights_of(dense).items())
