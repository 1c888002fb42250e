"""Both command lines as a user calls them, on a tiny model in the current folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from called import PAPERS_EVALUATION, PAPERS_PRUNING, call
from conftest import add_adapter, hub_snapshot, load_weights, make_llama, refused, save_tiny
from safetensors.torch import save_file
from tiny_commands import evaluate, files_in, fill_with_rows, prose, prune
from tiny_tasks import ROWS, write_rows
from transformers import AutoModelForCausalLM

import model_pruning
import olica
from olica import jobs, run
from olica.checks import COMMANDS_OWN
from olica.errors import UsageError
from olica.methods.olica import OlicaParameters, released
from olica.methods.recipe import Recipe
from olica.methods.recipes import RECIPES
from olica.methods.value_output import NarrowedHeads, given_directions, released_importance
from olica.settings import Settings

ROOT = Path(__file__).parents[1]
fill_here = fill_with_rows


def test_prune_and_evaluate(here, capsys):
    assert prune("--save_dir=out") == 0
    folder = here / "out/tiny_sparsity-0.2"
    record = json.loads((folder / "olica_run.json").read_text())
    printed = capsys.readouterr().out
    assert str(folder.relative_to(here)) in printed and "corrected layers" in printed

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == record["parameters"]["after"] == record["parameters"]["planned"]
    saved = load_weights(folder)
    (file,) = folder.glob("*.safetensors")
    assert record["weight_bytes_on_disk"] == file.stat().st_size
    assert sum(t.numel() for t in saved.values()) == record["parameters"]["after"]
    assert record["measured_sparsity"] == 1 - record["parameters"]["after"] / record["parameters"]["before"]
    assert record["settings"]["sparsity"] == 0.2 and record["calibration"]["token_hash"]
    assert record["calibration"]["ids"] == [6, 32]
    assert len(record["multiple_correlation"]) == len(record["plan"]) == 3
    assert set(record["stages"]) == {"calibration set", "open model", "survey", "prune", "write"}
    assert all(stage["minutes"] > 0 and stage["host_bytes"] > 1e8 for stage in record["stages"].values())

    Path("held.txt").write_text(prose(99, 400))
    assert evaluate("--base_model=tiny", "--save_dir=out", "--ppl=held.txt", "--ppl_seqlen=64", "--with_dense") == 0
    (path,) = folder.glob("olica_eval_*.json")
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["dense", "pruned"]
    assert results["dense"]["parameters"]["total"] == record["parameters"]["before"]
    assert results["pruned"]["parameters"]["decoder_layers"] == record["parameters"]["decoder_layers_after"]
    for result in results.values():
        measured = result["perplexity"]["held.txt"]
        assert measured["seqlen"] == 64 and measured["windows"] > 5
        assert 1 < measured["value"] < 1e6
    row = results["pruned"]["to_dense"]["perplexity"]["held.txt"]
    assert row["ratio"] == pytest.approx(np.exp(row["difference"])) and row["standard_error"] > 0
    printed = capsys.readouterr().out
    assert f"{results['pruned']['perplexity']['held.txt']['value']:,.3f}" in printed
    assert f"{row['difference']:+.4f} ± {row['standard_error']:.4f}" in printed


@pytest.mark.parametrize("sparsity", ["0", "1e-06"])
def test_a_sparsity_that_removes_nothing_leaves_the_model(here, sparsity):
    assert prune(f"--sparsity={sparsity}", "--save_dir=out") == 0
    ids = torch.arange(40).view(2, 20)
    dense, same = (AutoModelForCausalLM.from_pretrained(f) for f in ("tiny", f"out/tiny_sparsity-{sparsity}"))
    torch.testing.assert_close(same(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert same.num_parameters() == dense.num_parameters()


def test_a_sparsity_of_the_layers_is_found_by_the_same_two_flags(here, capsys):
    flags = ["--sparsity=0.2", "--sparsity_of=layers", "--save_dir=out"]
    assert prune(*flags) == 0
    record = json.loads((here / "out/tiny_sparsity-0.2_of-layers/olica_run.json").read_text())
    assert record["settings"]["sparsity_of"] == "layers"
    counted = record["parameters"]
    of_layers = 1 - counted["decoder_layers_after"] / counted["decoder_layers_before"]
    assert record["measured_sparsity_of_layers"] == of_layers == pytest.approx(0.2, abs=0.02)
    assert record["measured_sparsity"] < of_layers
    printed = capsys.readouterr().out
    assert f"{of_layers:.4f} of its layers; asked for 0.2 of the layers" in printed and "note" not in printed
    Path("held.txt").write_text(prose(99, 400))
    assert evaluate("--base_model=tiny", *flags, "--ppl=held.txt", "--ppl_seqlen=64") == 0
    with pytest.raises(SystemExit):  # that of the whole model is another folder
        evaluate("--base_model=tiny", "--sparsity=0.2", "--save_dir=out", "--ppl=held.txt", "--ppl_seqlen=64")


def test_a_checkpoint_with_the_former_shares_of_grouped_heads_is_not_taken_for_one_of_today(here, capsys):
    assert prune("--save_dir=out") == 0
    path = here / "out/tiny_sparsity-0.2/olica_run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shares_removed": {"query": 0.5, "key": 0.0}}))
    Path("held.txt").write_text(prose(99, 400))
    flags = ["--ppl=held.txt", "--ppl_seqlen=64"]
    message = refused(capsys, evaluate, "--base_model=tiny", "--save_dir=out", *flags)
    assert "other shares for grouped heads" in message and "--checkpoint" in message
    assert evaluate(f"--checkpoint={path.parent}", *flags) == 0


def test_layers_that_lose_far_more_than_was_asked_are_warned_of(here, capsys):
    model = make_llama(vocab_size=2000, tie_word_embeddings=True)
    model.save_pretrained("wide")
    in_layers = 3 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) / model.num_parameters()  # 46 %, the rest is the embedding
    assert prune("--base_model=wide", "--sparsity=0.2", "--dry_run") == 0
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note"))
    lost, share = map(int, re.findall(r"(\d+)%", note))
    assert lost / 100 == pytest.approx(0.2 / in_layers, abs=0.03) and share / 100 == pytest.approx(in_layers, abs=0.01)
    assert "--sparsity_of layers" in note
    assert prune("--base_model=wide", "--sparsity=0.2", "--sparsity_of=layers", "--dry_run") == 0
    assert "note" not in capsys.readouterr().out


@dataclass(frozen=True)
class Double:
    share: float = field(default=2.0, metadata={"help": "of query/key, as the first has it"})

    def method(self):
        """Of the recipe olica-wanda without corrections, whose k is called share."""
        values = NarrowedHeads(given_directions, released_importance)
        return released(OlicaParameters(k=self.share, mlp_num=0), value_heads=values)


@dataclass(frozen=True)
class Triple:
    share: float = field(default=3.0, metadata={"help": "of query/key, as the second has it"})

    method = Double.method


@pytest.fixture
def alike(monkeypatch) -> None:
    """Two recipes whose parameters are two classes with a field of one name."""
    for name, kind in (("first", Double), ("second", Triple)):
        monkeypatch.setitem(RECIPES, name, Recipe(name, "Olica by another name", kind, lambda given: given.method()))


@pytest.mark.parametrize(
    ("recipe", "flags", "share"), [("first", [], 2.0), ("second", [], 3.0), ("second", ["--share=2.5"], 2.5)]
)
def test_recipes_may_have_parameters_of_one_name(here, alike, recipe, flags, share):
    plain = ["--base_model=tiny", "--datasets=rows.jsonl", "--num_samples=6", "--seqlen=32", "--save_dir=out"]

    def pruned(*arguments: str) -> dict[str, torch.Tensor]:
        assert call(model_pruning, *plain, *arguments) == 0
        (folder,) = Path("out").iterdir()
        return load_weights(folder)

    found = pruned(f"--recipe={recipe}", *flags)
    record = json.loads(Path(f"out/tiny_sparsity-0.2_{recipe}/olica_run.json").read_text())
    assert record["settings"]["share"] == share
    shutil.rmtree("out")
    expected = pruned("--recipe=olica-wanda", f"--k={share}", "--mlp_num=0")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_list_of_recipes_says_what_each_does(capsys):
    """It is printed whatever else is asked for, as --help is."""
    with pytest.raises(SystemExit) as ended:
        call(model_pruning, "--list_recipes")
    assert ended.value.code == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["recipe", "survey", "sizes"]
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == list(RECIPES)
    assert rows["magnitude"].split()[1:3] == ["yes", "own"] and "fewer channels, fewer heads" in rows["magnitude"]
    assert rows["olica"].split()[2] == "alike" and "factors of q, k, narrower value heads" in rows["olica"]
    assert all(recipe.about in rows[name] for name, recipe in RECIPES.items())


def test_help_names_all_recipes_that_have_a_parameter_of_one_name(alike):
    said = " ".join(model_pruning.build_parser().format_help().split())
    assert "--share SHARE of query/key, as the first has it (default: 2.0; also of second)" in said


def test_products_are_taken_in_full_single_precision(here, monkeypatch):
    torch.set_float32_matmul_precision("high")
    try:
        seen, survey = [], run.survey_layers
        monkeypatch.setattr(
            run, "survey_layers", lambda *work: seen.append(torch.get_float32_matmul_precision()) or survey(*work)
        )
        prune("--save_dir=out")
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("size", ["3", "auto"])
def test_batch_size_is_a_number_or_what_fits(here, capsys, size):
    assert prune("--save_dir=out", f"--batch_size={size}") == 0
    chosen = json.loads(Path("out/tiny_sparsity-0.2/olica_run.json").read_text())["batch_size"]
    assert chosen == (8 if size == "auto" else 3), "of 6 samples"
    assert f"batch size   {chosen}" in capsys.readouterr().out


def test_drawn_tokens_can_be_given_back(here):
    assert prune("--save_dir=first") == 0
    (drawn,) = Path("data/calibration").glob("*.safetensors")
    for path in Path("tiny").glob("*token*"):
        path.unlink()
    assert prune("--save_dir=second", f"--datasets={drawn}") == 0
    first, second = (load_weights(f"{name}/tiny_sparsity-0.2") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads(Path(f"{name}/tiny_sparsity-0.2/olica_run.json").read_text()) for name in ("first", "second")]
    assert records[0]["calibration"]["token_hash"] == records[1]["calibration"]["token_hash"]


def test_dry_run_prints_the_plan_and_reads_no_weights(here, capsys):
    Path("tiny/model.safetensors").unlink()
    before = files_in(here)
    assert prune("--dry_run") == 0
    printed = capsys.readouterr().out
    assert "q_rank" in printed and "intermediate_size" in printed and "peak memory" in printed
    assert files_in(here) == before


def test_a_recipe_has_its_own_text_unless_another_is_given():
    for recipe, given, expected in (
        ("olica", {}, ("bookcorpus+alpaca", 128, 1)),
        ("olica-plus", {}, ("c4", 768, 8)),
        ("olica-plus", {"num_samples": 5, "candidates": "2"}, ("c4", 5, 2)),
        ("olica-plus", {"datasets": "alpaca"}, ("alpaca", 128, 1)),
        ("olica", {"datasets": "c4", "num_samples": "7"}, ("c4", 7, 1)),
    ):
        settings = Settings(recipe=recipe, **given)
        assert (settings.datasets, settings.num_samples, settings.candidates) == expected
    arguments = model_pruning.build_parser().parse_args(["--recipe=olica-plus"])
    assert not {"datasets", "num_samples", "candidates"} & vars(arguments).keys()
    with pytest.raises(UsageError, match="--num_samples x"):
        Settings(num_samples="x")


def test_dry_run_plans_what_pruning_reaches(here, capsys):
    prune("--dry_run", "--sparsity=0.3")
    planned = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters"))
    prune("--save_dir=out", "--sparsity=0.3")
    record = json.loads(Path("out/tiny_sparsity-0.3/olica_run.json").read_text())
    assert f"{record['parameters']['after']:,}" in planned


def test_sizes_can_be_rounded(here):
    assert prune("--save_dir=out", "--sparsity=0.3", "--ratio=0.2", "--round_to=8") == 0
    record = json.loads(Path("out/tiny_sparsity-0.3/olica_run.json").read_text())
    assert all(size % 8 == 0 for shape in record["plan"] for size in shape.values())
    assert sum(shape["correction_rank"] for shape in record["plan"]) == 16  # 12 without rounding
    model = AutoModelForCausalLM.from_pretrained("out/tiny_sparsity-0.3")
    assert model.config.layer_shapes == record["plan"]
    assert model(torch.arange(40).view(2, 20)).logits.isfinite().all()


def test_the_papers_recipe_is_saved_under_its_name(here):
    assert prune("--save_dir=out", "--recipe=olica-paper") == 0
    record = json.loads(Path("out/tiny_sparsity-0.2_olica-paper/olica_run.json").read_text())
    assert record["settings"]["recipe"] == "olica-paper"


def test_cache_dev_and_device_are_two_flags(here, capsys, monkeypatch):
    """No machine of two devices is needed to see which flag decides what."""
    seen = []

    def survey_layers(work, plan, progress):
        seen.append((work.options.device.type, work.options.cache_device.type))
        raise UsageError("enough seen")

    named = {"--device": "cpu", "--cache_dev": "meta"}
    monkeypatch.setattr(jobs, "pick_device", lambda name, flag="--device": torch.device(named[flag]))
    monkeypatch.setattr(run, "survey_layers", survey_layers)
    refused(capsys, prune, "--save_dir=out", "--cache_dev=cpu")
    refused(capsys, prune, "--save_dir=out")  # auto: where layers run
    assert seen == [("cpu", "meta"), ("cpu", "cpu")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_that_of_the_checkpoint(here, dtype):
    assert prune("--save_dir=out", f"--dtype={dtype}") == 0
    saved = load_weights("out/tiny_sparsity-0.2")
    assert {str(tensor.dtype) for tensor in saved.values()} == {f"torch.{dtype}"}


def test_the_papers_commands_run_verbatim(here, fast_python):
    """7b stands for a hub id, so a tiny model is put where the hub's cache has LLaMA-7B."""
    save_tiny(hub_snapshot(here / "hub", "huggyllama/llama-7b"), hidden_size=128, num_hidden_layers=8)
    (here / "data/eval").mkdir(parents=True)
    with open("data/bookcorpus.jsonl", "w") as books, open("data/alpaca.jsonl", "w") as alpaca:
        for seed in range(130):
            books.write(json.dumps({"text": prose(seed, 50)}) + "\n")
            alpaca.write(json.dumps({"instruction": prose(seed, 5), "input": "", "output": prose(seed, 9)}) + "\n")
    Path("data/wikitext2_raw_test.jsonl").write_text(json.dumps({"text": prose(1, 200)}) + "\n")
    for stem, row in ROWS.items():
        write_rows(here / "data/eval", stem, [row])
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "home"), "HF_HUB_CACHE": str(here / "hub")}
    environment["OMP_NUM_THREADS"] = "1"  # tiny matrices gain nothing from a second thread
    calls = (sys.executable, "model_pruning.py", PAPERS_PRUNING), (fast_python, "model_evaluate.py", PAPERS_EVALUATION)
    for python, script, flags in calls:
        done = subprocess.run(
            [python, ROOT / script, *flags.split()],
            capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(Path("pruned_models/7b_sparsity-0.2/olica_run.json").read_text())
    assert record["model"]["source"] == "huggyllama/llama-7b" and record["model"]["revision"] == "0" * 40
    assert record["calibration"]["ids"] == [256, 128] and len(record["corrected_layers"]) == 6
    (evaluation,) = Path("pruned_models/7b_sparsity-0.2").glob("olica_eval_*.json")
    scores = json.loads(evaluation.read_text())["results"]["model"]["zero_shot"]
    assert len(scores["tasks"]) == 7 and 0 <= scores["averages"]["paper_rule"] <= 100


def test_flags_that_are_no_settings_are_known_as_such():
    parsed = {action.dest for action in model_pruning.build_parser()._actions} - {"help"}
    of_recipes = {name for recipe in RECIPES.values() for name in recipe.parameter_names}
    assert parsed - of_recipes - {field.name for field in fields(Settings)} == COMMANDS_OWN.keys()


def test_numbers_that_are_given_as_text_are_those_numbers(here):
    given = {"num_samples": "6", "seqlen": "32", "mlp_num": "1", "ratio": "0.1", "k": "3", "batch_size": "4"}
    record = olica.prune("tiny", datasets="rows.jsonl", sparsity="0.2", save_dir=Path("out"), **given).record
    found = {name: record["settings"][name] for name in (*given, "sparsity")}
    assert found == {name: float(value) for name, value in given.items()} | {"sparsity": 0.2}


def test_a_token_file_needs_no_other_flags(here, capsys):
    save_file({"calibration_ids": torch.randint(300, (8, 16))}, "ids.safetensors")
    assert prune("--datasets=ids.safetensors", "--num_samples=0", "--seqlen=5000", "--save_dir=out") == 0
    assert json.loads(Path("out/tiny_sparsity-0.2/olica_run.json").read_text())["calibration"]["ids"] == [8, 16]
    save_file({"calibration_ids": torch.randint(300, (2, 257))}, "long.safetensors")
    assert "--datasets: samples of 257 tokens" in refused(capsys, prune, "--datasets=long.safetensors")


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_all_that_is_written_may_be_read_by_whom_the_umask_says(here, umask, file_mode, folder_mode):
    before = os.umask(umask)
    try:
        assert prune("--save_dir=out") == 0
        assert evaluate("--base_model=tiny", "--save_dir=out", "--ppl=rows.jsonl", "--ppl_seqlen=64") == 0
    finally:
        os.umask(before)
    written = [path for folder in ("out", "data/calibration") for path in (here / folder).rglob("*")]
    assert len([path for path in written if path.suffix == ".safetensors"]) == 2
    assert {path.name for path in written} >= {"README.md", "olica_run.json", "modeling_olica.py", "tokenizer.json"}
    modes = {path: path.stat().st_mode & 0o777 for path in written}
    assert modes == {path: folder_mode if path.is_dir() else file_mode for path in written}


def test_a_tilde_is_expanded(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    flags = ["--base_model=~/tiny", "--datasets=~/rows.jsonl", "--data_dir=~/cache", "--save_dir=~/out"]
    assert prune(*flags) == 0
    assert (here / "out/tiny_sparsity-0.2/config.json").is_file() and (here / "cache/calibration").is_dir()


def test_a_number_of_mlps_that_has_no_effect_is_named(here, capsys):
    said = "no MLP loses a channel, so --mlp_num 1 has no effect"
    assert prune("--sparsity=0.0001", "--save_dir=out") == 0
    assert said in capsys.readouterr().out
    assert "`--mlp_num 1` had no effect" in Path("out/tiny_sparsity-0.0001/README.md").read_text()
    assert prune("--dry_run") == 0 and prune("--dry_run", "--sparsity=0", "--mlp_num=0") == 0
    assert said not in capsys.readouterr().out


def test_a_checkpoint_of_another_model_is_not_taken_for_this_one(here, capsys):
    prune("--save_dir=out")
    save_tiny("other/tiny", hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    flags = ["--save_dir=out", "--ppl=rows.jsonl", "--with_dense"]
    assert "was pruned from tiny" in refused(capsys, evaluate, "--base_model=other/tiny", *flags)
    assert "was pruned from tiny" in refused(capsys, evaluate, "--base_model=other/tiny", *flags[:2])
    path = Path("out/tiny_sparsity-0.2/olica_run.json")
    record = json.loads(path.read_text())
    record["model"]["source"] = "huggyllama/llama-7b"
    path.write_text(json.dumps(record))
    assert evaluate("--base_model=tiny", *flags[:2]) == 0, "a local model may have moved"
    shutil.copytree("out/tiny_sparsity-0.2", "out/7b_sparsity-0.2")
    assert evaluate("--base_model=7b", *flags[:2]) == 0, "a model of the hub need not be at hand"
    shutil.copytree("out/tiny_sparsity-0.2", "out/13b_sparsity-0.2")
    assert "huggyllama/llama-7b" in refused(capsys, evaluate, "--base_model=13b", *flags[:2])


def test_an_existing_checkpoint_is_replaced_only_when_asked_to(here, capsys):
    prune("--save_dir=out")
    first = Path("out/tiny_sparsity-0.2/olica_run.json").read_text()
    assert "--overwrite" in refused(capsys, prune, "--save_dir=out")
    assert Path("out/tiny_sparsity-0.2/olica_run.json").read_text() == first
    assert prune("--save_dir=out", "--overwrite", "--seed=1") == 0
    assert json.loads(Path("out/tiny_sparsity-0.2/olica_run.json").read_text())["settings"]["seed"] == 1


def test_a_pruned_checkpoint_is_not_pruned_again(here, capsys):
    prune("--save_dir=out")
    assert "pruned already" in refused(capsys, prune, "--base_model=out/tiny_sparsity-0.2")


def test_a_dense_model_can_be_measured_alone(here, capsys):
    Path("held.txt").write_text(prose(5, 300))
    assert evaluate("--checkpoint=tiny", "--ppl=held.txt", "--prompt=the quick", "--output_path=eval.json") == 0
    record = json.loads(Path("eval.json").read_text())
    assert record["results"]["model"]["continuation"].startswith("the quick")
    printed = capsys.readouterr().out
    assert "model: the quick" in printed
    assert evaluate("--checkpoint=tiny", "--ppl=held.txt", "--ppl_windows=1", "--output_path=eval.json") == 0
    assert "±" in printed and "±" not in capsys.readouterr().out, "one window has no standard error"


def test_signs_of_patterns_in_paths_stand_for_themselves(here):
    Path("tiny").rename("tiny [1]?*")
    for folder, text in {"data [1]?*": prose(1, 400), "data 1xy": prose(2, 400)}.items():
        Path(folder).mkdir()
        (Path(folder) / "ptb_test.txt").write_text(text)
    assert prune("--base_model=tiny [1]?*", "--data_dir=data [1]?*", "--save_dir=out [1]?*") == 0
    assert list(Path("data [1]?*/calibration").iterdir())
    flags = ["--base_model=tiny [1]?*", "--data_dir=data [1]?*", "--save_dir=out [1]?*", "--with_dense"]
    assert evaluate(*flags, "--ppl=ptb", "--ppl_seqlen=64", "--output_path=e [1]?*.json") == 0
    results = json.loads(Path("e [1]?*.json").read_text())["results"]
    assert {result["perplexity"]["ptb"]["origin"] for result in results.values()} == {"data [1]?*/ptb_test.txt"}
    assert results["pruned"]["parameters"]["total"] < results["dense"]["parameters"]["total"]


def test_both_commands_leave_out_an_adapter_beside_the_model(here, caplog):
    add_adapter("tiny")
    assert prune("--save_dir=out", "--sparsity=0") == 0
    flags = ["--base_model=tiny", "--save_dir=out", "--sparsity=0", "--with_dense"]
    assert evaluate(*flags, "--ppl=rows.jsonl", "--ppl_seqlen=64", "--output_path=e.json") == 0
    dense, pruned = json.loads(Path("e.json").read_text())["results"].values()
    assert dense["perplexity"]["rows.jsonl"]["value"] == pytest.approx(pruned["perplexity"]["rows.jsonl"]["value"])
    record = json.loads(Path("out/tiny_sparsity-0/olica_run.json").read_text())
    assert record["model"]["description"] == "tiny, without the adapter beside it" == dense["model"]["description"]
    assert len([line for line in caplog.messages if "the adapter beside the model is left out" in line]) == 1
