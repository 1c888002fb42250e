"""What a user can get wrong: both command lines, and calls from Python, end in a sentence and leave nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused, save_tiny
from safetensors.torch import save_file
from tiny_commands import evaluate, files_in, fill_with_rows, prune

import olica
from olica.errors import UsageError

fill_here = fill_with_rows


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base_model=no-such-model"], ["--base_model no-such-model", "smollm2, 7b"]),
        (["--base_model=./nowhere"], ["--base_model ./nowhere", "model folder"]),
        (["--datasets=nowhere.jsonl"], ["--datasets", "nowhere.jsonl"]),
        (["--datasets=empty.jsonl"], ["empty.jsonl"]),
        (["--datasets=broken.jsonl"], ["broken.jsonl"]),
        (["--datasets=broken.safetensors"], ["broken.safetensors"]),
        (["--datasets=foreign.safetensors"], ["vocabulary"]),
        (["--seqlen=500"], ["--seqlen", "256 positions"]),
        (["--seqlen=250", "--datasets=short.jsonl"], ["short.jsonl", "--seqlen"]),
        (["--sparsity=1"], ["--sparsity 1", "[0, 1)"]),
        (["--sparsity=-0.1"], ["--sparsity -0.1", "[0, 1)"]),
        (["--sparsity=0.97"], ["--sparsity 0.97", "largest possible"]),
        (["--mlp_num=3"], ["--mlp_num 3", "0 to 2"]),
        (["--mlp_num=-1"], ["--mlp_num -1"]),
        (["--ratio=0"], ["--ratio 0", "(0, 1]"]),
        (["--ratio=1.2"], ["--ratio 1.2", "(0, 1]"]),
        (["--k=0"], ["--k 0"]),
        (["--percdamp=0"], ["--percdamp 0"]),
        (["--ratio=nan"], ["--ratio nan", "(0, 1]"]),
        (["--sparsity=nan"], ["--sparsity nan", "[0, 1)"]),
        (["--k=nan"], ["--k nan"]),
        (["--k=inf"], ["--k inf"]),
        (["--percdamp=nan"], ["--percdamp nan"]),
        (["--percdamp=inf"], ["--percdamp inf"]),
        (["--ratio=0.001"], ["--ratio 0.001", "--mlp_num 0"]),
        (["--round_to=0"], ["--round_to 0", "1 to 176"]),
        (["--round_to=177"], ["--round_to 177", "1 to 176"]),
        (["--base_model=" + "x" * 300], ["too long"]),
        (["--datasets=" + "x" * 300], ["too long"]),
        (["--datasets=tiny"], ["tiny"]),
        (["--data_dir=rows.jsonl", "--datasets=alpaca"], ["--data_dir rows.jsonl: ", "rows.jsonl is a file; give a"]),
        (["--data_dir=rows.jsonl"], ["--data_dir rows.jsonl: ", "rows.jsonl is a file; give a folder"]),
        (["--data_dir=rows.jsonl/new", "--dry_run"], ["--data_dir rows.jsonl/new: ", "rows.jsonl is a file; give a"]),
        (["--batch_size=0"], ["--batch_size 0"]),
        (["--num_samples=0"], ["--num_samples is 0"]),
        (["--num_samples=21"], ["rows.jsonl", "20"]),
        (["--save_dir=rows.jsonl"], ["--save_dir", "is a file"]),
        (["--save_dir=full"], ["--save_dir", "--overwrite"]),
    ],
)
def test_wrong_input_to_pruning(here, capsys, flags, words):
    (here / "full/tiny_sparsity-0.2").mkdir(parents=True)
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text('{"text": "cut sho')
    Path("short.jsonl").write_text('{"text": "too short"}\n')
    Path("broken.safetensors").write_bytes(b"not a token file")
    save_file({"calibration_ids": torch.full((4, 16), 5000)}, "foreign.safetensors")
    before = files_in(here)
    message = refused(capsys, prune, *flags)
    assert all(word in message for word in words), message
    assert files_in(here) == before, "something was left behind"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="wants a folder in which none can be made")
def test_a_save_dir_that_cannot_be_made_is_refused_by_its_flag(here, capsys):
    said = "--save_dir: /proc is not a folder that can be written to"
    assert said in refused(capsys, prune, "--save_dir=/proc/pruned")
    with pytest.raises(UsageError, match=said):
        olica.prune("tiny", datasets="rows.jsonl", num_samples=6, seqlen=32, mlp_num=1, save_dir="/proc/pruned")


@pytest.mark.parametrize("flag", ["--save_dir", "--data_dir"])
@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_a_name_that_is_too_long_is_refused_by_its_flag(here, capsys, flag, dry_run):
    before = files_in(here)
    said = refused(capsys, prune, f"{flag}={'a' * 300}", *dry_run)
    assert said.startswith(flag) and said.endswith("File name too long; give another")
    assert files_in(here) == before, "something was left behind"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "x"), ("batch_size", 2.5), ("batch_size", None), ("sparsity", "x"), ("sparsity", [0.2, "x"]),
        ("sparsity", None), ("sparsity", True), ("k", "x"), ("k", [3.0]), ("mlp_num", "3.5"), ("mlp_num", 1.5),
        ("percdamp", None), ("num_samples", "six"), ("seqlen", None), ("round_to", True),
        ("save_dir", 3), ("save_dir", None), ("overwrite", "no"), ("device", "gpu"), ("recipe", ["flap"]),
        ("sparsity", [0.2, 0.20000001]),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused_by_their_flag(here, name, value):
    """The command line makes numbers of what was typed; a call from Python may give anything."""
    before, usual = files_in(here), {"datasets": "rows.jsonl", "num_samples": 6, "seqlen": 32, "mlp_num": 1}
    with pytest.raises(UsageError, match=rf"--{name}\b"):
        olica.prune("tiny", **usual | {name: value})
    assert files_in(here) == before, "something was left behind"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sparsty": 0.2}, "there is no argument sparsty; did you mean sparsity or sparsity_of?"),
        ({"percdam": 0.2}, "there is no argument percdam; did you mean percdamp?"),
        ({"percdam": 0.2, "recipe": "flap"}, "there is no argument percdam; there are dtype, datasets, "),
        ({"percdamp": 0.2, "recipe": "flap"}, "--percdamp is no parameter of --recipe flap"),
        ({"parameters": {"k": 3}}, "there is no argument parameters; "),
        ({"base_model": "other"}, "base_model is the first argument of prune, and is given without a name"),
        ({"dry_run": True}, "there is no argument dry_run: it is a flag of model_pruning.py and model_sweep.py alone"),
        ({"list_recipes": True}, "there is no argument list_recipes: it is a flag of model_pruning.py and"),
        ({"verbose": True}, "there is no argument verbose: it is a flag of the commands alone"),
    ],
)
def test_arguments_that_a_pruning_has_not_are_refused_by_their_names(here, given, words):
    with pytest.raises(UsageError) as raised:
        olica.prune("tiny", **given)
    assert str(raised.value).startswith(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
@pytest.mark.parametrize("flag", ["--device", "--cache_dev"])
def test_a_gpu_that_is_not_there(here, capsys, flag):
    assert f"{flag} cuda" in refused(capsys, prune, f"{flag}=cuda")
    assert "--device cuda" in refused(capsys, evaluate, "--checkpoint=tiny", "--device=cuda", "--ppl=rows.jsonl")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base_model=tiny"], ["pruned_models/tiny_sparsity-0.2", "--checkpoint"]),
        (["--checkpoint=./nowhere"], ["--checkpoint ./nowhere"]),
        (["--checkpoint=tiny", "--ppl=nowhere.txt"], ["--ppl", "nowhere.txt"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--ppl_seqlen=300"], ["--ppl_seqlen 300", "256 positions"]),
        (["--checkpoint=tiny", "--ppl=short.txt"], ["--ppl_seqlen 128"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--limit=0"], ["--limit 0"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--ppl_windows=0"], ["--ppl_windows 0"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--with_dense"], ["--with_dense", "--base_model"]),
        (["--checkpoint=tiny", "--ppl=none", "--tasks=hellaswog"], ["hellaswog", "hellaswag"]),
        (["--checkpoint=tiny", "--ppl=none"], ["--tasks"]),
        (["--checkpoint=tiny", "--ppl=none", "--tasks=piqa"], ["--tasks piqa", "--data_dir"]),
        (["--checkpoint=tiny", "--data_dir=rows.jsonl"], ["--data_dir rows.jsonl: ", "rows.jsonl is a file; give a"]),
        (["--checkpoint=tiny", "--ppl=none", "--tasks=piqa", "--data_dir=cut"], ["--tasks piqa", "--data_dir cut"]),
        (["--checkpoint=tiny", "--ppl=none", "--tasks=boolq", "--data_dir=cut"], ["--tasks boolq", "--data_dir cut"]),
        (["--checkpoint=tiny", "--ppl=none", "--tasks=winogrande", "--data_dir=cut"], ["--tasks winogrande", "cut"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--num_fewshot=-1"], ["--num_fewshot -1"]),
        (["--base_model=tiny", "--sparsity=nan"], ["--sparsity nan"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--output_path=rows.jsonl/x"], ["--output_path", "rows.jsonl"]),
        (["--checkpoint=small", "--ppl=rows.jsonl"], ["--checkpoint small", "vocabulary"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--output_path=link"], ["--output_path link", "link or a device"]),
        (["--checkpoint=bad_record", "--ppl=rows.jsonl"], ["bad_record/olica_run.json"]),
        (["--checkpoint=tiny", "--ppl=rows.jsonl", "--output_path=tiny"], ["--output_path tiny", "folder"]),
    ],
)
def test_wrong_input_to_evaluation(here, capsys, stock_tasks, flags, words):
    Path("short.txt").write_text("too short")
    Path("cut").mkdir()
    Path("cut/piqa_validation.jsonl").write_text('{"goal": "re')
    Path("cut/boolq_validation.jsonl").write_text("")
    Path("cut/winogrande_xl_validation.jsonl").write_text('{"other": "fields"}\n')
    save_tiny("small", vocab_size=100)
    shutil.copytree("tiny", "bad_record")
    Path("link").symlink_to("rows.jsonl")
    Path("bad_record/olica_run.json").write_text("{")
    before = files_in(here)
    message = refused(capsys, evaluate, *flags)
    assert all(word in message for word in words), message
    assert files_in(here) == before
