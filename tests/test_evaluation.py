"""Run with: pytest tests/test_evaluation.py."""

import gzip
import json
import math
import os

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer
from tokenizers import processors

from olica import evaluation
from olica.cost import peak_memory, reset_peak_memory
from olica.errors import UsageError
from olica.evaluation import perplexity

TASKS = ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "boolq"]

CHOICES = {"text": ["a wet stone", "the sun", "ice"], "label": ["A", "B", "C"]}
SCIENCE = {"id": "1", "question": "What warms the sea?", "choices": CHOICES, "answerKey": "B"}
ACTIVITY = {"ind": 1, "activity_label": "Baking", "source_id": "x", "split": "val", "split_type": "indomain"}

# One row per task, in the fields of its data set, and the prompt that lm-eval's stock task makes of it.
ROWS = {
    "openbookqa_main_test": {
        "id": "1",
        "question_stem": "The sea is warmed by",
        "choices": CHOICES,
        "answerKey": "B",
    },
    "arc_easy_test": SCIENCE,
    "arc_challenge_test": SCIENCE | {"question": "What cools the sea?", "answerKey": "C"},
    "winogrande_xl_validation": {
        "sentence": "The cup did not fit the box as _ was wide.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "hellaswag_validation": ACTIVITY
    | {
        "ctx_a": "A man opens an oven.",
        "ctx_b": "he",
        "ctx": "A man opens an oven. he",
        "endings": ["takes the [step] bread.", "sings.", "is an oven.", "leaves through it."],
        "label": "0",
    },
    "piqa_validation": {"goal": "Dry a cup.", "sol1": "Wipe it.", "sol2": "Fill it.", "label": 0},
    "boolq_validation": {"question": "is ice cold", "passage": "Ice -- Ice is cold.", "idx": 0, "label": 1},
}
PROMPTS = [
    "The sea is warmed by the sun",
    "Question: What warms the sea?\nAnswer: the sun",
    "Question: What cools the sea?\nAnswer: ice",
    "The cup did not fit the box as the cup was wide.",
    "Baking: A man opens an oven. He takes the bread.",
    "Question: Dry a cup.\nAnswer: Wipe it.",
    "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer: yes",
]


@pytest.fixture
def bos_tokenizer():
    """The byte tokenizer, made to put <s> in front of every text, as LLaMA's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def windows():
    """24 windows of 32 random tokens."""
    return torch.randint(3, 259, (24, 32), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def seen_ids():
    """Collects every sequence of token ids a model is given; attach it with `register_forward_pre_hook`."""

    class Recorder(list):
        def __call__(self, module, args, kwargs):
            self.extend((args[0] if args else kwargs["input_ids"]).tolist())

    return Recorder()


def write_rows(folder, stem, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def window_nll(model, window):
    """Mean negative log-likelihood of one window (T,), from the logits in float64."""
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double().numpy()
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (log_sum - logits[np.arange(len(logits)), window[1:].numpy()]).mean()


def score(model, tokenizer, tasks, data_dir, **settings):
    settings = {"num_fewshot": 0, "batch_size": 3, "limit": None} | settings
    return evaluation.zero_shot(model, tokenizer, tasks, data_dir=data_dir, **settings)


# ---------------------------------------------------------------------------------------------- perplexity


def test_windows_are_slices_of_the_whole_text(tokenizer):
    text = "one two three four five six"
    ids = [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]
    windows = evaluation.token_windows(tokenizer, text, 10)
    assert windows.dtype == torch.long
    assert windows.tolist() == [ids[:10], ids[10:20]]  # 27 bytes: a tail of 7 is dropped
    assert evaluation.token_windows(tokenizer, text, 10, limit=1).tolist() == [ids[:10]]
    assert evaluation.token_windows(tokenizer, text, 9).shape == (3, 9)  # no tail to drop


def test_windows_hold_the_one_token_that_the_tokenizer_adds(bos_tokenizer):
    windows = evaluation.token_windows(bos_tokenizer, "abcdefghijk", 4)
    assert windows[0, 0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.decode(windows.flatten()[1:]) == "abcdefghijk"


def test_text_longer_than_the_context_is_no_warning(tokenizer, caplog):
    tokenizer.model_max_length = 8
    evaluation.token_windows(tokenizer, "a" * 100, 8)
    assert not caplog.records


def test_text_too_short_for_a_window(tokenizer):
    with pytest.raises(UsageError, match="--ppl_seqlen 128: the text has only 5 tokens"):
        evaluation.token_windows(tokenizer, "abcde", 128)


def test_window_too_short_to_predict(tokenizer):
    with pytest.raises(UsageError, match="--ppl_seqlen 1"):
        evaluation.token_windows(tokenizer, "abcde", 1)


def test_perplexity_is_that_of_the_model_loss(grouped_llama, windows):
    with torch.no_grad():
        losses = [grouped_llama(window[None], labels=window[None]).loss.item() for window in windows]
    result = evaluation.perplexity(grouped_llama, windows, batch_size=5)
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.mean_nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert (result.windows, result.seqlen, result.predictions) == (24, 32, 24 * 31)


def test_log_softmax_is_float32_in_a_bfloat16_model(grouped_llama, windows):
    model = grouped_llama.bfloat16()
    expected = np.mean([window_nll(model, window) for window in windows])
    # In bfloat16 the mean would be off by more than 1e-3.
    assert evaluation.perplexity(model, windows, batch_size=1).mean_nll == pytest.approx(expected, rel=1e-6)


def test_standard_error_is_the_delta_method(grouped_llama, windows):
    means = np.array([window_nll(grouped_llama, window) for window in windows])
    result = evaluation.perplexity(grouped_llama, windows, batch_size=4)
    expected = np.exp(means.mean()) * means.std(ddof=1) / np.sqrt(24)
    assert result.standard_error == pytest.approx(expected, rel=1e-4)
    # A jackknife, which knows nothing of the delta method, comes out near it.
    left_out = np.array([np.exp(np.delete(means, i).mean()) for i in range(24)])
    jackknife = np.sqrt(23 / 24 * ((left_out - left_out.mean()) ** 2).sum())
    assert result.standard_error == pytest.approx(jackknife, rel=0.05)


def test_one_window_has_no_standard_error(grouped_llama, windows):
    assert evaluation.perplexity(grouped_llama, windows[:1], batch_size=4).standard_error is None


def test_uniform_model_has_the_size_of_the_vocabulary(windows):
    model = make_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = evaluation.perplexity(model, windows, batch_size=8)
    assert result.value == pytest.approx(320, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("broken", [float("nan"), 1e30])
def test_perplexity_that_is_not_finite(windows, broken):
    model = make_llama()
    torch.nn.init.constant_(model.lm_head.weight[0], broken)
    with pytest.raises(UsageError, match="the checkpoint yields NaN"):
        evaluation.perplexity(model, windows, batch_size=8)


# ------------------------------------------------------------------------------------------- local tasks


@pytest.fixture
def seven(tmp_path):
    """A data folder with one row for each of the seven tasks, some of them gzipped, some in eval/."""
    folder = tmp_path / "data"
    for stem, row in ROWS.items():
        write_rows(folder, stem, [row, row])
    (folder / "eval").mkdir()
    (folder / "piqa_validation.jsonl").rename(folder / "eval" / "piqa_validation.jsonl")
    plain = folder / "boolq_validation.jsonl"
    with gzip.open(folder / "eval" / "boolq_validation.jsonl.gz", "wb") as packed:
        packed.write(plain.read_bytes())
    plain.unlink()
    return folder


def test_local_tasks_are_the_stock_tasks_on_other_rows(seven, tmp_path):
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tasks"
    folder.mkdir()
    assert evaluation.local_tasks(seven, folder) == TASKS
    stock = TaskManager().task_index
    local = TaskManager(include_path=folder, include_defaults=False).task_index
    for task in TASKS:
        prompts, local_prompts = (
            {key: value for key, value in index[task].cfg.items() if not key.endswith(("_split", "tag"))}
            for index in (stock, local)
        )
        for where_the_rows_are in ("dataset_path", "dataset_name", "dataset_kwargs"):
            prompts.pop(where_the_rows_are, None)
            local_prompts.pop(where_the_rows_are, None)
        assert local_prompts == prompts
        assert {"doc_to_text", "doc_to_target", "doc_to_choice", "metric_list"} <= prompts.keys()


def test_folder_without_rows_gives_no_task(tmp_path):
    assert evaluation.local_tasks(tmp_path, tmp_path) == []


def test_seven_tasks_run_with_the_stock_prompts(seven, tokenizer, grouped_llama, seen_ids):
    grouped_llama.register_forward_pre_hook(seen_ids, with_kwargs=True)
    result = score(grouped_llama, tokenizer, TASKS, seven)
    assert list(result["tasks"]) == TASKS
    assert result["averages"]["tasks"] == TASKS
    assert {record["samples"] for record in result["tasks"].values()} == {2}
    assert result["tasks"]["boolq"]["origin"] == "local boolq_validation.jsonl.gz"
    texts = [tokenizer.decode([token for token in ids if token > 2]) for ids in seen_ids]
    for prompt in PROMPTS:
        # Short sequences are padded at the end; the last token of each is predicted, not given.
        assert any(text.startswith(prompt[:-1]) for text in texts), prompt
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def hellaswag(tmp_path):
    """Eight rows of endings of quite different lengths."""
    generator = np.random.default_rng(3)
    rows = []
    for index in range(8):
        endings = ["".join(generator.choice(list("abcdefgh"), size)) + "." for size in (3, 9, 18, 30)]
        rows.append(
            ACTIVITY
            | {
                "ind": index,
                "ctx_a": f"A man opens oven {index}.",
                "ctx_b": "then he",
                "ctx": "unread",
                "endings": endings,
                "label": str([0, 3, 1, 2, 0, 0, 1, 0][index]),
            }
        )
    write_rows(tmp_path / "rows", "hellaswag_validation", rows)
    return tmp_path / "rows", rows


def log_likelihoods(model, tokenizer, row):
    """Log-likelihoods of the endings of a HellaSwag row, by scoring one at a time with the bare model."""
    context = tokenizer.encode(f"Baking: {row['ctx_a']} Then he", add_special_tokens=False)
    scores = []
    for ending in row["endings"]:
        answer = tokenizer.encode(" " + ending, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([context + answer[:-1]])).logits[0].double()
        steps = logits.log_softmax(-1)[len(context) - 1 :]
        scores.append(sum(step[token].item() for step, token in zip(steps, answer, strict=True)))
    return scores


def accuracies(model, tokenizer, rows):
    """acc and acc_norm of HellaSwag rows."""
    scores = [log_likelihoods(model, tokenizer, row) for row in rows]
    lengths = [[len(ending) for ending in row["endings"]] for row in rows]
    labels = [int(row["label"]) for row in rows]
    normed = np.divide(scores, lengths)
    return (np.argmax(scores, 1) == labels).mean(), (np.argmax(normed, 1) == labels).mean()


def test_accuracy_is_that_of_the_log_likelihoods(hellaswag, grouped_llama, bos_tokenizer, seen_ids):
    folder, rows = hellaswag
    acc, acc_norm = accuracies(grouped_llama, bos_tokenizer, rows)
    assert len({0.0, acc, acc_norm, 1.0}) == 4  # rows that did not tell the metrics apart would show nothing
    grouped_llama.register_forward_pre_hook(seen_ids, with_kwargs=True)
    record = score(grouped_llama, bos_tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]
    assert record == {
        "acc": pytest.approx(acc),
        "acc_norm": pytest.approx(acc_norm),
        "acc_stderr": pytest.approx(np.sqrt(acc * (1 - acc) / 7)),
        "acc_norm_stderr": pytest.approx(np.sqrt(acc_norm * (1 - acc_norm) / 7)),
        "samples": 8,
        "split_size": 8,
        "num_fewshot": 0,
        "version": 1.0,
        "origin": "local hellaswag_validation.jsonl",
    }
    # The tokenizer would put <s> in front, the paper's harness did not.
    assert len(seen_ids) == 32
    assert not any(bos_tokenizer.bos_token_id in ids for ids in seen_ids)


def test_near_ties_of_a_bfloat16_model(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    model = grouped_llama.bfloat16()
    # Endings alike but for the last letter: log-likelihoods near -100, which bfloat16 rounds to steps of 0.5.
    close = [
        row | {"endings": [ending + last for last in "aeio"]} for row in rows for ending in row["endings"][2:]
    ]
    for row in close:
        row["label"] = str(np.argmax(log_likelihoods(model, tokenizer, row)))
    write_rows(folder, "hellaswag_validation", close)
    record = score(model, tokenizer, ["hellaswag"], folder, batch_size=1)["tasks"]["hellaswag"]
    assert (record["samples"], record["acc"]) == (16, 1.0)


def test_limit_scores_the_first_rows(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    result = score(grouped_llama, tokenizer, ["hellaswag"], folder, limit=3)
    record = result["tasks"]["hellaswag"]
    assert (record["samples"], record["split_size"], result["limit"]) == (3, 8, 3)
    expected = accuracies(grouped_llama, tokenizer, rows[:3])
    assert (record["acc"], record["acc_norm"]) == pytest.approx(expected)


def test_one_row_leaves_out_the_standard_error(hellaswag, grouped_llama, tokenizer):
    record = score(grouped_llama, tokenizer, ["hellaswag"], hellaswag[0], limit=1)["tasks"]["hellaswag"]
    assert "acc" in record and "acc_stderr" not in record


def test_only_finite_numbers_are_recorded():
    results = {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": float("nan")}},
        "configs": {"arc_easy": {"dataset_path": "allenai/ai2_arc"}},
        "n-samples": {"arc_easy": {"effective": 1, "original": 2376}},
        "n-shot": {"arc_easy": 0},
        "versions": {"arc_easy": 1.0},
    }
    assert evaluation._task_record(results, "arc_easy", local=[]) == {
        "acc": 0.5,
        "samples": 1,
        "split_size": 2376,
        "num_fewshot": 0,
        "version": 1.0,
        "origin": "hub allenai/ai2_arc",
    }


def test_edited_rows_are_read_again(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    path = folder / "hellaswag_validation.jsonl"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    before = score(grouped_llama, tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]
    write_rows(folder, "hellaswag_validation", rows[:2])
    os.utime(path, ns=times)  # a cache that goes by the file's time would not notice
    after = score(grouped_llama, tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]
    assert (before["split_size"], after["split_size"]) == (8, 2)


def test_shots_are_refused_for_a_local_file(seven, grouped_llama, tokenizer):
    with pytest.raises(UsageError, match="--num_fewshot 5: the local file of piqa has no training rows"):
        score(grouped_llama, tokenizer, ["piqa"], seven, num_fewshot=5)


def test_seed_draws_the_shots(monkeypatch, seven, grouped_llama, tokenizer):
    import lm_eval

    given, real = {}, lm_eval.simple_evaluate
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda **settings: given.update(settings) or real(**settings)
    )
    score(grouped_llama, tokenizer, ["piqa"], seven, seed=7)
    assert given["fewshot_random_seed"] == 7


def test_unknown_task_names_its_neighbours(grouped_llama, tokenizer):
    with pytest.raises(UsageError, match="--tasks helaswag: .*nearest: .*hellaswag"):
        score(grouped_llama, tokenizer, ["helaswag"], None)


def test_missing_harness(monkeypatch, grouped_llama, tokenizer):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install lm-eval"):
        score(grouped_llama, tokenizer, ["piqa"], None)


@pytest.mark.shared
def test_seven_tasks_run_on_the_real_rows(shared_data, tokenizer):
    model = make_llama(max_position_embeddings=4096)
    result = score(model, tokenizer, TASKS, shared_data, limit=2)
    sizes = {task: record["split_size"] for task, record in result["tasks"].items()}
    assert sizes == {
        "openbookqa": 500,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "winogrande": 1267,
        "hellaswag": 10042,
        "piqa": 1838,
        "boolq": 3270,
    }
    assert all(0 <= record[evaluation.PAPER_METRIC[task]] <= 1 for task, record in result["tasks"].items())


# ---------------------------------------------------------------------------------------------- averages


def test_paper_metrics():
    norm = dict.fromkeys(["openbookqa", "arc_easy", "arc_challenge", "hellaswag", "piqa"], "acc_norm")
    assert evaluation.PAPER_METRIC == norm | {"boolq": "acc", "winogrande": "acc"}


def test_averages_by_hand():
    results = {
        "boolq": {"acc": 0.75},
        "piqa": {"acc": 0.8, "acc_norm": 0.7},
        "arc_easy": {"acc": 0.5, "acc_norm": 0.45},
        "hellaswag": {"acc": 0.3, "acc_norm": 0.5},
        "mmlu": {"acc": 0.1},
    }
    result = evaluation.averages(results)
    assert sorted(result["tasks"]) == ["arc_easy", "boolq", "hellaswag", "piqa"]
    assert result["paper_rule"] == pytest.approx(60.0)  # (75 + 70 + 45 + 50) / 4
    assert result["max_rule"] == pytest.approx(63.75)  # (75 + 80 + 50 + 50) / 4


def test_averages_of_dense_llama_7b():
    """The paper's own row: its mean is that of the seven numbers, in its order of columns."""
    columns = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    row = [75.08, 79.16, 76.20, 70.00, 72.89, 44.88, 44.40]
    results = {
        task: {evaluation.PAPER_METRIC[task]: value / 100} for task, value in zip(columns, row, strict=True)
    }
    assert evaluation.averages(results)["paper_rule"] == pytest.approx(66.09, abs=0.006)


def test_averages_without_a_task_of_the_paper():
    assert evaluation.averages({"mmlu": {"acc": 0.1}}) == {"paper_rule": None, "max_rule": None, "tasks": []}


def test_memory_does_not_grow_with_the_windows():
    """Every window's log-probabilities take 25 MB here; kept or pinned, 60 windows would take 1.5 GB."""
    model = make_llama(vocab_size=49152, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    windows = torch.randint(49152, (60, 128), generator=torch.Generator().manual_seed(0))
    perplexity(model, windows[:4], batch_size=4)
    reset_peak_memory("cpu")
    before = peak_memory("cpu")["host_bytes"]
    perplexity(model, windows, batch_size=4)
    assert peak_memory("cpu")["host_bytes"] - before < 600e6
