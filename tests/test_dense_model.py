import gc
import json
import time

import pytest
import torch
from conftest import make_llama, opened
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from transformers import AutoModelForCausalLM

from olica.errors import UsageError
from olica.model.families import FAMILIES
from olica.model.modeling_olica import SideBySide
from olica.sources.dense_model import DenseModel, StreamedModel
from olica.sources.locate import locate
from olica.sources.opening import is_streamed

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_streamed_and_computes_its_own_buffers(family, tmp_path):
    model = make_family(family)
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    streamed = opened(tmp_path / "dense")
    assert type(streamed) is StreamedModel
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    buffers = dict(streamed.model.named_buffers())
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    for index, layer in streamed.layers(CPU, "test"):
        fused = {name for name, module in layer.named_modules() if isinstance(module, SideBySide)}
        for name, parameter in layer.named_parameters():
            if not any(name.startswith(path) for path in fused):
                assert torch.equal(parameter, whole.get_parameter(f"model.layers.{index}.{name}"))
    others = {name: t for names in streamed.other_names() for name, t in streamed.read(names).items()}
    state = whole.state_dict()
    assert others and all(torch.equal(tensor, state[name]) for name, tensor in others.items())
    assert streamed.model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_weights_are_there_only_while_they_are_worked_on(saved_llama):
    streamed = opened(saved_llama)
    layer_bytes = sum(p.nbytes for p in make_llama(num_key_value_heads=2).model.layers[0].parameters())
    seen = []
    for _, layer in streamed.layers(CPU, "test"):
        gc.collect()
        seen.append(layer)
        held = [p for old in seen for p in old.parameters() if not p.is_meta]
        assert sum(p.nbytes for p in held) == layer_bytes
    assert all(p.is_meta for p in layer.parameters())
    with streamed.embedding():
        assert not streamed.decoder.embed_tokens.weight.is_meta
    assert all(p.is_meta for p in streamed.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_read_in_the_dtype_that_is_asked_for(saved_llama, dtype):
    streamed = opened(saved_llama, dtype)
    _, layer = next(streamed.layers(CPU, "test", first=2))
    assert {str(p.dtype) for p in layer.parameters()} == {f"torch.{dtype}"}
    assert opened(saved_llama).model.dtype == torch.float32


def test_a_configuration_that_names_no_dtype_leaves_it_to_the_weights(saved_llama):
    make_llama(num_key_value_heads=2, tie_word_embeddings=True).half().save_pretrained(saved_llama)
    settings = json.loads((saved_llama / "config.json").read_text())
    del settings["dtype"]
    (saved_llama / "config.json").write_text(json.dumps(settings))
    assert opened(saved_llama).model.dtype == torch.float16


def test_what_only_transformers_understands_is_read_as_a_whole(saved_llama, caplog):
    """Names of a base model; a .bin file of the oldest form."""
    file = saved_llama / "model.safetensors"
    weights = load_file(file)
    expected = {name: tensor.clone() for name, tensor in weights.items()}

    def check() -> None:
        caplog.clear()
        model = opened(saved_llama)
        assert type(model) is DenseModel and "read into memory as a whole" in caplog.text
        for name, tensor in expected.items():
            assert torch.equal(model.model.state_dict()[name], tensor), name

    save_file({name.removeprefix("model."): t for name, t in weights.items()}, file, metadata={"format": "pt"})
    check()
    file.unlink()
    torch.save(weights, saved_llama / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check()


def test_a_copy_of_the_embedding_in_place_of_a_tied_head_is_left_on_the_disk(saved_llama):
    file = saved_llama / "model.safetensors"
    weights = load_file(file)
    both = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(both, file, metadata={"format": "pt"})
    model = opened(saved_llama)
    assert type(model) is StreamedModel and model.files.stored.keys() == weights.keys()


def test_what_is_going_to_be_streamed_is_known_from_names(saved_llama):
    assert is_streamed(locate(str(saved_llama)))
    assert is_streamed(locate("7b")), "expected of the hub's models"
    file = saved_llama / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert not is_streamed(locate(str(saved_llama)))


@pytest.mark.parametrize(("device", "ahead"), [("cpu", 0), ("cuda", 1)])
def test_weights_are_read_ahead_for_a_gpu_and_in_turn_for_the_cpu(saved_llama, monkeypatch, device, ahead):
    """The order in which layers are read and yielded; no GPU is needed to see it."""
    streamed, reading, read = opened(saved_llama), [], StreamedModel._read_layer
    monkeypatch.setattr(StreamedModel, "_read_layer", lambda self, i: reading.append(i) or read(self, i))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    for index, layer in streamed.layers(torch.device(device), "test"):
        expected = list(range(min(index + ahead, 2) + 1))
        deadline = time.monotonic() + 10
        while reading != expected and time.monotonic() < deadline:
            time.sleep(0.001)
        assert reading == expected
        assert not any(parameter.is_meta for parameter in layer.parameters())
    assert index == 2


def test_old_buffers_in_a_checkpoint_do_no_harm(saved_llama):
    file = saved_llama / "model.safetensors"
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(file) | inverse, file, metadata={"format": "pt"})
    assert type(opened(saved_llama)) is StreamedModel


def test_a_bad_weight_is_named_when_its_layer_is_read(saved_llama):
    file = saved_llama / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    streamed = opened(saved_llama)
    with pytest.raises(UsageError, match=r"NaN or infinite .*model.layers.2.mlp.up_proj.weight"):
        list(streamed.layers(CPU, "test"))


def test_a_file_that_is_cut_short_is_refused_at_once(saved_llama):
    file = saved_llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match="--base_model .*its weights cannot be read"):
        opened(saved_llama)
