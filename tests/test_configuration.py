import json
from pathlib import Path

import pytest
import torch
from called import call
from conftest import POINTER, add_adapter, allocate, edit_config, hub_snapshot, make_llama, refused, write_pruned
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import is_peft_available

import model_evaluate
from olica import jobs
from olica.errors import UsageError
from olica.settings import settings_of
from olica.sources.configuration import count_dense_parameters, describe_source, read_config, refuse_unprunable
from olica.sources.locate import locate
from olica.sources.weights import read_model

IDS = torch.arange(120).view(6, 20)


def test_an_unknown_model_lists_the_names():
    with pytest.raises(UsageError, match=r"--base_model 7bb: not one of smollm2, 7b, 13b.*hub"):
        read_config(locate("7bb"))


def test_a_known_model_that_the_hub_does_not_give():
    with pytest.raises(UsageError, match="--base_model 7b: the hub does not give us huggyllama/llama-7b"):
        read_config(locate("7b"))


def test_an_unknown_family_lists_the_supported_ones(tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="family gpt2 is not supported; supported: llama, mistral, .*phi3$"):
        read_config(locate(str(tmp_path / "gpt2")))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UsageError, match="supported families: llama.*no-such-type"):
        read_config(locate(str(tmp_path / "odd")))


def test_a_pruned_model_is_not_pruned_again(tmp_path):
    model = make_llama()
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.0, 3.0)
    write_pruned(model, plan, None, tmp_path / "pruned")
    location = locate(str(tmp_path / "pruned"))
    with pytest.raises(UsageError, match="pruned already"):
        refuse_unprunable(read_config(location), location)


def test_a_quantised_model_is_not_pruned(saved_llama):
    config = json.loads((saved_llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (saved_llama / "config.json").write_text(json.dumps(config))
    location = locate(str(saved_llama))
    with pytest.raises(UsageError, match="this checkpoint is quantised; give the one"):
        refuse_unprunable(read_config(location), location)


def test_counting_reads_no_weights(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    location = locate(str(saved_llama))
    dense = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    assert count_dense_parameters(location, read_config(location))["total"] == dense.num_parameters()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 65}, "multiple of the number of attention"),
        ({"hidden_act": "no-such-function"}, "no-such-function"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_configurations_that_make_no_model(saved_llama, changes, words):
    edit_config(saved_llama, **changes)
    location = locate(str(saved_llama))
    with pytest.raises(UsageError, match=f"--base_model .*tiny-llama: its configuration .*({words})"):
        count_dense_parameters(location, read_config(location))


def test_a_configuration_that_is_no_json(saved_llama):
    (saved_llama / "config.json").write_text("{")
    with pytest.raises(UsageError, match="its configuration cannot be read"):
        read_config(locate(str(saved_llama)))


def test_a_row_of_layer_shapes_that_was_lost_is_named(tmp_path):
    model = make_llama()
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.0, 3.0)
    write_pruned(model, plan, None, tmp_path / "pruned")
    edit_config(tmp_path / "pruned", layer_shapes=[shape.to_dict() for shape in plan[:2]])
    with pytest.raises(UsageError, match="layer_shapes has 2 rows for 3 layers"):
        read_config(locate(str(tmp_path / "pruned")))


def test_a_gguf_file_that_is_cut_short(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UsageError, match="--base_model .*cut.gguf: its configuration cannot be read"):
        read_config(locate(str(tmp_path / "cut.gguf")))


def test_an_adapter_beside_a_model_is_left_out_and_said_once(saved_llama, caplog):
    plain = read_model(locate(str(saved_llama)))
    add_adapter(saved_llama)
    assert is_peft_available() and not torch.equal(
        AutoModelForCausalLM.from_pretrained(saved_llama)(IDS).logits, plain(IDS).logits
    ), "transformers takes it in"
    location = locate(str(saved_llama))
    for _ in range(2):
        config = read_config(location)
    assert torch.equal(read_model(location)(IDS).logits, plain(IDS).logits)
    (said,) = caplog.messages
    assert said.startswith(f"--base_model {saved_llama}: the adapter beside the model is left out; ")
    assert "merge_and_unload" in said
    assert describe_source(location, config)["description"] == "tiny-llama, without the adapter beside it"


def test_an_adapter_without_a_model_says_how_to_merge_it(saved_llama):
    add_adapter(saved_llama)
    for name in ("config.json", "model.safetensors"):
        (saved_llama / name).unlink()
    with pytest.raises(UsageError, match="an adapter without its model; merge it first, by peft's .*merge_and_unload"):
        read_config(locate(str(saved_llama)))


def test_an_adapter_of_the_hub_without_a_model_is_not_taken_for_its_base(saved_llama, tmp_path, monkeypatch):
    add_adapter(saved_llama)
    (saved_llama / "adapter_config.json").rename(hub_snapshot(tmp_path, "team/adapter") / "adapter_config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="--base_model team/adapter: this is an adapter without its model"):
        read_config(locate("team/adapter"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model",
                                  "model.safetensors.index.json", "pytorch_model.bin"])  # fmt: skip
def test_pointers_of_git_lfs_are_refused_before_anything_is_read(saved_llama, name):
    if name.startswith(("model.safetensors.index", "pytorch")):
        (saved_llama / "model.safetensors").unlink()
    (saved_llama / name).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{name} is a pointer of git-lfs in place of the file; run git lfs pull"):
        read_config(locate(str(saved_llama)))


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    (tmp_path / "tiny.gguf").write_text(POINTER)
    with pytest.raises(UsageError, match="tiny.gguf is a pointer of git-lfs"):
        read_config(locate(str(tmp_path / "tiny.gguf")))


def prepare(folder: Path) -> jobs.Job:
    """What pruning checks and plans before a weight is read, as --dry_run does."""
    asked = {"base_model": str(folder), "datasets": str(folder / "rows.jsonl"), "seqlen": 32, "mlp_num": 1}
    (job,) = jobs.prepare(settings_of(asked), [0.2])
    return job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_shapes": []}, "has layer_shapes, which only a pruned checkpoint has, but says llama"),
        ({"layer_shapes": None}, "has layer_shapes"),
        ({"sliding_window": "abc"}, "describes no model that can be pruned and run"),
        ({"sliding_window": 1.5}, "describes no model that can be pruned and run"),
        ({"layer_types": ["sliding_attention"] * 3}, "pruned and run .*sliding_window"),
        ({"attention_chunk_size": "abc"}, "describes no model that can be pruned and run"),
        ({"return_dict": False}, "describes no model that can be pruned and run"),
        ({"output_attentions": True}, "pruned and run .*output_attentions"),
        ({"quantization_config": {}}, "is quantised"),
        ({"pad_token_id": 320}, "pad_token_id 320 in its configuration is beyond the vocabulary of 320; make it null"),
    ],
)
def test_settings_that_only_the_pruned_model_would_meet_are_refused_at_once(saved_llama, changes, words):
    assert prepare(saved_llama).counts.before["total"]
    edit_config(saved_llama, **changes)
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=words):
        prepare(saved_llama)


def test_sizes_of_a_pruned_model_in_a_dense_one_are_refused_by_evaluation_too(saved_llama, capsys):
    edit_config(saved_llama, layer_shapes=[])
    flags = [f"--checkpoint={saved_llama}", "--ppl=pydoc"]
    words = "has layer_shapes, which only a pruned checkpoint has, but says llama"
    assert words in refused(capsys, call, model_evaluate, *flags)


@pytest.mark.parametrize("changes", [{"sliding_window": 4096}, {"pad_token_id": -1}, {"something_else": {"a": 1}},
                                     {"auto_map": {"AutoModel": "other.Model"}}])  # fmt: skip
def test_settings_that_do_no_harm_are_left_alone(saved_llama, changes):
    edit_config(saved_llama, **changes)
    assert prepare(saved_llama).counts.before["total"]
