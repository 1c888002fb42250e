"""Every way in which users load, serve and retrain a pruned checkpoint."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from called import call
from conftest import hub_snapshot, make_tokenizer, prune, write_pruned
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import load, make_family
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import model_pruning
from olica.model.families import FAMILIES, SEQUENCE_CLASSIFIERS, TOKEN_CLASSIFIERS
from olica.model.modeling_olica import CorrectedMLP, LowRankLinear

IDS = torch.randint(3, 250, (6, 20), generator=torch.Generator().manual_seed(0))
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pruned_folder(tmp_path_factory):
    """Gives the folder of a family's tiny model, pruned by 30 % with one layer calibrated, and a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("loading")

    @cache
    def folder_of(family: str) -> Path:
        model = make_family(family, grouped=True, tied=True)
        _, plan = prune(model, IDS, "olica", 0.3)
        write_pruned(model, plan, make_tokenizer(), root / family)
        with torch.no_grad():
            save_file({"ids": IDS, "logits": model(IDS).logits}, root / f"{family}.safetensors")
        return root / family

    return folder_of


def expected_logits(folder: Path) -> torch.Tensor:
    return load_file(folder.with_suffix(".safetensors"))["logits"]


@pytest.fixture
def run_without_olica(tmp_path, fast_python) -> Callable[..., str]:
    """Runs Python in a process that has nothing of olica; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}

    def run(*command: str) -> str:
        done = subprocess.run(
            [fast_python, *map(str, command)], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_fixture_has_every_kind_of_module(pruned_folder):
    kinds = {type(module) for module in load(pruned_folder("phi3")).modules()}
    assert {CorrectedMLP, LowRankLinear} <= kinds


@every_family
def test_saved_again_and_in_shards(pruned_folder, family, tmp_path):
    folder = pruned_folder(family)
    load(folder).save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "again" / "modeling_olica.py").read_bytes() == (folder / "modeling_olica.py").read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "again", folder)]
    assert configs[0] == configs[1]
    assert torch.equal(load(tmp_path / "again")(IDS).logits, expected_logits(folder))


WITHOUT_OLICA = """
import importlib.util
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
sys.modules["olica"] = None  # whoever imports it fails, as where it is not installed
folder = sys.argv[1]
code = dict(trust_remote_code=True)
expected = load_file(folder + ".safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, **code)
model.save_pretrained("again", max_shard_size="60KB")
again = AutoModelForCausalLM.from_pretrained("again", **code).eval()
assert torch.equal(again(expected["ids"]).logits, expected["logits"])
settings = dict(max_new_tokens=6, do_sample=False)
tokenizer = AutoTokenizer.from_pretrained(folder, **code)
text = pipeline("text-generation", model=folder, **code)("ab cd", **settings)[0]["generated_text"]
prompt = tokenizer("ab cd", return_tensors="pt")
assert text == tokenizer.decode(model.eval().generate(**prompt, **settings)[0], skip_special_tokens=True)
print("done")
"""


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_saved_again_and_put_into_a_pipeline_without_olica(pruned_folder, family, run_without_olica):
    assert run_without_olica("-c", WITHOUT_OLICA, pruned_folder(family)) == "done\n"


ALONE = """
import os
import sys
from pathlib import Path
from safetensors.torch import load_file
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
autos = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)
folders = sys.argv[1:]
for folder in folders:
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, folder
        continue
    for family in (Path(other).name for other in folders if other != folder):
        name = CONFIG_MAPPING._mapping.pop(family)
        for mapping in (MODEL_MAPPING, *(auto._model_mapping for auto in autos)):
            mapping._model_mapping.pop(family, None)
        module = f"transformers.models.{model_type_to_module_name(family)}"
        for known in [known for known in sys.modules if f"{known}.".startswith(f"{module}.")]:
            del sys.modules[known]
        for kept, value in [*vars(transformers).items()]:
            if getattr(value, "__module__", "").startswith(module):
                delattr(transformers, kept)
        vars(transformers.models).pop(module.rpartition(".")[2], None)
        sys.modules[module] = None  # importing it fails
        try:
            getattr(transformers, name)
        except (AttributeError, ImportError):
            continue
        raise AssertionError(f"{name} is still there")
    expected = load_file(folder + ".safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert (model(expected["ids"]).logits == expected["logits"]).all()
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is model.base_class
    print(model.config.model_type.removeprefix("olica_"), flush=True)
    os._exit(0)
"""


def test_a_checkpoint_needs_no_family_but_its_own(pruned_folder, run_without_olica):
    assert run_without_olica("-c", ALONE, *map(pruned_folder, FAMILIES)).split() == list(FAMILIES)


def prune_by_command(tmp_path: Path, with_tokenizer: bool) -> Path:
    """The folder that model_pruning.py makes of a tiny LLaMA."""
    make_family("llama").save_pretrained(tmp_path / "dense")
    if with_tokenizer:
        make_tokenizer().save_pretrained(tmp_path / "dense")
    save_file({"calibration_ids": IDS}, tmp_path / "ids.safetensors")
    flags = [f"--base_model={tmp_path / 'dense'}", f"--datasets={tmp_path / 'ids.safetensors'}", "--mlp_num=1"]
    assert call(model_pruning, *flags, f"--save_dir={tmp_path}") == 0
    return tmp_path / "dense_sparsity-0.2"


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_the_lines_of_the_card_work_without_olica_and_ask_nothing(tmp_path, run_without_olica, with_tokenizer):
    """On a terminal AutoTokenizer would ask whether to run the code of the configuration, and wait for an answer."""
    folder = prune_by_command(tmp_path, with_tokenizer)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert ("AutoTokenizer" in code) == with_tokenizer
    last = "print(type(model).__name__, type(tokenizer('ab').input_ids).__name__ if 'tokenizer' in vars() else 'none')"
    printed = run_without_olica("-c", f"FOLDER = {str(folder)!r}\n{code}\n{last}")
    assert printed == f"OlicaLlamaForCausalLM {'list' if with_tokenizer else 'none'}\n"


def test_a_repository_of_the_hub_that_holds_the_folder(tmp_path, run_without_olica):
    """Laid out as a download keeps it, it loads by the repository's name."""
    folder = prune_by_command(tmp_path, with_tokenizer=True)
    shutil.copytree(folder, hub_snapshot(cache := tmp_path / "cache", "someone/pruned"), dirs_exist_ok=True)
    sent = {path.name for path in folder.iterdir()}
    assert sent >= {"README.md", "config.json", "modeling_olica.py", "configuration_olica.py", "tokenizer.json"}
    assert not any(name.startswith(".") for name in sent), "an upload sends hidden files too"
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.tags == ["olica", "pruned"] and "base_model" not in card.data.to_dict()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert {name.split(".")[0] + ".py" for name in auto_map.values()} <= sent
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "asked = dict(trust_remote_code=True, cache_dir=sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained('someone/pruned', **asked)\n"
        "tokenizer = AutoTokenizer.from_pretrained('someone/pruned', **asked)\n"
        "print(type(model).__name__, len(tokenizer('ab').input_ids), 'olica' in sys.modules)"
    )
    assert run_without_olica("-c", script, cache) == "OlicaLlamaForCausalLM 2 False\n"


def test_fine_tuning_goes_on_from_its_checkpoint(pruned_folder, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]

    def trained(resume_from_checkpoint=None) -> torch.Tensor:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load(pruned_folder("llama")), lora)
        settings = TrainingArguments(
            tmp_path / "trained", max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, settings, train_dataset=rows).train(resume_from_checkpoint=resume_from_checkpoint)
        return model.eval()(IDS).logits

    at_once = trained()
    assert (at_once - expected_logits(pruned_folder("llama"))).abs().max() > 0.1
    torch.testing.assert_close(trained(str(tmp_path / "trained" / "checkpoint-3")), at_once)


@every_family
def test_pipeline(pruned_folder, family):
    folder, settings = pruned_folder(family), dict(max_new_tokens=6, do_sample=False)
    generate = pipeline("text-generation", model=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = [row[0]["generated_text"] for row in generate(["ab cd", "x"], **settings)]
    expected = [load(folder).generate(**tokenizer(text, return_tensors="pt"), **settings)[0] for text in ("ab cd", "x")]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]


CLASSIFIERS = [
    (family, auto)
    for auto, models in (
        (AutoModelForSequenceClassification, SEQUENCE_CLASSIFIERS),
        (AutoModelForTokenClassification, TOKEN_CLASSIFIERS),
    )
    for family in models
]


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_every_family_has_the_classifiers_that_the_library_has(auto):
    offered = {family for family, its in CLASSIFIERS if its is auto}
    assert offered == {family for family in FAMILIES if CONFIG_MAPPING[family] in auto._model_mapping}


@pytest.mark.parametrize(("family", "auto"), CLASSIFIERS)
def test_classifiers(pruned_folder, family, auto, tmp_path):
    folder = pruned_folder(family)
    model, info = auto.from_pretrained(folder, num_labels=3, pad_token_id=0, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"score"} and not info["mismatched_keys"]
    causal = load(folder).model.state_dict()
    assert causal.keys() == model.model.state_dict().keys()
    assert all(torch.equal(weight, causal[name]) for name, weight in model.model.state_dict().items())
    labels = torch.arange(6) % 3 if auto is AutoModelForSequenceClassification else IDS % 3
    output = model.eval()(IDS, labels=labels)
    assert output.logits.shape == (*labels.shape, 3)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(model) and torch.equal(again(IDS).logits, output.logits)


CLASSIFIERS_WITHOUT_OLICA = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
code = dict(trust_remote_code=True)
for folder in sys.argv[1:]:
    ids = load_file(folder + ".safetensors")["ids"]
    for auto, shape in ((AutoModelForSequenceClassification, (6, 2)), (AutoModelForTokenClassification, (6, 20, 2))):
        # Before the causal model is loaded: nothing else has made the base model known.
        model = auto.from_pretrained(folder, pad_token_id=0, **code).eval()
        assert model(ids).logits.shape == shape
        model.save_pretrained(folder + "-again")
        again = auto.from_pretrained(folder + "-again", **code).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
        causal = AutoModelForCausalLM.from_pretrained(folder, **code)
        assert all(torch.equal(p, q) for p, q in zip(model.model.parameters(), causal.model.parameters(), strict=True))
print("done")
"""


def test_classifiers_without_olica(pruned_folder, run_without_olica):
    folders = [pruned_folder(family) for family in TOKEN_CLASSIFIERS]
    assert run_without_olica("-c", CLASSIFIERS_WITHOUT_OLICA, *folders) == "done\n"


QUESTIONS = [
    ("a b c", [" d", " x y"], 0),
    ("one", [" two", " 2"], 1),
    ("go", [" on", " off", " up"], 2),
    ("0 1", [" 2", " 1"], 0),
]
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def log_likelihood(model, tokenizer, text: str, choice: str) -> float:
    """Log-probability of `choice` after `text`, by hand."""
    start, ids = len(tokenizer(text).input_ids), torch.tensor([tokenizer(text + choice).input_ids])
    logprobs = model(ids).logits.log_softmax(-1)[0, start - 1 : -1]
    return logprobs.gather(-1, ids[0, start:, None]).sum().item()


def test_the_harness_command_line(pruned_folder, run_without_olica, tmp_path):
    folder = pruned_folder("llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(text=t, choices=c, gold=g)) + "\n" for t, c, g in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(rows=rows))
    arguments = f"--model hf --model_args pretrained={folder},trust_remote_code=True --tasks tiny_choices --device cpu"
    arguments += f" --include_path {tmp_path / 'tasks'} --output_path {tmp_path / 'results'} --log_samples"
    run_without_olica("-m", "lm_eval", *arguments.split())
    (results,), (samples,) = ((tmp_path / "results").rglob(name) for name in ("results_*.json", "samples_*.jsonl"))
    found = [[float(x[0][0]) for x in json.loads(line)["resps"]] for line in samples.read_text().splitlines()]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    expected = [[log_likelihood(model, tokenizer, text, choice) for choice in row] for text, row, _ in QUESTIONS]
    assert sum(found, []) == pytest.approx(sum(expected, []), abs=1e-3)
    right = [row.index(max(row)) == gold for row, (_, _, gold) in zip(expected, QUESTIONS, strict=True)]
    assert json.loads(results.read_text())["results"]["tiny_choices"]["acc,none"] == sum(right) / len(right)


@every_family
def test_device_maps_and_offload(pruned_folder, family, tmp_path):
    folder = pruned_folder(family)
    for device_map in ("auto", "cpu"):
        torch.testing.assert_close(load(folder, device_map=device_map)(IDS).logits, expected_logits(folder))
    small = load(folder, device_map="auto", max_memory={"cpu": "120KB"}, offload_folder=tmp_path / "auto")
    assert "disk" in small.hf_device_map.values()
    torch.testing.assert_close(small(IDS).logits, expected_logits(folder))
    some_on_disk = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu"}
    some_on_disk |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = load(folder, device_map=some_on_disk, offload_folder=tmp_path / "map")
    assert all(parameter.is_meta for parameter in offloaded.model.layers[1].parameters())
    torch.testing.assert_close(offloaded(IDS).logits, expected_logits(folder))


@every_family
def test_lora_trains_is_kept_and_merged(pruned_folder, family, tmp_path):
    folder = pruned_folder(family)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(folder), lora)
    linears = {name for name, module in load(folder).named_modules() if type(module) is nn.Linear} - {"lm_head"}
    assert {name.rpartition(".")[2] for name in linears} >= {"reduce", "expand", "linear", "gate_proj"}
    adapted = {name.split(".lora_A.")[0].removeprefix("base_model.model.") for name, _ in model.named_modules()
               if name.endswith(".lora_A.default")}  # fmt: skip
    assert adapted == linears
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    trained = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, trained)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.config.layer_shapes == load(folder).config.layer_shapes
    torch.testing.assert_close(merged(IDS).logits, trained, rtol=1e-3, atol=1e-3)


# Neither generates code, whose compiler not every machine has. What the second adds is the same for every family, whose
# modules of ours are the same: that the graph has a form without changes in place, and one of its gradients.
@pytest.mark.parametrize(("family", "backend"), [*((family, "eager") for family in FAMILIES), ("phi3", "aot_eager")])
def test_compiled_forward(pruned_folder, family, backend):
    """As one graph: none of our modules breaks it."""
    folder = pruned_folder(family)
    model = load(folder)
    torch._dynamo.reset()  # the families of the other tests have left nothing to recompile
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected_logits(folder), rtol=1e-4, atol=1e-4)
