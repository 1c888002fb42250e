"""Zero-shot accuracy through lm-evaluation-harness, on rows of the hub or of local files."""

import difflib
import hashlib
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, in_words, is_no_fault_of_input, reason
from ..machine import BatchSize
from ..processes import ALONE, Processes
from .harness_model import WHILE_RUNNING, harness_model
from .local_rows import LOCAL_ROWS, find_rows, local_tasks
from .paired import PAPER_METRIC, mean_error, pack_hits
from .settings import EvaluationSettings

# Metrics that are right or wrong row by row.
ROW_METRICS = ("acc", "acc_norm")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    asked: EvaluationSettings,
    processes: Processes = ALONE,
) -> Iterator[tuple[str, dict[str, dict]]]:
    """Score `model` on lm-eval `tasks` (names of tasks, groups or tags), one after the other, as it is `asked`.

    The paper's harness (of 2023) never put a start token before a prompt; today's default is what the tokenizer does,
    which for LLaMA is one <s>. Here the settings say it. Local rows in their data folder take the place of the hub's.

    Yields each name with the scores of its tasks, by name: metrics as shares of 1, their standard errors, the protocol,
    and `hits`, by metric, of the single rows; what a JSON record can hold. A group whose tasks lm-eval averages (mmlu)
    has scores of its own, without `hits`. Processes other than the main one get empty scores. A task whose batches do
    not fit into memory is scored again in smaller ones, unless several processes share it. Resets the generators of
    random, numpy and torch.
    Raises UsageError if lm-eval is missing, a task is unknown, its rows cannot be had, or shots are asked of a
    local file.
    """
    harness = _import_harness()
    from lm_eval import evaluator

    # Or lm-eval lists, for every task, all that is installed: seconds each, for a field that is not recorded here.
    without_inventory = partial(patch.object, evaluator, "add_env_info", lambda _: None)
    with tempfile.TemporaryDirectory() as folder:
        with _in_words(tasks, asked.data_dir):
            local = local_tasks(asked.data_dir, folder)
            manager = _task_manager(tasks, local, folder, asked.num_fewshot)
        fitting = BatchSize(asked.batch_size)
        scored: dict[str, dict] = {}

        def score(task: str) -> None:
            """Put the task's scores into `scored`."""
            starts, chats = asked.add_bos_token, asked.apply_chat_template
            wrapped = harness_model(model, tokenizer, fitting.size, processes, starts, chats)
            with _in_words([task], asked.data_dir), without_inventory():
                results = harness.simple_evaluate(
                    model=wrapped,
                    tasks=[task],
                    num_fewshot=asked.num_fewshot,
                    limit=asked.limit,
                    fewshot_random_seed=asked.seed,
                    task_manager=manager,
                    log_samples=True,
                    apply_chat_template=asked.apply_chat_template,
                )
            scored[task] = _scores(results, local) if processes.is_main else {}

        for task in tasks:
            if processes.count > 1:
                score(task)  # the others would wait for one that begins anew
            else:
                fitting.run(lambda _, task=task: score(task), samples=1)
            yield task, scored.pop(task)


def check_tasks(tasks: list[str], asked: EvaluationSettings) -> dict[str, int]:
    """Read the rows of `tasks`, so that what is wrong with them is reported before any model is read.

    Returns how many tokens those tasks generate that do so, by their names.
    Raises UsageError as `zero_shot` does, and if a task has fewer rows to draw examples from than are asked for.
    """
    _import_harness()
    from lm_eval.models.utils import normalize_gen_kwargs

    with tempfile.TemporaryDirectory() as folder, _in_words(tasks, asked.data_dir):
        local = local_tasks(asked.data_dir, folder)
        loaded = _task_manager(tasks, local, folder, asked.num_fewshot).load(tasks)["tasks"]
        _check_examples(loaded, asked.num_fewshot)
        generating = {name: task.config for name, task in loaded.items() if task.OUTPUT_TYPE == "generate_until"}
        return {
            name: normalize_gen_kwargs(config.generation_kwargs or {})["max_gen_toks"]
            for name, config in generating.items()
        }


def _check_examples(tasks: dict, number: int) -> None:
    """Raise UsageError if one of lm-eval's `tasks`, by their names, has fewer rows for examples than `number`."""
    for name, task in tasks.items() if number else ():
        if task.get_config("num_fewshot") == 0 or not hasattr(task, "sampler"):  # lm-eval leaves it at none
            continue
        # A row that is scored is no example of itself.
        rows = len(task.sampler.fewshot_docs()) - (task.fewshot_cfg.split == task.config.test_split)
        if number > rows:
            raise UsageError(f"--num_fewshot {number}: {name} has {rows} rows to draw examples from; ask for fewer")


def harness_version() -> str:
    """The harness and its version, for records."""
    return f"lm-eval {metadata.version('lm_eval')}"


def _in_words(tasks: list[str], data_dir: str) -> AbstractContextManager[None]:
    """Turn the failures of reading and filling in rows into a UsageError, but not those of running the model."""

    def sentence(error: Exception) -> str:
        fault = reason(error)
        files = {name: find_rows(Path(data_dir), LOCAL_ROWS[name].stem) for name in tasks if name in LOCAL_ROWS}
        missing = [f"{LOCAL_ROWS[name].stem}.jsonl" for name, path in files.items() if path is None]
        if empty := [path for path in files.values() if path and not path.stat().st_size]:
            fault = f"{empty[0]} is empty"
        names = f" as {', '.join(missing)}" if missing else ""
        advice = f"their rows must lie in --data_dir {data_dir}{names}, whole and in the hub's fields"
        if any(name not in LOCAL_ROWS for name in tasks):
            advice += f", and only {', '.join(LOCAL_ROWS)} can have rows there"
        return f"--tasks {','.join(tasks)}: lm-eval cannot score them ({fault}); without a hub {advice}"

    def is_no_fault_of_rows(error: Exception) -> bool:
        # An AssertionError of lm-eval is what it says of rows that it cannot use.
        of_program = is_no_fault_of_input(error) and not isinstance(error, AssertionError)
        return of_program or WHILE_RUNNING in getattr(error, "__notes__", ())

    return in_words(sentence, let_through=is_no_fault_of_rows)


def averages(results: dict[str, dict]) -> dict:
    """Mean accuracies in percent over those of the paper's tasks that `results` (task -> metrics) holds.

    `paper_rule` takes each task's `PAPER_METRIC`, as the paper's tables do; `max_rule` takes the larger of
    acc and acc_norm, which is the mean the released script prints. `standard_error` is that of `paper_rule`. `tasks`
    lists what was averaged; without any, all three are None.
    """
    present = [task for task, metric in PAPER_METRIC.items() if metric in results.get(task, {})]
    paper = [results[task][PAPER_METRIC[task]] for task in present]
    larger = [max(results[task].get(metric, 0.0) for metric in ("acc", "acc_norm")) for task in present]
    errors = [{"standard_error": results[task].get(f"{PAPER_METRIC[task]}_stderr")} for task in present]
    error = mean_error(errors)
    return {
        "paper_rule": _mean_percent(paper),
        "standard_error": None if error is None else 100 * error,
        "max_rule": _mean_percent(larger),
        "tasks": present,
    }


def _mean_percent(shares: list[float]) -> float | None:
    return 100 * sum(shares) / len(shares) if shares else None


def _import_harness():
    """The package lm_eval, imported where it is used: it takes seconds, and perplexity does without it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError('--tasks needs the package lm-eval: pip install "olica[eval]"')
    import lm_eval

    return lm_eval


def _task_manager(tasks: list[str], local: list[str], folder: str, num_fewshot: int):
    """lm-eval's index of tasks, those `local` in `folder` first; checks that `tasks` and shots can be had."""
    from lm_eval.tasks import TaskManager

    # Indexing the thousands of stock tasks takes seconds, and the local ones need none of them.
    manager = TaskManager(include_path=folder, include_defaults=not set(tasks) <= set(local))
    for name in tasks:
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks)
            names = f"; nearest: {', '.join(nearest)}" if nearest else ", nor one of a name near it"
            raise UsageError(f"--tasks {name}: lm-eval has no such task{names}")
    if num_fewshot and local:
        # lm-eval would quietly draw the shots from the rows it scores. Loading resolves groups and tags.
        for name in sorted(manager.load(tasks)["tasks"].keys() & set(local)):
            raise UsageError(
                f"--num_fewshot {num_fewshot}: the local file of {name} has no training rows to draw shots "
                "from; use --num_fewshot 0, or a --data_dir without that file, so that the hub is asked"
            )
    return manager


def _scores(results: dict, local: list[str]) -> dict[str, dict]:
    """The records of all tasks in lm-eval's results, and behind them those of their groups."""
    tasks = {name: _task_record(results, name, local) for name in results["n-samples"]}
    return tasks | {name: _group_record(results, name) for name in results.get("groups", ())}


def _metrics(row: dict) -> dict[str, float]:
    """The figures in a row of lm-eval's results.

    Its keys are "metric,filter" and "metric_stderr,filter"; a filter other than "none", which all tasks of the paper
    have, becomes part of the metric's name. A standard error that lm-eval cannot give is the string "N/A".
    """
    found = {}
    for key, value in row.items():
        if "," in key and isinstance(value, int | float) and math.isfinite(value):
            metric, of_filter = key.split(",", maxsplit=1)
            name = metric.removesuffix("_stderr")
            ending = metric[len(name) :]
            found[name + (f",{of_filter}" if of_filter != "none" else "") + ending] = value
    return found


def _group_record(results: dict, name: str) -> dict:
    """A group's metrics and protocol; its rows are in the records of its tasks."""
    metrics, tasks = _metrics(results["groups"][name]), _tasks_of(name, results["group_subtasks"])
    samples = [results["n-samples"][task] for task in tasks]
    return metrics | {
        "metrics": [name for name in metrics if not name.endswith("_stderr")],
        "hits": {},
        "hash": None,
        "samples": sum(counts["effective"] for counts in samples),
        "split_size": sum(counts["original"] for counts in samples),
        "num_fewshot": results["n-shot"].get(name),
        "version": results["versions"].get(name),
        "origin": f"{len(tasks)} tasks",
    }


def _tasks_of(name: str, children: dict[str, list[str]]) -> list[str]:
    """The tasks of a group and of the groups in it; of a task, itself."""
    if name not in children:
        return [name]
    return [task for child in children[name] for task in _tasks_of(child, children)]


def _task_record(results: dict, name: str, local: list[str]) -> dict:
    """One task's metrics and protocol out of lm-eval's results."""
    metrics = _metrics(results["results"][name])
    config, samples = results["configs"][name], results["n-samples"][name]
    origin = f"hub {config.get('dataset_path')}"
    if name in local:
        rows = Path(config["dataset_kwargs"]["data_files"][LOCAL_ROWS[name].split])
        origin = f"local {rows.name}"
    rows = sorted((row for row in results["samples"][name] if row["filter"] == "none"), key=lambda row: row["doc_id"])
    answers = {metric: [row.get(metric) for row in rows] for metric in ROW_METRICS}
    whole = (metric for metric, right in answers.items() if rows and all(hit in (0, 1) for hit in right))
    hits = {metric: pack_hits(answers[metric]) for metric in whole}
    return metrics | {
        "metrics": [name for name in metrics if not name.endswith("_stderr")],
        "hits": hits,
        "hash": _hash_rows(rows) if hits else None,
        "samples": samples["effective"],
        "split_size": samples["original"],
        "num_fewshot": results["n-shot"][name],
        "version": results["versions"][name],
        "origin": origin,
    }


def _hash_rows(rows: list[dict]) -> str:
    """Digest of the rows, their prompts and their answers: equal for two runs that were asked the same."""
    parts = (row[key] for row in rows for key in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
