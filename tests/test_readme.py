"""What the README promises and the code can be held to."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_llama, make_tokenizer, prune, write_pruned
from tiny_families import SIZES
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import model_evaluate
import model_pruning
from olica.model.families import FAMILIES
from olica.sources.locate import MODEL_NAMES, locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [model_pruning, model_evaluate])
def test_every_flag_is_explained_with_its_default(script):
    section = README.split(f"`{script.__name__}.py`\n\n| flag")[1].split("\n\n")[0]
    listed = dict(re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", section, flags=re.MULTILINE))
    for action in script.build_parser()._actions:
        if action.dest == "help":
            continue
        assert f"--{action.dest}" in listed, action.dest
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert float(listed[f"--{action.dest}"]) == action.default, action.dest
    assert len(listed) == len(script.build_parser()._actions) - 1, "a flag is listed that does not exist"


def test_every_model_name_is_listed():
    for name in MODEL_NAMES:
        assert f"`{name}`" in README


def test_every_script_that_is_named_exists():
    for path in re.findall(r"(?:bash|python) ((?:scripts|benchmarks)/[\w.]+|\w+\.py)", README):
        assert (ROOT / path).is_file(), path


def test_the_papers_commands_are_those_of_the_tests():
    from test_cli import PAPERS_EVALUATION, PAPERS_PRUNING

    flat = re.sub(r"\\\n", "", README)
    assert PAPERS_PRUNING in flat and PAPERS_EVALUATION in flat


def test_the_families_are_those_that_are_supported():
    table = README.split("| `model_type` | for example")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(FAMILIES)


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, ids = make_llama(num_key_value_heads=2), torch.arange(3, 203).view(10, 20)
    _, plan = prune(model, ids, "olica", 0.2)
    write_pruned(model, plan, make_tokenizer(), tmp_path / "pruned_models" / "7b_sparsity-0.2")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(block for block in blocks if "gemma" not in block), {})  # noqa: S102
    assert "The capital of France is" in capsys.readouterr().out
    for folder in ("copy", "retrained"):
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_text_model_of_a_multimodal_gemma_is_taken_out_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = dict(SIZES, hidden_size=72, num_key_value_heads=3)
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained("google/gemma-3-4b-pt")
    make_tokenizer().save_pretrained("google/gemma-3-4b-pt")
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "gemma" in block)
    exec(block, {})  # noqa: S102
    ids = torch.arange(3, 23)[None]
    assert read_tokenizer(locate("./gemma-3-4b-text"))("ab").input_ids
    text = read_model(locate("./gemma-3-4b-text"))
    torch.testing.assert_close(text(ids).logits, whole(ids).logits)
