import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import allocate, make_llama, make_tokenizer, prune, write_pruned
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, GenerationConfig

from olica.errors import UsageError
from olica.outputs.checkpoint import check_folder, check_place
from olica.outputs.names import checkpoint_folder

ROOT = Path(__file__).parents[1]
IDS = torch.randint(0, 320, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pruned_folder(tmp_path):
    """A pruned checkpoint, grouped heads and tied embeddings, and the logits of the model in memory on IDS."""
    model = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    _, plan = prune(model, IDS, "olica", 0.25)
    folder = tmp_path / "pruned"
    write_pruned(model, plan, make_tokenizer(), folder)
    save_file({"logits": model(IDS).logits.detach()}, tmp_path / "logits.safetensors")
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


INSTALLED = f"""
sys.path.insert(0, {str(ROOT)!r})
import olica
assert not {{"datasets", "lm_eval"}} & sys.modules.keys(), "seconds that who loads a checkpoint would wait for"
"""


@pytest.mark.parametrize("installed", [True, False])
def test_loads_in_a_fresh_process_with_and_without_olica(pruned_folder, installed, tmp_path, fast_python):
    program = FRESH_PROCESS.format(
        folder=str(pruned_folder),
        logits=str(tmp_path / "logits.safetensors"),
        prelude=INSTALLED if installed else "",
        arguments="" if installed else "trust_remote_code=True",
    )
    done = subprocess.run(
        [sys.executable if installed else fast_python, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    expected = "olica.model.modeling_olica" if installed else "transformers_modules"
    assert done.stdout.strip().startswith(expected)


def test_a_checkpoint_holds_what_loading_needs(pruned_folder):
    names = {path.name for path in pruned_folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json"} <= names
    assert {"configuration_olica.py", "modeling_olica.py"} <= names
    config = json.loads((pruned_folder / "config.json").read_text())
    assert config["model_type"] == "olica_llama" and config["architectures"] == ["OlicaLlamaForCausalLM"]
    tasks = {"CausalLM", "SequenceClassification", "TokenClassification"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} | {f"AutoModelFor{task}" for task in tasks}
    assert len(config["layer_shapes"]) == 3 and config["intermediate_size"] == 176


@pytest.mark.parametrize("largest", [1, 100_000, 10**9])
def test_weights_are_gathered_into_files_of_a_size(tmp_path, largest):
    """They have the bits of the model in memory, whatever the size; a single weight that is larger has its own file."""
    model = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    _, plan = prune(model, IDS, "olica", 0.25)
    write_pruned(model, plan, make_tokenizer(), tmp_path / "out", largest)
    folder, expected = tmp_path / "out", dict(model.named_parameters())
    held = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(held) == {1: len(expected), 10**9: 1}.get(largest, len(held)) and (largest == 10**9) == (len(held) == 1)
    for tensors in held.values():
        assert len(tensors) == 1 or sum(4 * tensor.numel() for tensor in tensors.values()) <= largest
    found = {name: tensor for tensors in held.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    index = folder / "model.safetensors.index.json"
    if largest == 10**9:
        assert [*held] == ["model.safetensors"] and not index.exists()
    else:
        said = json.loads(index.read_text())
        assert said["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
        count = model.num_parameters()
        assert said["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("config", "generation_config"),
    [
        ({}, {"do_sample": False, "temperature": 0.6, "top_p": 0.9}),  # as Llama 2 comes
        ({"pad_token_id": -1}, {"pad_token_id": -1, "max_length": 64, "early_stopping": True}),  # old files
        ({"pad_token_id": -1}, None),
    ],
)
def test_generation_settings_that_are_no_longer_made_are_kept(config, generation_config, saved_llama, tmp_path):
    (saved_llama / "generation_config.json").unlink()
    if generation_config:
        (saved_llama / "generation_config.json").write_text(json.dumps(generation_config))
    settings = json.loads((saved_llama / "config.json").read_text())
    (saved_llama / "config.json").write_text(json.dumps(settings | config))
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.0, 3.0)
    write_pruned(model, plan, None, tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    for name, value in (generation_config or {}).items():
        assert getattr(saved, name) == value
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_weights_that_are_not_the_plans_are_refused(tmp_path):
    model = make_llama()
    plan, _ = allocate("olica", model.config, model.num_parameters(), 0.2, 3.0)
    with pytest.raises(RuntimeError, match="not those of the plan"):
        write_pruned(model, plan, None, tmp_path / "out")


def lower_case():
    """The tokenizer of the tests, but for capitals."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def test_what_would_not_load_is_not_published(tmp_path, tokenizer):
    """A setting that the family does not read, but the cache does; and a tokenizer whose files nobody reads."""
    model = make_llama()
    _, plan = prune(model, IDS, "olica", 0.2)
    model.config.sliding_window = 12.5
    with pytest.raises(UsageError, match="--base_model: .* would not load .TypeError: .*; correct these files"):
        write_pruned(model, plan, tokenizer, tmp_path / "out")
    del model.config.sliding_window
    tokenizer.save_pretrained = lambda folder: (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="would not load"):
        write_pruned(model, plan, tokenizer, tmp_path / "out")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained = lambda folder: lower_case().save_pretrained(folder)
    with pytest.raises(UsageError, match="would not load .*makes other tokens of a text when it has been saved"):
        write_pruned(model, plan, tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"], "finished layers are kept"
    write_pruned(model, plan, make_tokenizer(), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == model.num_parameters()


def test_folders_are_named_by_model_sparsity_and_recipe():
    assert checkpoint_folder("out", "7b", 0.2) == Path("out/7b_sparsity-0.2")
    assert checkpoint_folder("out", "7b", 0.2, recipe="olica") == checkpoint_folder("out", "7b", 0.2)
    assert checkpoint_folder("out", "7b", 0.33, recipe="olica-paper") == Path("out/7b_sparsity-0.33_olica-paper")
    assert checkpoint_folder("out", "7b", 0.2, sparsity_of="model") == checkpoint_folder("out", "7b", 0.2)
    assert checkpoint_folder("out", "7b", 0.2, sparsity_of="layers") == Path("out/7b_sparsity-0.2_of-layers")
    both = checkpoint_folder("out", "7b", 0.2, recipe="olica-paper", sparsity_of="layers")
    assert both == Path("out/7b_sparsity-0.2_of-layers_olica-paper")


def test_output_is_checked_before_work(tmp_path, monkeypatch):
    check_folder(tmp_path / "a/b/new")
    check_place(tmp_path / "a/b/new", 1000, overwrite=False)
    (tmp_path / "old").mkdir()
    check_folder(tmp_path / "old")
    with pytest.raises(UsageError, match="--save_dir.*old exists already; give --overwrite"):
        check_place(tmp_path / "old", 1000, overwrite=False)
    check_place(tmp_path / "old", 1000, overwrite=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match=f"{name} is a file or a link"):
            check_folder(tmp_path / name)
    with pytest.raises(UsageError, match="not a folder"):
        check_folder(tmp_path / "file/new")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(UsageError, match="--save_dir: the pruned model, .* takes 0.00 GB .* free"):
        check_place(tmp_path / "new", 1000, overwrite=False)
