"""Zero-shot tasks on rows of the hub and of local files."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_llama, no_memory_for_more_than
from tiny_tasks import ACTIVITY, ROWS, SCIENCE, score, write_rows
from tokenizers import processors

from olica.errors import UsageError
from olica.evaluation import zero_shot
from olica.evaluation.paired import PAPER_METRIC
from olica.evaluation.settings import EvaluationSettings

pytestmark = pytest.mark.usefixtures("stock_tasks")
TASKS = ["openbookqa", "arc_easy", "arc_challenge", "winogrande", "hellaswag", "piqa", "boolq"]

# The prompts that lm-eval's stock tasks make of the ROWS.
PROMPTS = [
    "The sea is warmed by the sun",
    "Question: What warms the sea?\nAnswer: the sun",
    "Question: What cools the sea?\nAnswer: ice",
    "The cup did not fit the box as the cup was wide.",
    "Baking: A man opens an oven. He takes the bread.",
    "Question: Dry a cup.\nAnswer: Wipe it.",
    "Ice -- Ice is cold.\nQuestion: is ice cold?\nAnswer: yes",
]


class Recorder(list):
    def __call__(self, module, args, kwargs):
        self.extend((args[0] if args else kwargs["input_ids"]).tolist())


@pytest.fixture
def seen_ids():
    """Collects every sequence of token ids a model is given; attach it with `register_forward_pre_hook`."""
    return Recorder()


@pytest.fixture
def seven(tmp_path):
    """A data folder with one row for each of the seven tasks, some of them gzipped, some in eval/; its name is odd."""
    folder = tmp_path / "data [1]?*"
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
    assert zero_shot.local_tasks(seven, folder) == TASKS
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
    assert zero_shot.local_tasks(tmp_path, tmp_path) == []


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


def right_answers(model, tokenizer, rows):
    """Which HellaSwag rows are right by acc and by acc_norm."""
    scores = [log_likelihoods(model, tokenizer, row) for row in rows]
    lengths = [[len(ending) for ending in row["endings"]] for row in rows]
    labels = [int(row["label"]) for row in rows]
    normed = np.divide(scores, lengths)
    return np.argmax(scores, 1) == labels, np.argmax(normed, 1) == labels


def accuracies(model, tokenizer, rows):
    """acc and acc_norm of HellaSwag rows."""
    return tuple(right.mean() for right in right_answers(model, tokenizer, rows))


def test_accuracy_is_that_of_the_log_likelihoods(hellaswag, grouped_llama, bos_tokenizer, seen_ids):
    folder, rows = hellaswag
    right = right_answers(grouped_llama, bos_tokenizer, rows)
    acc, acc_norm = (row.mean() for row in right)
    hits, normed_hits = ("".join(str(int(hit)) for hit in row) for row in right)
    assert len({0.0, acc, acc_norm, 1.0}) == 4  # rows that give two metrics one value would show nothing
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
        "metrics": ["acc", "acc_norm"],
        "hits": {"acc": hits, "acc_norm": normed_hits},
        "hash": record["hash"],
    }
    # The tokenizer would put <s> in front, the paper's harness did not.
    assert len(seen_ids) == 32
    assert not any(bos_tokenizer.bos_token_id in ids for ids in seen_ids)


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_prompts_by_the_chat_template(seven, grouped_llama, bos_tokenizer, seen_ids, add_bos_token):
    bos_tokenizer.chat_template = (
        "{{ bos_token }}{{ strftime_now('%B') }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    grouped_llama.register_forward_pre_hook(seen_ids, with_kwargs=True)
    given = dict(apply_chat_template=True, add_bos_token=add_bos_token)
    record = score(grouped_llama, bos_tokenizer, ["arc_easy"], seven, **given)["tasks"]["arc_easy"]
    assert {ids.count(bos_tokenizer.bos_token_id) for ids in seen_ids} == {1}
    assert {ids[0] for ids in seen_ids} == {bos_tokenizer.bos_token_id}
    texts = {bos_tokenizer.decode([token for token in ids if token > 2]) for ids in seen_ids}
    prompt = "26 Jul 2024[user] Question: What warms the sea?\nAnswer:\n[assistant]"
    assert texts == {f"{prompt} {choice}"[:-1] for choice in SCIENCE["choices"]["text"]}
    # No longer the same rows: a comparison of the two would compare prompts, too.
    assert record["hash"] != score(grouped_llama, bos_tokenizer, ["arc_easy"], seven)["tasks"]["arc_easy"]["hash"]


def test_near_ties_of_a_bfloat16_model(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    model = grouped_llama.bfloat16()
    # Endings alike but for the last letter: log-likelihoods near -100, which bfloat16 rounds to steps of 0.5.
    close = [row | {"endings": [ending + last for last in "aeio"]} for row in rows for ending in row["endings"][2:]]
    for row in close:
        row["label"] = str(np.argmax(log_likelihoods(model, tokenizer, row)))
    write_rows(folder, "hellaswag_validation", close)
    record = score(model, tokenizer, ["hellaswag"], folder, batch_size=1)["tasks"]["hellaswag"]
    assert (record["samples"], record["acc"]) == (16, 1.0)


def test_batches_that_do_not_fit_are_made_smaller(hellaswag, grouped_llama, tokenizer, caplog):
    folder, rows = hellaswag
    grouped_llama.model.register_forward_pre_hook(no_memory_for_more_than(2), with_kwargs=True)
    record = score(grouped_llama, tokenizer, ["hellaswag"], folder, batch_size=8)["tasks"]["hellaswag"]
    assert (record["acc"], record["acc_norm"]) == pytest.approx(accuracies(grouped_llama, tokenizer, rows), abs=1e-9)
    assert "going on with --batch_size 2" in caplog.text


def test_a_single_prompt_that_does_not_fit_ends_the_run(hellaswag, grouped_llama, tokenizer):
    grouped_llama.model.register_forward_pre_hook(no_memory_for_more_than(0), with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError):
        score(grouped_llama, tokenizer, ["hellaswag"], hellaswag[0], batch_size=2)


def test_limit_scores_the_first_rows(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    result = score(grouped_llama, tokenizer, ["hellaswag"], folder, limit=3)
    record = result["tasks"]["hellaswag"]
    assert (record["samples"], record["split_size"]) == (3, 8)
    assert len(record["hits"]["acc"]) == 3
    expected = accuracies(grouped_llama, tokenizer, rows[:3])
    assert (record["acc"], record["acc_norm"]) == pytest.approx(expected)


def test_a_limit_below_one_is_a_share(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    record = score(grouped_llama, tokenizer, ["hellaswag"], folder, limit=0.3)["tasks"]["hellaswag"]
    assert (record["samples"], record["split_size"]) == (3, 8), "2.4 rows, rounded up"
    assert (record["acc"], record["acc_norm"]) == pytest.approx(accuracies(grouped_llama, tokenizer, rows[:3]))


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
        "samples": {"arc_easy": []},
    }
    assert zero_shot._task_record(results, "arc_easy", local=[]) == {
        "acc": 0.5,
        "samples": 1,
        "split_size": 2376,
        "num_fewshot": 0,
        "version": 1.0,
        "origin": "hub allenai/ai2_arc",
        "metrics": ["acc"],
        "hits": {},
        "hash": None,
    }


def test_metrics_of_a_filter_keep_their_errors():
    row = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.125, "acc,none": 1}
    named = {"exact_match,strict-match": 0.25, "exact_match,strict-match_stderr": 0.125, "acc": 1}
    assert zero_shot._metrics(row) == named


def test_mean_of_a_group(monkeypatch, seven, grouped_llama, tokenizer):
    means = [{"metric": "acc", "weight_by_size": True}]
    science = {"group": "science", "task": ["arc_easy", "arc_challenge"], "aggregate_metric_list": means}
    everything = {"group": "everything", "task": ["science", "piqa"], "aggregate_metric_list": means}

    def with_groups(data_dir, folder):
        names = zero_shot_local_tasks(data_dir, folder)
        for group in (science, everything):
            (Path(folder) / f"{group['group']}.yaml").write_text(json.dumps(group))
        return [*names, "science", "everything"]

    zero_shot_local_tasks = zero_shot.local_tasks
    monkeypatch.setattr(zero_shot, "local_tasks", with_groups)
    write_rows(seven, "piqa_validation", [ROWS["piqa_validation"] | {"label": label} for label in (0, 1, 0)])
    tasks = score(grouped_llama, tokenizer, ["everything"], seven)["tasks"]
    assert set(tasks) == {"arc_easy", "arc_challenge", "piqa", "science", "everything"}
    sizes = {"arc_easy": 2, "arc_challenge": 2, "piqa": 3}
    for group, members in {"science": ["arc_easy", "arc_challenge"], "everything": list(sizes)}.items():
        right = sum(sizes[task] * tasks[task]["acc"] for task in members)
        total = sum(sizes[task] for task in members)
        assert tasks[group]["acc"] == pytest.approx(right / total)
        assert (tasks[group]["samples"], tasks[group]["split_size"]) == (total, total)
        assert (tasks[group]["metrics"], tasks[group]["num_fewshot"], tasks[group]["hits"]) == (["acc"], 0, {})


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
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **settings: given.update(settings) or real(**settings))
    score(grouped_llama, tokenizer, ["piqa"], seven, seed=7)
    assert given["fewshot_random_seed"] == 7


def test_unknown_task_names_its_neighbours(grouped_llama, tokenizer):
    with pytest.raises(UsageError, match="--tasks helaswag: .*nearest: .*hellaswag"):
        score(grouped_llama, tokenizer, ["helaswag"], "nowhere")


def test_missing_harness(monkeypatch, grouped_llama, tokenizer):
    monkeypatch.setattr(zero_shot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "olica\[eval\]"'):
        score(grouped_llama, tokenizer, ["piqa"], "nowhere")


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
    assert all(0 <= record[PAPER_METRIC[task]] <= 1 for task, record in result["tasks"].items())


def test_log_likelihoods_that_are_nan_choose_nothing(hellaswag, grouped_llama, tokenizer):
    torch.nn.init.constant_(grouped_llama.lm_head.weight, float("nan"))
    with pytest.raises(UsageError, match="a log-likelihood is NaN"):
        score(grouped_llama, tokenizer, ["hellaswag"], hellaswag[0])


def test_an_empty_file_of_rows_is_named(tmp_path):
    (tmp_path / "hellaswag_validation.jsonl").touch()
    with pytest.raises(UsageError, match="hellaswag_validation.jsonl is empty"):
        zero_shot.check_tasks(["hellaswag"], EvaluationSettings(data_dir=tmp_path))


def test_rows_that_cannot_be_filled_in_are_a_fault_of_the_rows(seven, grouped_llama, tokenizer):
    """Whatever kind of error the task's own code meets in them."""
    for stem, row in {"hellaswag_validation": {"ctx_b": None}, "winogrande_xl_validation": {"answer": "3"}}.items():
        write_rows(seven, stem, [ROWS[stem] | row])
        task = stem.split("_")[0]
        with pytest.raises(UsageError, match=f"--tasks {task}: .*whole and in the hub's fields"):
            score(grouped_llama, tokenizer, [task], seven)


def test_an_end_token_of_the_tokenizer_ends_no_prompt(hellaswag, grouped_llama, tokenizer, seen_ids):
    added = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=added)
    tokenizer.add_eos_token = True
    grouped_llama.register_forward_pre_hook(seen_ids, with_kwargs=True)
    for start in (False, True):
        score(grouped_llama, tokenizer, ["hellaswag"], hellaswag[0], add_bos_token=start)
    assert len(seen_ids) == 64 and not any(tokenizer.eos_token_id in ids for ids in seen_ids)
    assert [ids.count(tokenizer.bos_token_id) for ids in seen_ids] == [0] * 32 + [1] * 32
    assert all(ids[0] == tokenizer.bos_token_id for ids in seen_ids[32:])


def test_more_examples_than_there_are_rows(monkeypatch, tmp_path):
    """Drawn from rows of their own, or from those that are scored, but for the one that is asked."""
    from lm_eval.tasks import TaskManager

    for split in ("train", "test"):
        write_rows(tmp_path, split, [{"question": f"{split} {index}", "answer": str(index)} for index in range(3)])
    task = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    task |= {"dataset_path": "json", "metric_list": [{"metric": "exact_match"}], "test_split": "test"}
    task |= {"dataset_kwargs": {"data_files": {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "test")}}}
    for name, split in {"own": "train", "shared": "test"}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | {"task": name, "fewshot_split": split}))
    never = task | {"task": "never", "fewshot_split": "train", "num_fewshot": 0}
    (tmp_path / "never.yaml").write_text(json.dumps(never))
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(zero_shot, "_task_manager", lambda *arguments: manager)
    for name, rows in {"own": 3, "shared": 2}.items():
        zero_shot.check_tasks([name], EvaluationSettings(num_fewshot=rows))
        task = manager.load([name])["tasks"][name]
        task.set_fewshot_seed(seed=0)
        assert task.fewshot_context(task.eval_docs[0], rows).count("\n\n") == rows, "lm-eval draws as many"
        with pytest.raises(UsageError, match=f"--num_fewshot {rows + 1}: {name} has {rows} rows to draw examples from"):
            zero_shot.check_tasks([name], EvaluationSettings(num_fewshot=rows + 1))
    zero_shot.check_tasks(["never"], EvaluationSettings(num_fewshot=9))


def test_other_rows_have_another_hash(hellaswag, grouped_llama, tokenizer):
    folder, rows = hellaswag
    whole = score(grouped_llama, tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]["hash"]
    again = score(make_llama(3), tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]["hash"]
    part = score(grouped_llama, tokenizer, ["hellaswag"], folder, limit=7)["tasks"]["hellaswag"]["hash"]
    write_rows(folder, "hellaswag_validation", [*rows[:7], rows[7] | {"label": "2"}])
    edited = score(grouped_llama, tokenizer, ["hellaswag"], folder)["tasks"]["hellaswag"]["hash"]
    assert whole == again and len({whole, part, edited}) == 3


def test_rows_that_are_not_there_are_named(grouped_llama, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=f"--data_dir {tmp_path}.* as hellaswag_validation.jsonl"):
        score(grouped_llama, tokenizer, ["hellaswag"], tmp_path)
