"""Checkpoints on other releases of transformers: what their files say. A script tries the releases themselves."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer, prune, write_pruned
from tiny_families import LLAMA3_SCALING, make_family
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, Phi3Config, cache_utils

import olica
from olica.model import configuration_olica
from olica.model.configuration_olica import LayerShape, former_names
from olica.model.families import FAMILIES
from olica.report import releases

IDS = torch.randint(3, 250, (6, 20), generator=torch.Generator().manual_seed(0))
LLAMA3 = {name: value for name, value in LLAMA3_SCALING.items() if name != "rope_theta"}


@pytest.fixture
def pruned_folder(tmp_path) -> Path:
    """A tiny LLaMA with theta of its own; its tokenizer has a special token beside the usual."""
    model = make_family("llama", rope_parameters={**LLAMA3_SCALING, "rope_theta": 500.0})
    _, plan = prune(model, IDS, "olica", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mark>"]})
    tokenizer.chat_template = {"default": "a {{ messages[0].content }}", "tool": "b"}
    write_pruned(model, plan, tokenizer, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_theta_and_dtype_by_both_names(family, tmp_path):
    """Also when the newest release saves again what it has loaded."""
    config = make_family(family).config
    rope = config.rope_parameters
    rope.get("full_attention", rope)["rope_theta"] = 1234.5
    settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    pruned = FAMILIES[family].config_class(**settings, layer_shapes=[LayerShape(0, 0, 10, 9).to_dict()] * 3)
    pruned.dtype = torch.bfloat16
    for folder in (tmp_path / "first", tmp_path / "second"):
        pruned.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        rope = written["rope_parameters"]
        assert rope.get("full_attention", rope)["rope_theta"] == written["rope_theta"] == 1234.5
        assert written["dtype"] == written["torch_dtype"] == "bfloat16"
        assert written["rope_scaling"] == (LLAMA3 if family == "llama" else None)
        pruned = AutoConfig.from_pretrained(folder)
        assert not {"rope_theta", "rope_scaling", "torch_dtype"} & vars(pruned).keys(), "said once in memory"
        assert pruned.rope_parameters == rope
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "second/config.json").read_bytes()


@pytest.mark.parametrize(("layout", "recipe"), [("olica", "olica"), ("deci", "olica-plus"), ("stock", "magnitude")])
def test_nobody_is_warned_of_names_that_are_deprecated(layout, recipe, here, monkeypatch):
    """Neither who prunes from Python, nor who saves the checkpoint again: the release warns once in a process."""
    said = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *__: said.append(message))
    own = {"mlp_num": 1, "ratio": 0.1} if recipe == "olica" else {}
    usual = dict(datasets="ids.safetensors", save_dir="out", round_to=1)
    done = olica.prune("tiny", layout=layout, recipe=recipe, **usual, **own)
    model = AutoModelForCausalLM.from_pretrained(done.folder)
    model.save_pretrained("again")
    assert repr(model.config) and not [message for message in said if "deprecated" in message]
    assert model.config.torch_dtype and "`torch_dtype` is deprecated" in said[-1], "what would be said is seen"
    if layout == "olica":  # the file says both names all the same
        first, second = (json.loads((Path(folder) / "config.json").read_text()) for folder in (done.folder, "again"))
        assert first == second and first["dtype"] == first["torch_dtype"] == "float32"


def test_former_names_of_the_peculiar():
    """Longrope of Phi-3 by three names alone; two thetas and the pattern of Gemma 3; nothing without settings."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 77.0, **factors}
    phi = former_names(Phi3Config(hidden_size=64, num_attention_heads=8, rope_parameters=rope).to_dict())
    assert phi["rope_scaling"] == {"type": "longrope", **factors}
    assert phi["rope_theta"] == 77.0 and phi["partial_rotary_factor"] == 1.0
    gemma = former_names(Gemma3TextConfig(num_hidden_layers=12).to_dict())
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4) and gemma["sliding_window_pattern"] == 6
    assert former_names({}) == {} == former_names({"dtype": None, "rope_parameters": None})


def test_both_names_are_read_as_those_of_today(tmp_path):
    """The former ones do not win, nor are they kept; alone, as an old release saves them, they are read."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 99.0}
    config = FAMILIES["llama"].config_class(rope_parameters=rope)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"rope_theta": 5.0}, {"rope_parameters": None}):
        (tmp_path / "config.json").write_text(json.dumps(written | changes))
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_tokenizers_have_names_that_old_releases_know(pruned_folder):
    settings = json.loads((pruned_folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<mark>"] and "extra_special_tokens" not in settings
    named = [{"name": "default", "template": "a {{ messages[0].content }}"}, {"name": "tool", "template": "b"}]
    assert settings["chat_template"] == named
    tokenizer, expected = AutoTokenizer.from_pretrained(pruned_folder), make_tokenizer()
    expected.add_special_tokens({"extra_special_tokens": ["<mark>"]})
    assert type(tokenizer) is type(expected) and tokenizer.extra_special_tokens == ["<mark>"]
    assert tokenizer.apply_chat_template([dict(role="user", content="x")], tokenize=False) == "a x"
    assert tokenizer("a<mark>b").input_ids == expected("a<mark>b").input_ids


class PlainConfig:
    """A configuration as it was before 5.4: it keeps what it does not know, and knows theta by its former name."""

    model_type = "llama"

    def __init__(self, rope_theta=10000.0, rope_scaling=None, **kwargs):
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.__dict__.update(kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return cls(**config_dict)

    def to_dict(self):
        return dict(vars(self))


@pytest.fixture
def in_the_past(monkeypatch):
    """The configuration file as it runs on a release with neither strict configurations nor `rope_parameters`."""
    monkeypatch.delattr("transformers.modeling_rope_utils.RopeParameters")
    monkeypatch.delattr(cache_utils, "DynamicSlidingWindowLayer")
    monkeypatch.setattr("transformers.PretrainedConfig", PlainConfig)
    monkeypatch.setattr("transformers.CONFIG_MAPPING", {"llama": PlainConfig})
    spec = importlib.util.spec_from_file_location("past", configuration_olica.__file__)
    past = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "past", past)
    spec.loader.exec_module(past)
    return past


def test_an_old_release_takes_theta_and_sizes_from_the_file(in_the_past, pruned_folder):
    settings = json.loads((pruned_folder / "config.json").read_text())
    for known in (settings, {name: value for name, value in settings.items() if name != "rope_theta"}):
        config = in_the_past.config_class("llama").from_dict(known)
        assert type(config).model_type == "olica_llama" and config.layer_shapes == settings["layer_shapes"]
        assert (config.rope_theta, config.rope_scaling, config.torch_dtype) == (500.0, LLAMA3, "float32")
        assert not {"rope_parameters", "dtype"} & vars(config).keys()
        assert config.to_dict()["rope_theta"] == 500.0
    assert in_the_past.attends_with_all_heads(config) and not configuration_olica.attends_with_all_heads(config)


def test_the_release_that_runs_here_is_told_as_such():
    assert configuration_olica.STRICT and configuration_olica.HAS_ROPE_PARAMETERS
    assert configuration_olica.TAKES_ANY_HEADS


def test_deci_and_stock_say_both_names_also_when_saved_again(here):
    path = Path("tiny/config.json")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 7.0}})
    )
    for layout, recipe in (("deci", "olica-plus"), ("stock", "magnitude")):
        done = olica.prune("tiny", datasets="ids.safetensors", save_dir="out", layout=layout, recipe=recipe, round_to=1)
        names = {path.name for path in done.folder.glob("*.py")}
        assert names == ({"modeling_deci.py"} if layout == "deci" else set())
        written = json.loads((done.folder / "config.json").read_text())
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 7.0
        if layout == "deci":
            AutoConfig.from_pretrained(done.folder).save_pretrained("again")
            assert json.loads(Path("again/config.json").read_text())["rope_theta"] == 7.0


def test_the_table_counts_what_held(tmp_path):
    good = {"logits": 2e-6, "tokens": True, "generated": True, "saved": True, "read_again": 0.0}
    bad = {"logits": 3.0, "tokens": False, "error": "ValueError: no"}
    found = {"transformers": "4.46.3", "with_olica": False}
    found["checkpoints"] = {"llama_olica_sparsity-0.3": good, "phi3_olica_sparsity-0.3": bad, "qwen3_stock": {}}
    path = tmp_path / releases.RECORD
    assert releases.table(tmp_path) is None
    path.parent.mkdir()
    path.write_text(json.dumps({"releases": [found], "environment": {"git_commit": "cafe"}}))
    text = releases.table(tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| 4.46.3")]
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == ["2", "1", "3e+00", "1", "1", "1", "1"]
    assert "phi3_olica_sparsity-0.3: ValueError: no." in text and "has no family of these: qwen3_stock." in text
    assert "at commit cafe." in text
