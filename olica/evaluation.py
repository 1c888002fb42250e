"""How good a model is: perplexity on windows of text, and zero-shot accuracy through lm-evaluation-harness.

W windows, T tokens in each, V entries in the vocabulary.
"""

import difflib
import importlib.util
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import UsageError

# The metric that the paper's tables print, by task. Its text does not say so: its dense means (66.09 for
# LLaMA-7B) only work out this way.
PAPER_METRIC = {
    "openbookqa": "acc_norm",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "winogrande": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "boolq": "acc",
}

# How lm-eval is to run a model, where its own defaults would not do; recorded with every result.
HARNESS_SETTINGS = {
    # The paper's harness (of 2023) never put a token in front of a causal model's prompt. Today's default is
    # what the tokenizer does, which for LLaMA is one <s>.
    "add_bos_token": False,
    # The default is the model's dtype: in bfloat16 a log-likelihood near -40 comes in steps of 0.25, and
    # answers tie.
    "softmax_dtype": "float32",
}


@dataclass(frozen=True)
class LocalRows:
    """Where the rows of a task may lie in a data folder, and which lm-eval task file they are put through."""

    stock: str  # task file, relative to lm-eval's own folder of tasks
    stem: str  # file name without .jsonl or .jsonl.gz
    split: str  # the split that is scored, the only one in the file


LOCAL_ROWS = {
    "openbookqa": LocalRows("openbookqa/openbookqa.yaml", "openbookqa_main_test", "test"),
    "arc_easy": LocalRows("arc/arc_easy.yaml", "arc_easy_test", "test"),
    "arc_challenge": LocalRows("arc/arc_challenge.yaml", "arc_challenge_test", "test"),
    "winogrande": LocalRows("winogrande/default.yaml", "winogrande_xl_validation", "validation"),
    "hellaswag": LocalRows("hellaswag/hellaswag.yaml", "hellaswag_validation", "validation"),
    "piqa": LocalRows("piqa/piqa.yaml", "piqa_validation", "validation"),
    "boolq": LocalRows("super_glue/boolq/default.yaml", "boolq_validation", "validation"),
}


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its protocol; `standard_error` is None where one window is all there is."""

    value: float
    standard_error: float | None
    mean_nll: float  # nats per predicted token
    windows: int
    seqlen: int  # tokens in each window
    predictions: int  # tokens predicted in all windows together


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seqlen: int, limit: int | None = None
) -> torch.Tensor:
    """Cut `text` into non-overlapping windows of `seqlen` tokens, ids (W, T); a shorter tail is dropped.

    The text is tokenised once, as a whole, with the tokenizer's defaults: one that puts a token in front, as
    LLaMA's puts <s>, does so in the first window only, as in the paper. `limit` keeps that many windows.
    Raises UsageError if a window is too short to predict anything or the text does not fill one.
    """
    if seqlen < 2:
        raise UsageError(f"--ppl_seqlen {seqlen}: a window needs at least 2 tokens, one of them predicted")
    # verbose=False: that the text is longer than the model's context is what the windows are for.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
    windows = len(ids) // seqlen
    if windows == 0:
        raise UsageError(
            f"--ppl_seqlen {seqlen}: the text has only {len(ids)} tokens; give a smaller one or more text"
        )
    return ids[: windows * seqlen].view(windows, seqlen)[:limit]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch_size: int) -> Perplexity:
    """Perplexity of a causal model on `windows` (W, T): exp of the mean negative log-likelihood.

    The paper's protocol: every window is its own sequence, its first token is given and the other T-1 are
    predicted. Log-probabilities are taken in float32 whatever the dtype of the model. The standard error
    treats the windows as independent: value * std(window means) / sqrt(W), by the delta method.
    Raises UsageError if the result is not a finite number.
    """
    # Filled in place: small tensors kept from between the large ones would pin the allocator's freed memory.
    nll = torch.empty(len(windows), dtype=torch.float64, device=model.device)  # nats per window
    start = 0
    for batch in tqdm(windows.split(batch_size), desc="perplexity", unit="batch"):
        ids = batch.to(model.device)
        logits = model(ids, use_cache=False).logits  # (B, T, V)
        # One window at a time: the float32 copy of a whole batch's logits would be the largest tensor of all.
        for index, (row, targets) in enumerate(zip(logits, ids, strict=True), start):
            nll[index] = cross_entropy(row[:-1].float(), targets[1:])
        start += len(batch)
    nll = nll.cpu()
    value = nll.mean().exp().item()
    if not math.isfinite(value):
        raise UsageError(
            f"the perplexity is not finite (mean negative log-likelihood {nll.mean():.4g}): "
            "the checkpoint yields NaN or infinite logits, or its dtype overflows"
        )
    count, seqlen = windows.shape
    error = value * nll.std(correction=1).item() / math.sqrt(count) if count > 1 else None
    return Perplexity(value, error, nll.mean().item(), count, seqlen, count * (seqlen - 1))


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    num_fewshot: int | None,
    batch_size: int | str,
    limit: int | float | None,
    data_dir: str | Path | None,
    seed: int = 1234,
) -> dict:
    """Score `model` on lm-eval `tasks` (names of tasks, groups or tags); returns what a JSON record can hold.

    Rows that lie under `data_dir` (see `local_tasks`) are read from there, all others come from the hub.
    `num_fewshot` None is each task's own number, drawn by `seed`; `limit` scores the first rows or that share.
    Returns `tasks` (by name: metrics as shares of 1, their standard errors, the protocol; a group appears as
    its tasks), `averages` (see there) and the settings. Resets the generators of random, numpy and torch.
    Raises UsageError if lm-eval is missing, a task is unknown, its rows cannot be had, or shots are asked of a
    local file.
    """
    harness = _import_harness()
    with tempfile.TemporaryDirectory() as folder, _explained(tasks, data_dir):
        local = local_tasks(data_dir, folder) if data_dir else []
        manager = _task_manager(tasks, local, folder, num_fewshot)
        results = harness.simple_evaluate(
            model=_harness_model(model, tokenizer, batch_size),
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            fewshot_random_seed=seed,
            task_manager=manager,
            log_samples=False,
        )
    scores = {name: _task_record(results, name, local) for name in results["n-samples"]}
    return {
        "tasks": scores,
        "averages": averages(scores),
        "harness": f"lm-eval {results['lm_eval_version']}",
        "limit": limit,
        **HARNESS_SETTINGS,
    }


def check_tasks(tasks: list[str], *, num_fewshot: int | None, data_dir: str | Path | None) -> None:
    """Read the rows of `tasks`, so that what is wrong with them is told before any model is read.

    Raises UsageError as `zero_shot` does.
    """
    _import_harness()
    with tempfile.TemporaryDirectory() as folder, _explained(tasks, data_dir):
        local = local_tasks(data_dir, folder) if data_dir else []
        _task_manager(tasks, local, folder, num_fewshot).load(tasks)


@contextmanager
def _explained(tasks: list[str], data_dir: str | Path | None) -> Iterator[None]:
    """Turn the failures of reading and filling in rows into a UsageError, but not those of running the model."""
    try:
        yield
    except (UsageError, RuntimeError, NameError, AttributeError, AssertionError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"--tasks {','.join(tasks)}: lm-eval cannot score them ({reason}); without a hub their rows must lie in "
            f"--data_dir {data_dir}, whole and in the hub's fields"
        ) from error


def local_tasks(data_dir: str | Path, folder: str | Path) -> list[str]:
    """Write into `folder` a task file for each of the paper's tasks whose rows lie under `data_dir`.

    Looked for in `data_dir` and `data_dir`/eval: the stems of `LOCAL_ROWS` as .jsonl or .jsonl.gz. With
    `folder` as lm-eval's include path the files take the place of the stock tasks of the same names: they
    include the stock file, its prompts and metrics, and change only where the rows come from.
    Returns the names of the tasks.
    """
    found = {name: _find_rows(Path(data_dir), local.stem) for name, local in LOCAL_ROWS.items()}
    names = [name for name, rows in found.items() if rows is not None]
    for name in names:
        task = _local_task(name, found[name], Path(folder) / "rows")
        # JSON is YAML.
        (Path(folder) / f"{name}.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")
    return names


def averages(results: dict[str, dict]) -> dict:
    """Mean accuracies in percent over those of the paper's tasks that `results` (task -> metrics) holds.

    `paper_rule` takes each task's `PAPER_METRIC`, as the paper's tables do; `max_rule` takes the larger of
    acc and acc_norm, which is the mean the released script prints. `tasks` lists what was averaged; without
    any, both means are None.
    """
    present = [task for task, metric in PAPER_METRIC.items() if metric in results.get(task, {})]
    paper = [results[task][PAPER_METRIC[task]] for task in present]
    larger = [max(results[task].get(metric, 0.0) for metric in ("acc", "acc_norm")) for task in present]
    return {"paper_rule": _mean_percent(paper), "max_rule": _mean_percent(larger), "tasks": present}


def _mean_percent(shares: list[float]) -> float | None:
    return 100 * sum(shares) / len(shares) if shares else None


def _find_rows(data_dir: Path, stem: str) -> Path | None:
    """The first file of this stem in `data_dir` or its folder eval, plain before gzipped; None without."""
    candidates = (
        folder / f"{stem}{suffix}"
        for folder in (data_dir, data_dir / "eval")
        for suffix in (".jsonl", ".jsonl.gz")
    )
    return next((path for path in candidates if path.is_file()), None)


def _local_task(name: str, rows: Path, cache: Path) -> dict:
    """The task file that puts the local `rows` through lm-eval's stock task `name`."""
    from lm_eval import tasks

    local = LOCAL_ROWS[name]
    return {
        "include": str(Path(tasks.__file__).parent / local.stock),
        "task": name,
        # A tag named here would stand for the local tasks alone, and hide the stock tag's other tasks.
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        # The cache goes with the temporary folder, and no edited file is answered from an old one.
        "dataset_kwargs": {"data_files": {local.split: str(rows.resolve())}, "cache_dir": str(cache)},
        "training_split": None,
        "validation_split": None,
        "test_split": None,
        f"{local.split}_split": local.split,
    }


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str):
    """The loaded model as lm-eval wants it; `batch_size` may be "auto"."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        **HARNESS_SETTINGS,
    )


def _import_harness():
    """The package lm_eval, imported where it is used: it takes seconds, and perplexity does without it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("--tasks needs the package lm-eval: pip install lm-eval")
    import lm_eval

    return lm_eval


def _task_manager(tasks: list[str], local: list[str], folder: str, num_fewshot: int | None):
    """lm-eval's index of tasks, those `local` in `folder` first; checks that `tasks` and shots can be had."""
    from lm_eval.tasks import TaskManager

    # Indexing the thousands of stock tasks takes seconds, and the local ones need none of them.
    manager = TaskManager(include_path=folder, include_defaults=not set(tasks) <= set(local))
    for name in tasks:
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.all_tasks) or ["none is near"]
            raise UsageError(f"--tasks {name}: lm-eval has no such task; nearest: {', '.join(nearest)}")
    if num_fewshot and local:
        # lm-eval would quietly draw the shots from the rows it scores. Loading resolves groups and tags.
        for name in sorted(manager.load(tasks)["tasks"].keys() & set(local)):
            raise UsageError(
                f"--num_fewshot {num_fewshot}: the local file of {name} has no training rows to draw shots "
                "from; use --num_fewshot 0, or a --data_dir without that file, so that the hub is asked"
            )
    return manager


def _task_record(results: dict, name: str, local: list[str]) -> dict:
    """One task's metrics and protocol out of lm-eval's results."""
    # lm-eval's keys are "metric,filter", and every task of the paper has the filter "none"; a standard error
    # that it cannot give is the string "N/A".
    metrics = {
        key.removesuffix(",none"): value
        for key, value in results["results"][name].items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
    config, samples = results["configs"][name], results["n-samples"][name]
    origin = f"hub {config.get('dataset_path')}"
    if name in local:
        rows = Path(config["dataset_kwargs"]["data_files"][LOCAL_ROWS[name].split])
        origin = f"local {rows.name}"
    return metrics | {
        "samples": samples["effective"],
        "split_size": samples["original"],
        "num_fewshot": results["n-shot"][name],
        "version": results["versions"][name],
        "origin": origin,
    }
