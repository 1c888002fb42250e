"""The scripts of tables and figures, run on a tiny model."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import edit_config, make_tokenizer, save_tiny
from tiny_tasks import ROWS, WORDS, write_rows

from olica.report.plots import FIGURES
from olica.report.tables import TABLES

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def here(tmp_path):
    """A tiny model of eight layers, texts and rows of the seven tasks."""
    save_tiny(tmp_path / "tiny", num_key_value_heads=2, num_hidden_layers=8)
    for stem, row in ROWS.items():
        write_rows(tmp_path / "data", stem, [row | {"idx": index} for index in range(3)])
    for seed, name in enumerate(("wikitext2_raw_test", "bookcorpus", "c4_train")):
        drawn = torch.randint(len(WORDS), (9, 90), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [{"text": " ".join(WORDS[index] for index in line)} for line in drawn]
        write_rows(tmp_path / "data", name, rows)
    return tmp_path


def run(here: Path, python: str, script: str, **variables: str) -> str:
    """What a script prints that has to succeed."""
    environment = {
        "MODEL": str(here / "tiny"),
        "DATASETS": "bookcorpus",
        "NUM_SAMPLES": "8",
        "DATA_DIR": str(here / "data"),
        "DEVICE": "cpu",
        "LIMIT": "2",
        "WINDOWS": "3",
        "RESULTS": str(here / "results"),
        "SAVE_DIR": str(here / "checkpoints"),
        "PYTHON": python,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", str(SCRIPTS / script)], env=os.environ | environment | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_table_is_made_once(here, fast_python):
    printed = run(here, fast_python, "table6.sh")
    results = here / "results/tiny"
    names = {path.parent.relative_to(results).as_posix() for path in results.rglob("flags")}
    assert names == {"tables/dense", "tables/sparsity-0.2", "tables/sparsity-0.2_olica-ond"}
    assert "| Fast-OND | perplexity" in printed and "the first 2 rows of each" in printed
    record = json.loads((results / "tables/sparsity-0.2_olica-ond/pruning.json").read_text())
    assert record["settings"]["recipe"] == "olica-ond" and record["calibration"]["ids"] == [8, 128]
    checkpoints = sorted(path.name for path in (here / "checkpoints").glob("*/*/config.json"))
    assert len(checkpoints) == 2
    times = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    again = run(here, fast_python, "table6.sh")
    assert again.count("is recorded") == 3
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json")} == times


# Takes the place of Python: notes its call, and makes the files that the real one would. FAIL names a script to end.
STUB = """#!/usr/bin/env bash
[ "$1" != -c ] || exec "$REAL" "$@"
echo "$@" >> "$CALLS"
script=$1 seed=$RANDOM; shift
while [ $# -gt 0 ]; do
    case $1 in
        --save_dir) mkdir -p "$2/x"; echo $seed > "$2/x/olica_run.json" ;;
        --output_path)
            mkdir -p "$(dirname "$2")"
            if [ "$script" = benchmarks/lora.py ]; then
                mkdir "$2"; echo $seed > "$2/lora_run.json"
                [ ! -f "$checkpoint/olica_run.json" ] || cp "$checkpoint/olica_run.json" "$2"
            else
                echo "$seed" > "$2"
            fi ;;
        --checkpoint) checkpoint=$2 ;;
    esac
    shift
done
[ "$script" != "${FAIL:-}" ]
"""


class Stubbed:
    """The scripts without what they call."""

    def __init__(self, folder: Path, python: str):
        self.folder, self.python = folder, python
        (folder / "stub").write_text(STUB)
        (folder / "stub").chmod(0o755)

    def __call__(self, script: str, **variables: str) -> list[str]:
        """Names of the scripts that were called, with what was pruned to; those of reports left out."""
        calls = self.folder / "calls"
        calls.write_text("")
        paths = {"RESULTS": "results", "SAVE_DIR": "checkpoints", "PYTHON": "stub", "CALLS": "calls"}
        environment = os.environ | {name: str(self.folder / path) for name, path in paths.items()}
        environment |= {"REAL": self.python, "MODEL": "m"}
        command = ["bash", str(SCRIPTS / script)]
        self.done = subprocess.run(command, env=environment | variables, capture_output=True, text=True)
        assert (self.done.returncode == 0) == ("FAIL" not in variables), self.done.stderr
        found = [line.split() for line in calls.read_text().splitlines()]
        return [
            f"prune {line[line.index('--sparsity') + 1]}" if line[0] == "model_pruning.py" else "evaluate"
            for line in found
            if "report.py" not in line[0]
        ]

    @property
    def checkpoints(self) -> int:
        return len(list((self.folder / "checkpoints").glob("*/x/olica_run.json")))


@pytest.fixture
def stubbed(tmp_path, fast_python):
    return Stubbed(tmp_path, fast_python)


def test_how_many_mlps_are_corrected_goes_by_the_sparsity_however_it_is_written():
    sparsities = ["0.05", "0.2", ".20", "0.25", "0.26", "0.4", "0.41", "0.6"]
    program = f"source scripts/common.sh; for sparsity in {' '.join(sparsities)}; do mlp_num $sparsity; done"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "6", "6", "6", "12", "12", "16", "16"]


def test_what_is_recorded_by_the_same_flags_is_not_run_again(stubbed):
    assert stubbed("table1.sh") == ["evaluate", "prune 0.25", "evaluate", "prune 0.33", "evaluate"]
    assert stubbed("table1.sh") == [] and stubbed.done.stdout.count("is recorded") == 3
    assert stubbed("table1.sh", DATA_DIR="elsewhere", DEVICE="cpu", BATCH_SIZE="1") == []
    assert stubbed("table1.sh", LIMIT="9") == ["evaluate"] * 3, "checkpoints stay"
    assert stubbed("table2.sh", LIMIT="9") == ["prune 0.2", "evaluate"], "which tables share"
    assert stubbed("table1.sh", LIMIT="9", DATASETS="c4") == ["prune 0.25", "evaluate", "prune 0.33", "evaluate"]
    assert stubbed("table1.sh", LIMIT="9", MODEL="other/m").count("evaluate") == 3, "of another model of that name"


def test_what_is_recorded_of_more_texts_is_not_run_again_for_fewer(stubbed):
    few = {"RECIPES": "olica", "SPARSITIES": "0.2"}
    assert stubbed("methods.sh", PPL="a,b.c,d", **few) == ["evaluate", "prune 0.2", "evaluate"]
    for texts in ("a,b.c,d", "a,b.c", "a"):
        assert stubbed("methods.sh", PPL=texts, **few) == []
    for texts in ("b.c", "a,b", "a,b.c,d,e"):  # first another text, part of a name, one text more
        assert stubbed("methods.sh", PPL=texts, **few) == ["evaluate"] * 2
    assert stubbed("methods.sh", PPL="a", WINDOWS="9", **few) == ["evaluate"] * 2


@pytest.mark.parametrize("file", ["evaluation.json", "pruning.json"])
def test_a_lost_record_is_made_again(stubbed, file):
    stubbed("table1.sh")
    (stubbed.folder / "results/m/tables/sparsity-0.33" / file).unlink()
    assert stubbed("table1.sh") == ["evaluate"]


@pytest.mark.parametrize("script", ["model_evaluate.py", "model_pruning.py"])
def test_what_a_stopped_call_left_never_counts(stubbed, script):
    """Even where it had written its record, and the flags of an older one are those that are asked for."""
    first = stubbed("table1.sh")
    stubbed("table1.sh", LIMIT="9", NUM_SAMPLES="9", FAIL=script)
    again = stubbed("table1.sh")
    assert again == (["evaluate"] if script == "model_evaluate.py" else ["evaluate", "prune 0.25", "evaluate"])
    assert len(first) == 5 and stubbed("table1.sh") == []


def test_figures_keep_no_checkpoints_but_those_of_tables(stubbed):
    stubbed("table1.sh")
    assert stubbed.checkpoints == 2
    calls = stubbed("figure3.sh", NUMBERS="0 12")
    assert calls == ["prune 0.33", "evaluate", "evaluate"] and stubbed.checkpoints == 2
    assert stubbed("figure3.sh", NUMBERS="0 12 4", KEEP="yes") == ["prune 0.33", "evaluate"]
    assert stubbed.checkpoints == 3


def test_the_papers_two_commands_are_run_once(stubbed):
    assert stubbed("pruning_and_eval_7b.sh", MODEL="13b", LIMIT="9", DEVICE="cpu") == ["prune 0.2", "evaluate"]
    pruning, evaluation = (stubbed.folder / "calls").read_text().splitlines()
    assert "--device cpu" in pruning and "--limit 9" in evaluation and "--device cpu" in evaluation
    for model, sparsity, name in (("7b", "0.2", "7b_sparsity-0.2"), ("other/n", "0.50", "other--n_sparsity-0.5")):
        settings = {"MODEL": model, "SPARSITY": sparsity}
        (stubbed.folder / "checkpoints" / name).mkdir()
        assert stubbed("pruning_and_eval_7b.sh", LIMIT="9", **settings) == ["evaluate"], "as it is pruned"
        assert stubbed("pruning_and_eval_7b.sh", LIMIT="9", **settings) == []
        assert "remove it to measure again" in stubbed.done.stdout
        assert stubbed("pruning_and_eval_7b.sh", **settings) == ["evaluate"], "nine rows are not all"
    assert stubbed("pruning_and_eval_13b.sh", MODEL="other/m") == ["prune 0.2", "evaluate"]


def test_a_figure_that_was_stopped_leaves_no_checkpoint(stubbed):
    stubbed("figure3.sh", NUMBERS="0", FAIL="model_evaluate.py")
    assert stubbed.checkpoints == 1
    assert stubbed("figure3.sh", NUMBERS="0") == ["evaluate"] and stubbed.checkpoints == 0
    stubbed("figure3.sh", NUMBERS="12", FAIL="model_evaluate.py")
    assert stubbed("table1.sh").count("evaluate") == 3 and stubbed("figure3.sh", NUMBERS="12") == ["evaluate"]
    assert stubbed.checkpoints == 2, "a table's stay"


def test_both_methods_of_table_6_have_as_many_calibrated_mlps(stubbed):
    stubbed("table6.sh", MLP_NUM="2")
    calls = [line for line in (stubbed.folder / "calls").read_text().splitlines() if "model_pruning.py" in line]
    assert len(calls) == 2 and all("--mlp_num 2" in line for line in calls)


def test_one_label_is_one_model(stubbed):
    stubbed("table3.sh", MODEL="a b", LABEL="x", FAIL="nothing")
    assert "LABEL=x cannot be the folder of two models" in stubbed.done.stderr and stubbed.done.returncode == 2


def test_decoding_is_timed_once_for_all_methods_of_a_size(stubbed):
    def timed(recipes: str) -> list[str]:
        stubbed("methods.sh", RECIPES=recipes, SPARSITIES="0.2 0.33", TIMED="yes")
        calls = [line.split() for line in (stubbed.folder / "calls").read_text().splitlines()]
        return [" ".join(call[1:]) for call in calls if call[0] == "benchmarks/generation_speed.py"]

    calls = timed("olica flap")
    assert len(calls) == 2
    for sparsity in ("0.2", "0.33"):
        (call,) = (call for call in calls if call.endswith(f"generation_speed_{sparsity}.json"))
        assert call.count("/x/ ") == 2 and f"flap-sparsity-{sparsity}-seed-0/x/" in call
        assert f"olica-sparsity-{sparsity}-seed-0-mlp_num" in call and call.startswith("--dense m --checkpoints ")
    assert timed("olica flap") == []
    assert len(timed("olica")) == 2, "of other models"


def test_recipes_are_calibrated_on_each_text_alone_and_on_all(stubbed):
    stubbed("texts.sh", RECIPES="olica-plus", NUM_SAMPLES="12", DATA_DIR="d", SPARSITY="0.1")
    calls = [line for line in (stubbed.folder / "calls").read_text().splitlines() if line.startswith("model_pruning")]
    texts = {call.split("--datasets ")[1].split()[0]: call.split("--num_samples ")[1].split()[0] for call in calls}
    assert list(texts.values()) == ["12"] * 5 + ["2"] and stubbed.checkpoints == 0
    *single, mixed = texts
    assert mixed.split("+") == single and "pysource" in single
    names = {path.parent.name for path in (stubbed.folder / "results/m/texts").glob("*/pruning.json")}
    assert {"code_olica-plus", "all_olica-plus"} < names and len(names) == 6
    assert stubbed("texts.sh", RECIPES="olica-plus", NUM_SAMPLES="12", DATA_DIR="d", SPARSITY="0.1") == []


def test_models_with_fewer_tokens_are_pruned_to_the_size_of_the_whole_one(stubbed):
    def thinned(size: int, after: int) -> None:
        folder = stubbed.folder / f"checkpoints/m_vocabulary-{size}-{counted}"
        folder.mkdir(parents=True)
        record = {"tokens": {"before": 500, "after": size}, "parameters": {"before": 1000, "after": after}}
        (folder / "olica_vocabulary.json").write_text(json.dumps(record, indent=1))

    counted = (
        subprocess.run(["cksum"], input=b"m text.jsonl", capture_output=True, check=True).stdout.split()[0].decode()
    )
    thinned(400, 900)
    thinned(100, 750)  # which is less than four fifths of the model
    settings = {"SIZES": "400 100", "SPARSITIES": "0.2 0.4", "DATASETS": "text.jsonl"}
    assert stubbed("vocabulary.sh", **settings) == [
        *("evaluate", "prune 0.2", "evaluate", "prune 0.4", "evaluate"),
        *("evaluate", f"prune {1 - 800 / 900:.6f}", "evaluate", f"prune {1 - 600 / 900:.6f}", "evaluate"),
        *("evaluate", f"prune {1 - 600 / 750:.6f}", "evaluate"),
    ]
    assert "with 100 tokens it is smaller than that already" in stubbed.done.stdout
    assert stubbed("vocabulary.sh", **settings) == []
    stubbed("vocabulary.sh", **settings | {"SIZES": "300", "COUNTED": "more", "FAIL": "model_export.py"})
    (call,) = [line for line in (stubbed.folder / "calls").read_text().splitlines() if "model_export.py" in line]
    assert "m --vocab_size 300 --datasets more" in call


def test_the_start_token_is_in_prunings_and_evaluations(stubbed):
    stubbed("methods.sh", RECIPES="olica", SPARSITIES="0.2", START_TOKEN="yes")
    calls = (stubbed.folder / "calls").read_text().splitlines()
    assert len(calls) == 4 and sum(" --add_bos_token " in f"{call} " for call in calls) == 3  # all but the report
    assert stubbed("methods.sh", RECIPES="olica", SPARSITIES="0.2") == ["evaluate", "prune 0.2", "evaluate"]


def test_a_comparison_makes_what_it_measures_once(stubbed):
    def calls(**variables: str) -> list[str]:
        stubbed("compare.sh", SPARSITIES="0.2", **variables)
        lines = (stubbed.folder / "calls").read_text().splitlines()
        return [Path(line.split()[0]).stem for line in lines if "report.py" not in line]

    asked = ["model_evaluate", "model_evaluate", "chat"]
    retrained, rounded = ["lora", *asked], ["quantised", "quantised", "chat"]
    assert calls() == [*asked, *retrained, *rounded, "model_pruning", *asked, *retrained, *rounded]
    assert calls() == []
    folder = stubbed.folder / "results/m/compare"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.json")}
    kinds = [f"{kind}{name}" for kind in ("", "lora/", "four-bits/") for name in ("dense", "sparsity-0.2")]
    of_runs = {(name, "evaluation") for name in kinds} | {(name, "pruning") for name in kinds if "dense" not in name}
    of_runs |= {(name, "lora") for name in kinds if "lora" in name}
    expected = {f"{length}/{name}/{record}.json" for length in (128, 2048) for name, record in of_runs}
    assert found == expected | {f"chat/{name}/chat.json" for name in kinds}
    shutil.rmtree(stubbed.folder / "checkpoints")
    assert calls() == [], "checkpoints are made where they are measured"
    (folder / "chat/lora/sparsity-0.2/chat.json").unlink()
    assert calls() == ["model_pruning", "lora", "chat"]
    assert calls(LORA_SAMPLES="9") == [*retrained, *retrained]
    assert calls(LORA_SAMPLES="9", DATASETS="c4", FOUR_BITS="no", CHAT="no") == [
        *retrained[:3], "model_pruning", *asked[:2], *retrained[:3]
    ]  # fmt: skip
    assert calls(LORA_SAMPLES="9", DATASETS="c4", FOUR_BITS="no", CHAT="no", SMALLER="s") == asked[:2]


def test_what_a_comparison_asks_for(stubbed):
    stubbed("compare.sh", SPARSITIES="0.33", WINDOWS="250", EVALUATION_BATCH_SIZE="7", FOUR_BITS="no")
    lines = (stubbed.folder / "calls").read_text().splitlines()
    (pruning,) = (line for line in lines if line.startswith("model_pruning"))
    assert "--recipe olica-plus --sparsity 0.33" in pruning and "--sparsity_of layers" in pruning
    short, long = (line for line in lines if line.startswith("model_evaluate.py --checkpoint m "))
    assert "--ppl_seqlen 128 --ppl_windows 250" in short and "--batch_size 7" in short
    assert "--ppl_seqlen 2048 --ppl_windows 16" in long and "--batch_size 1 " in long
    _, training = (line for line in lines if line.startswith("benchmarks/lora.py"))
    assert f"--checkpoint {stubbed.folder}/checkpoints/m-recipe-olica-plus-sparsity-0.33-seed-0/x/" in training


@pytest.mark.slow
def test_a_comparison_of_a_model_that_chats(here, fast_python):
    edit_config(here / "tiny", max_position_embeddings=2048)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(here / "tiny")
    printed = run(here, fast_python, "compare.sh", SPARSITIES="0.2", FOUR_BITS="no", PPL="wikitext2")
    _, _, *rows = (line.split("|") for line in printed.splitlines() if line.startswith("|"))
    names = [row[2].strip() for row in rows]
    assert names == ["dense", "dense, after LoRA", "olica-plus", "olica-plus, after LoRA"]
    assert all(cell.strip() for row in rows[2:] for cell in row[1:-1]), "nothing is left out"
    sizes = [int(row[3].replace(",", "")) for row in rows]
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3]


@pytest.mark.slow
def test_figures_keep_no_checkpoints(here, fast_python):
    printed = run(here, fast_python, "figure3.sh", NUMBERS="0 2", SPARSITY="0.2")
    assert str(here / "results/tiny/figure3.png") in printed
    assert (here / "results/tiny/figure3.png").stat().st_size > 5000
    assert not list((here / "checkpoints").rglob("*.safetensors"))
    assert "figure2.png" in run(here, fast_python, "figure2.sh", LAYERS="0,7")
    flags = ["--results", str(here / "results"), "--output_path", str(here / "RESULTS.md")]
    subprocess.run([fast_python, str(SCRIPTS / "report.py"), *flags], check=True, capture_output=True)
    text = (here / "RESULTS.md").read_text()
    assert "## tiny" in text and "(results/tiny/figure3.png)" in text and "(results/tiny/figure2.png)" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["table2", "--only=tiny"], "table2: the runs that it shows are not recorded"),
        (["table2", "--only=typo"], "--only typo: recorded in"),
        (["--only=tiny"], "--only goes with one table or figure"),
        (["--results=nowhere"], "--results nowhere: nothing is recorded there"),
    ],
)
def test_what_is_not_recorded_is_named(tmp_path, fast_python, flags, words):
    (tmp_path / "tiny/figure2").mkdir(parents=True)
    (tmp_path / "tiny/figure2/flags").write_text("flags\n")
    command = [fast_python, str(SCRIPTS / "report.py"), f"--results={tmp_path}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "RESULTS.md").exists()


@pytest.mark.parametrize("name", [*TABLES, *FIGURES])
def test_every_table_and_figure_has_a_script_that_says_what_it_takes(name):
    head = (SCRIPTS / f"{name}.sh").read_text().split("source ")[0]
    number = re.sub(r"\D", "", name)
    assert head.startswith(f"#!/usr/bin/env bash\n# {name.capitalize().rstrip(number)} {number}: ")
    for words in ("# Command: ", "# Expected (paper): ", "# Memory and time: ", "MODEL=smollm2"):
        assert words in head, words


def test_scripts_are_sound_shell():
    for path in SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("wants shellcheck")
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS.glob("*.sh"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flags", [["--layers=0,8"], ["--layers=a"]])
def test_layers_that_the_model_has_not(here, fast_python, flags):
    command = [fast_python, str(SCRIPTS / "singular_values.py"), f"--base_model={here / 'tiny'}", *flags]
    done = subprocess.run([*command, f"--output_path={here / 'x.json'}"], capture_output=True, text=True)
    assert done.returncode == 2 and "give indices from 0 to 7" in done.stderr and not (here / "x.json").exists()
