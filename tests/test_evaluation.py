"""Evaluations from the command line: several measures, what cannot be measured, several processes."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import edit_config, make_llama, make_tokenizer, no_space_left, refused
from launched import end_of, environment, started
from tiny_evaluations import FLAGS, MEASURES, evaluate, fill_with_evaluation
from tokenizers import processors
from transformers import AutoTokenizer, GenerationMixin

import model_evaluate
import olica
from olica.errors import UsageError
from olica.evaluation import evaluate as evaluate_module
from olica.evaluation import measures
from olica.evaluation.paired import unpack_floats
from olica.evaluation.settings import EvaluationSettings, listed

pytestmark = pytest.mark.usefixtures("stock_tasks")
ROOT = Path(__file__).parents[1]
fill_here = fill_with_evaluation


def test_several_texts_and_tasks_in_one_call(here, capsys):
    record = evaluate(*FLAGS)
    result, printed = record["results"]["model"], capsys.readouterr().out
    assert list(result["perplexity"]) == ["one.txt", "two.txt"]
    one, two = result["perplexity"].values()
    assert one["value"] != two["value"] and one["fingerprint"] != two["fingerprint"]
    assert len(unpack_floats(one["nll_by_window"])) == one["windows"] > 10
    assert list(result["zero_shot"]["tasks"]) == ["piqa", "hellaswag", "boolq"]
    assert result["zero_shot"]["harness"].startswith("lm-eval 0.4") and record["processes"] == 1
    assert len(result["zero_shot"]["tasks"]["piqa"]["hits"]["acc_norm"]) == 5
    for words in (f"perplexity, one.txt, {one['windows']} windows of 32", "piqa acc_norm", "released script's rule"):
        assert words in printed
    assert list(record["stages"]) == ["model: read", *(f"model: {name}" for name in MEASURES)]
    assert sorted(path.name for path in here.iterdir() if path.name.startswith(".")) == []


def test_python_measures_what_the_command_line_does(here, capsys):
    expected = evaluate(*FLAGS, "--prompt=old books", "--limit=4")
    capsys.readouterr()
    settings = dict(ppl_seqlen=32, data_dir=Path("rows"), batch_size=3, prompt="old books", limit=4)
    names = dict(ppl=[Path("one.txt"), "two.txt"], tasks=("piqa", "hellaswag", "boolq"))
    done = olica.evaluate(Path("tiny"), **names, output_path="python.json", **settings)
    assert done.path == Path("python.json") and json.loads(done.path.read_text()) == done.record
    assert done.record["results"] == expected["results"]
    assert done.record["settings"] == expected["settings"] | {"output_path": "python.json"}
    assert capsys.readouterr().out == ""


def test_python_finds_a_checkpoint_as_the_command_line_does(here):
    pruning = {"model": {"name": "tiny", "source": "tiny"}, "parameters": {"before": 0}, "settings": {}}
    make_llama(num_key_value_heads=2).save_pretrained("pruned_models/tiny_sparsity-0.3")
    Path("pruned_models/tiny_sparsity-0.3/olica_run.json").write_text(json.dumps(pruning))
    with pytest.raises(UsageError, match="--base_model tiny: .* was pruned from tiny"):
        olica.evaluate(base_model="tiny", sparsity=0.3)
    with pytest.raises(UsageError, match="there is no .*tiny_sparsity-0.2; prune the model first"):
        olica.evaluate(base_model="tiny")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(batch=3), "there is no argument batch; did you mean batch_size?"),
        (dict(chekpoint=3), "there is no argument chekpoint; there are base_model, "),
        (dict(weight=3), "there is no argument weight; there are base_model, sparsity, sparsity_of, save_dir, "),
        (dict(verbose=True), "there is no argument verbose: it is a flag of the commands alone"),
        (dict(dry_run=True), "there is no argument dry_run: it is a flag of model_pruning.py and model_sweep.py alone"),
        (dict(checkpoint="tiny"), "checkpoint is the first argument"),
        (dict(batch_size=0), "--batch_size 0 must be at least 1"),
        (dict(batch_size=2.5), "--batch_size 2.5: give a whole number"),
        (dict(ppl_windows=True), "--ppl_windows True: give a whole number"),
        (dict(seed=None), "--seed None: give a whole number"),
        (dict(limit="5"), "--limit 5 must be a number of rows"),
        (dict(sparsity="some"), "--sparsity some: give a number"),
        (dict(sparsity=float("nan")), "--sparsity nan is no number"),
        (dict(dtype="int8"), "--dtype int8 is none of auto, float32"),
        (dict(device="gpu"), "--device gpu is none of auto, cpu, cuda"),
        (dict(device_map="balanced"), "--device_map balanced is none of None, auto"),
        (dict(sparsity_of="heads"), "--sparsity_of heads is none of"),
        (dict(cost="no"), "--cost no is none of False, True"),
        (dict(cost=1), "--cost 1 is none of False, True"),
        (dict(prompt=3), "--prompt 3: give a text"),
        (dict(ppl=3), "--ppl 3: give a text"),
        (dict(ppl=None), "--ppl None: give a text"),
        (dict(ppl=["one.txt", 3]), "--ppl 3: give a text"),
        (dict(ppl=[]), "--ppl none leaves nothing to measure"),
        (dict(data_dir=3), "--data_dir 3: give a text"),
        (dict(data_dir=None), "--data_dir None: give a text"),
        (dict(save_dir=None), "--save_dir None: give a text"),
        (dict(ppl=["one.txt"], output_path="tiny"), "--output_path tiny"),
    ],
)
def test_python_gets_wrong_settings_named(here, settings, words):
    with pytest.raises(UsageError) as raised:
        olica.evaluate("tiny", **settings)
    assert str(raised.value).startswith(words)


def test_python_may_give_numbers_and_paths_as_pruning_takes_them():
    given = EvaluationSettings(sparsity="0.2", batch_size="4", ppl_windows=2.0, data_dir=Path("rows"))
    assert given == EvaluationSettings(batch_size=4, ppl_windows=2, data_dir="rows")


def test_the_flags_are_the_settings():
    assert vars(model_evaluate.build_parser().parse_args([])) == asdict(EvaluationSettings()) | {"verbose": False}


def test_start_token_in_windows_and_prompts(here, monkeypatch):
    prompts = []
    monkeypatch.setattr(measures, "continuation", lambda model, subject: prompts.append(subject.prompt))
    result = evaluate(*FLAGS, "--prompt=old books", "--add_bos_token")["results"]["model"]
    plain = evaluate(*FLAGS, "--prompt=old books")["results"]["model"]
    started, unstarted = (prompt[0].tolist() for prompt in prompts)
    assert started == [make_tokenizer().bos_token_id, *unstarted]
    assert result["perplexity"]["one.txt"]["bos"] == "every window" and plain["perplexity"]["one.txt"]["bos"] == "none"
    assert result["zero_shot"]["add_bos_token"] and not plain["zero_shot"]["add_bos_token"]
    assert result["perplexity"]["one.txt"]["value"] != plain["perplexity"]["one.txt"]["value"]


def test_chat_template_in_prompts_of_tasks_alone(here, capsys):
    assert "--apply_chat_template: the tokenizer of tiny has no chat template" in refused(
        capsys, evaluate, *FLAGS, "--apply_chat_template"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained("tiny")
    record, plain = evaluate(*FLAGS, "--apply_chat_template"), evaluate(*FLAGS)
    result, without = record["results"]["model"], plain["results"]["model"]
    assert record["settings"]["apply_chat_template"] and not plain["settings"]["apply_chat_template"]
    assert result["zero_shot"]["apply_chat_template"] and not without["zero_shot"]["apply_chat_template"]
    assert result["perplexity"] == without["perplexity"]
    hashes = [scored["zero_shot"]["tasks"]["boolq"]["hash"] for scored in (result, without)]
    assert hashes[0] != hashes[1]
    done = olica.evaluate("tiny", ppl="none", tasks="boolq", data_dir="rows", apply_chat_template=True)
    assert done.record["results"]["model"]["zero_shot"]["tasks"]["boolq"]["hash"] == hashes[0]
    alone = refused(capsys, evaluate, "--checkpoint=tiny", "--ppl=one.txt", "--apply_chat_template")
    assert "--apply_chat_template is for the prompts of tasks" in alone


def test_a_path_with_a_comma(here):
    Path("one.txt").rename("one,uno.txt")
    Path("two,deux").mkdir()
    Path("two.txt").rename("two,deux/2.txt")
    names = ["one,uno.txt", "two,deux/2.txt", "three.txt"]
    assert listed(",".join(names), "--ppl") == names
    assert listed(" one,uno.txt , wikitext2", "--ppl") == ["one,uno.txt", "wikitext2"]
    measured = evaluate("--checkpoint=tiny", "--ppl=one,uno.txt", "--ppl_seqlen=32")["results"]["model"]
    assert list(measured["perplexity"]) == names[:1]


AT_ONCE = """
import datetime, sys, model_evaluate
from olica.command_line import run_command
from olica.evaluation import evaluate
class Noon(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        return cls(2026, 1, 1, 12, tzinfo=zone)
evaluate.datetime = Noon  # so that all records have one name
sys.exit(run_command(model_evaluate.build_parser(), model_evaluate.run, sys.argv[1:]))
"""


def test_evaluations_that_start_together_all_leave_what_they_measured(here, fast_python):
    """Two of them are the same, and share what a stopped one would leave."""
    pruning = {"model": {"name": "x", "source": "x"}, "parameters": {"before": make_llama().num_parameters()}}
    Path("tiny/olica_run.json").write_text(json.dumps(pruning))
    Path("tiny/README.md").write_text("# tiny\n\n## Metrics\n\nNone measured yet.\n")
    command = [fast_python, "-c", AT_ONCE, "--checkpoint=tiny", "--ppl=one.txt", "--ppl_seqlen=32"]
    calls = [[*command, f"--ppl_windows={windows}"] for windows in (2, 3, 4, 4)]
    at_work = [subprocess.Popen(call, env=environment(), stderr=subprocess.PIPE, text=True) for call in calls]
    ends = [(process.communicate(timeout=600)[1], process.returncode) for process in at_work]
    assert [status for _, status in ends] == [0] * 4, ends
    names = [f"olica_eval_20260101T120000Z{ending}.json" for ending in ("", "_2", "_3", "_4")]
    assert sorted(path.name for path in Path("tiny").glob("*olica_eval*")) == sorted(names)
    results = [json.loads((Path("tiny") / name).read_text())["results"]["model"] for name in names]
    assert sorted(result["perplexity"]["one.txt"]["windows"] for result in results) == [2, 3, 4, 4]
    for windows in (2, 3, 4):
        assert Path("tiny/README.md").read_text().count(f"perplexity on one.txt, {windows} windows of 32") == 1


def test_two_models_are_compared_in_one_dtype(here, capsys):
    """That of the pruned one, unless another is asked for."""
    make_llama(num_key_value_heads=2).bfloat16().save_pretrained("pruned")
    make_tokenizer().save_pretrained("pruned")
    flags = ["--checkpoint=pruned", "--base_model=tiny", "--with_dense", "--ppl=one.txt", "--ppl_seqlen=32"]
    record = evaluate(*flags)
    assert record["dtype"] == "bfloat16" and record["settings"]["dtype"] == "auto"
    dense, pruned = record["results"]["dense"], record["results"]["pruned"]
    assert dense["dtype"] == pruned["dtype"] == "bfloat16"
    assert dense["perplexity"] == pruned["perplexity"], "the same weights once rounded"
    assert dense["cache_bytes_per_token"] == pruned["cache_bytes_per_token"]
    assert "both models ran in bfloat16, as the pruned one is stored" in capsys.readouterr().out
    asked = evaluate(*flags, "--dtype=float32")
    assert {result["dtype"] for result in asked["results"].values()} == {asked["dtype"]} == {"float32"}
    assert "both models" not in capsys.readouterr().out
    assert evaluate(*flags[:1], *flags[3:])["dtype"] == "auto"


def test_rows_by_their_share(here):
    record = evaluate(*FLAGS, "--limit=0.5")
    zero_shot = record["results"]["model"]["zero_shot"]
    assert record["settings"]["limit"] == zero_shot["limit"] == 0.5
    assert {scores["samples"] for scores in zero_shot["tasks"].values()} == {3}, "of five"


@pytest.mark.parametrize("limit", ["1.5", "1.0", "-0.1", "0", "-3", "nan", "inf"])
def test_a_limit_is_a_number_of_rows_or_a_share(here, capsys, limit):
    assert "must be a number of rows without a point, or a share of them below 1" in refused(
        capsys, evaluate, *FLAGS, f"--limit={limit}"
    )


def test_a_task_that_generates_more_than_the_model_has_positions(here, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_module, "check_tasks", lambda tasks, protocol: {"piqa": 256})
    message = refused(capsys, evaluate, *FLAGS)
    words = "--tasks piqa, which generates 256 tokens from a prompt: 257 tokens do not fit in the 256 positions of tiny"
    assert message.startswith(words)
    monkeypatch.setattr(evaluate_module, "check_tasks", lambda tasks, protocol: {"piqa": 255})
    evaluate(*FLAGS)


@pytest.mark.parametrize("generated", [{}, {"piqa": 5}])
def test_a_tokenizer_without_the_tokens_that_the_harness_needs(here, capsys, monkeypatch, generated):
    monkeypatch.setattr(evaluate_module, "check_tasks", lambda tasks, protocol: generated)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    if not generated:
        tokenizer.bos_token = None
    tokenizer.save_pretrained("tiny")
    assert "--checkpoint tiny: its tokenizer has no end token" in refused(capsys, evaluate, *FLAGS)


def given_to(monkeypatch) -> list[dict]:
    """What the model is asked to continue, in every later call."""
    given, generate = [], GenerationMixin.generate
    monkeypatch.setattr(GenerationMixin, "generate", lambda self, **k: given.append(k) or generate(self, **k))
    return given


def test_inputs_that_the_model_does_not_take(here):
    """A tokenizer that says it gives them, as those made from another family's do."""
    plain = evaluate(*FLAGS, "--prompt=old books")["results"]
    settings = json.loads(Path("tiny/tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    Path("tiny/tokenizer_config.json").write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained("tiny")("old").keys() == set(settings["model_input_names"])
    assert evaluate(*FLAGS, "--prompt=old books")["results"] == plain


@pytest.mark.parametrize(("template", "flags"), [("<s> $A", []), ("$A </s>", []), ("<s> $A </s>", ["--add_bos_token"])])
def test_a_prompt_has_no_token_that_was_not_asked_for(here, monkeypatch, template, flags):
    tokenizer, given = make_tokenizer(), given_to(monkeypatch)
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=added)
    tokenizer.save_pretrained("tiny")
    record = evaluate("--checkpoint=tiny", "--ppl=none", "--cost", "--prompt=old books", *flags)
    letters = [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in "old books"]
    assert given[-1]["input_ids"].tolist() == [[tokenizer.bos_token_id] * len(flags) + letters]
    assert record["results"]["model"]["continuation"].startswith("old books")


def test_cost_alone(here, capsys):
    result = evaluate("--checkpoint=tiny", "--ppl=none", "--cost")["results"]["model"]
    cost, model = result["cost"], make_llama(num_key_value_heads=2)
    assert 0 < cost["decode"]["median_s"] <= cost["decode"]["max_s"] < 10
    assert 0 < cost["prefill"]["min_s"] <= cost["prefill"]["median_s"] < 10
    assert cost["peak_memory"]["host_bytes"] > 1e8 and cost["protocol"]["prompt_tokens"] == 128
    assert result["parameters"]["total"] == model.num_parameters()
    assert result["cache_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert "seconds for a new token" in capsys.readouterr().out


def test_a_device_map_gives_the_same_figures(here):
    spread = evaluate(*FLAGS, "--device_map=auto")["results"]["model"]
    plain = evaluate(*FLAGS)["results"]["model"]
    assert spread["perplexity"] == plain["perplexity"] and spread["zero_shot"] == plain["zero_shot"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ppl=one.txt,one.txt"], "--ppl one.txt,one.txt: a name is there twice"),
        (["--ppl=one.txt,nowhere.txt"], "nowhere.txt"),
        (["--ppl=none", "--tasks=piqa,piqa"], "--tasks piqa,piqa"),
        (["--ppl=none", "--tasks=winogrande", "--data_dir=rows"], "winogrande_xl_validation.jsonl"),
        (["--ppl=none", "--tasks=piqa,winogrand", "--data_dir=rows"], "nearest: winogrande"),
        (["--ppl=none", "--tasks=qqqqqq", "--data_dir=rows"], "nor one of a name near it"),
        (["--ppl=none", "--tasks=lambada_openai", "--data_dir=rows"], "piqa, boolq can have rows there"),
        (["--ppl=none", "--tasks=winogrande,lambada_openai", "--data_dir=rows"], "winogrande_xl_validation.jsonl"),
        (["--ppl=,"], "--ppl , leaves nothing to measure"),
        (["--ppl=none", "--tasks=,"], "leaves nothing to measure"),
        (["--ppl=one.txt", f"--prompt={'x' * 240}"], "--prompt: 270 tokens do not fit in the 256 positions of tiny"),
        (["--ppl=one.txt", "--prompt=\udcff"], "--prompt is not in the encoding of the system"),
        (["--ppl=one.txt", "--device_map=auto", "--device=cpu"], "--device_map"),
    ],
)
def test_what_cannot_be_measured_is_named(here, capsys, flags, words):
    assert words in refused(capsys, evaluate, "--checkpoint=tiny", *flags)
    assert not Path("eval.json").exists()


def test_a_tokenizer_beyond_the_models_vocabulary(here, capsys):
    make_llama(vocab_size=100).save_pretrained("tiny")
    words = f"its tokenizer gives the token {len(make_tokenizer()) - 1}, but the model's vocabulary ends at 99"
    assert words in refused(capsys, evaluate, "--checkpoint=tiny", "--ppl=none", "--tasks=piqa", "--data_dir=rows")
    assert not list(here.glob(".*"))


def test_settings_that_running_alone_meets(here, capsys):
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope = factors | {"factor": 16.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}
    edit_config(here / "tiny", rope_parameters=rope)
    words = "--checkpoint tiny: its configuration describes no model that can be run ("
    assert words in refused(capsys, evaluate, "--checkpoint=tiny", "--ppl=one.txt", "--ppl_seqlen=32")


def test_a_full_disk_ends_in_a_sentence(here, capsys, monkeypatch):
    monkeypatch.setattr(Path, "write_text", no_space_left)
    said = refused(capsys, evaluate, "--checkpoint=tiny", "--ppl=one.txt", "--ppl_seqlen=32")
    assert "eval.json" in said and "No space left on device" in said and "make room" in said
    assert not list(here.glob("*eval.json*"))


def test_a_damaged_record_of_the_dense_model_is_named(here, capsys):
    record = {"model": {"name": 7, "source": "tiny"}, "parameters": {"before": 1}}
    Path("tiny/olica_run.json").write_text(json.dumps(record))
    said = refused(capsys, evaluate, "--checkpoint=tiny", "--with_dense", "--ppl=one.txt", "--ppl_seqlen=32")
    assert said.startswith("tiny/olica_run.json is not the record of a pruning (")


def test_models_too_short_for_the_cost(here, capsys):
    make_llama(max_position_embeddings=100).save_pretrained("tiny")
    assert "--cost: 160 tokens" in refused(capsys, evaluate, "--checkpoint=tiny", "--ppl=none", "--cost")


LAUNCHED = [str(ROOT / "model_evaluate.py"), *FLAGS, "--device=cpu", "--output_path=two.json"]


@pytest.mark.parametrize(("flag", "words"), [("--cost", "--cost"), ("--limit=1", "2 processes"), ("--ppl=no", "--ppl")])
def test_what_several_processes_cannot_do_is_said_once(here, fork_server, flag, words):
    ended = end_of(started(fork_server, [*LAUNCHED, flag]))
    errors = "".join(one.errors for one in ended)
    assert all(one.status for one in ended), errors
    assert errors.count("model_evaluate.py: error: ") == 1, errors
    assert words in errors.split("model_evaluate.py: error: ")[1].splitlines()[0]
    assert not Path("two.json").exists()


def test_two_processes_give_the_figures_of_one(here, fast_python):
    launch = [fast_python, "-m", "accelerate.commands.accelerate_cli", "launch", "--no_python"]
    command = [*launch, "--multi_gpu", "--num_processes=2", "--num_machines=1", fast_python, *LAUNCHED]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("record two.json") == 1
    two, one = json.loads(Path("two.json").read_text()), evaluate(*FLAGS)
    assert two["processes"] == 2
    # The main process has three of the five rows, of two or four endings, and four of the eight batches of windows.
    shown = {name: re.findall(rf"{name}:.*?/(\d+)", done.stderr) for name in ("log-likelihoods", "perplexity")}
    assert {name: set(totals) for name, totals in shown.items()} == {
        "log-likelihoods": {"6", "12"},
        "perplexity": {"4"},
    }
    ours, alone = two["results"]["model"], one["results"]["model"]
    for text, measured in alone["perplexity"].items():
        assert ours["perplexity"][text]["value"] == pytest.approx(measured["value"], rel=1e-6)
        assert ours["perplexity"][text]["windows"] == measured["windows"]
    for task, scores in alone["zero_shot"]["tasks"].items():
        assert ours["zero_shot"]["tasks"][task]["hits"] == scores["hits"]
        assert ours["zero_shot"]["tasks"][task]["hash"] == scores["hash"]
    assert ours["zero_shot"]["averages"] == alone["zero_shot"]["averages"]
