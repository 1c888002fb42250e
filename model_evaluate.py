"""Measure a pruned or dense checkpoint: perplexity, zero-shot tasks, parameters, memory."""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from os.path import expanduser
from pathlib import Path

from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

from olica import checkpoint, cost, model_source, records
from olica.command_line import run_command
from olica.devices import pick_device
from olica.errors import UsageError
from olica.evaluation import check_tasks, perplexity, token_windows, zero_shot
from olica.text_sources import evaluation_text

DEFAULT_BASE_MODEL = "7b"
PROMPT_TOKENS = 30


def build_parser() -> argparse.ArgumentParser:
    """The flags of the released code, with its defaults, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add(
        "--base_model",
        type=expanduser,
        help="dense model: name, hub id, folder or .gguf file (7b, or what --checkpoint's record says)",
    )
    add("--sparsity", type=float, default=0.2, help="with --base_model, finds the checkpoint in --save_dir")
    add("--save_dir", type=expanduser, default="./pruned_models", help="folder that received the checkpoint's folder")
    add("--checkpoint", type=expanduser, help="measure this model instead: a folder, name, hub id or .gguf file")
    add("--with_dense", action="store_true", help="measure the dense --base_model in the same call")
    add("--dtype", default="auto", choices=["auto", *model_source.DTYPES], help="to run in; auto: as stored")
    add = parser.add_argument_group("measures").add_argument
    add("--ppl", type=expanduser, default="wikitext2", help="text of the perplexity: a name, a path, or none")
    add("--ppl_seqlen", type=int, default=128, help="tokens per window")
    add("--ppl_windows", type=int, help="only the first so many windows, else all")
    add("--tasks", default="", help="zero-shot tasks of lm-eval, joined by commas; empty: none")
    add("--num_fewshot", type=int, default=0, help="examples in a task's prompt")
    add("--limit", type=int, help="only the first so many rows of every task, else all")
    add("--prompt", help=f"text that every model is to continue, greedily, by {PROMPT_TOKENS} tokens")
    add(
        "--data_dir",
        type=expanduser,
        default="./data",
        help="folder searched first for texts and for rows of the paper's tasks",
    )
    add("--seed", type=int, default=0, help="seed of the draw of few-shot examples")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run; auto: a GPU if there is one")
    add("--batch_size", type=int, default=16, help="windows or prompts that go through the model at a time")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_path",
        type=expanduser,
        help="file of the record; else olica_eval_TIME.json in the checkpoint's folder",
    )
    return parser


def find_models(args: argparse.Namespace) -> dict[str, model_source.Location]:
    """The models to measure: "dense" and "pruned" with --with_dense, else "model"."""
    if args.checkpoint:
        measured, base = model_source.locate(args.checkpoint, "--checkpoint"), None
    else:
        base = model_source.locate(args.base_model or DEFAULT_BASE_MODEL)
        folder = checkpoint.checkpoint_folder(args.save_dir, base.label, args.sparsity)
        if not folder.is_dir():
            raise UsageError(f"--save_dir: there is no {folder}; prune the model first, or name one with --checkpoint")
        measured = model_source.locate(str(folder), "--save_dir")
    record = records.read_pruning_record(measured.path)
    name = args.base_model or (record["model"]["name"] if record and args.with_dense else None)
    if args.with_dense and name is None:
        raise UsageError("--with_dense: the checkpoint has no record of its dense model; name it with --base_model")
    dense = model_source.locate(name or DEFAULT_BASE_MODEL) if base or args.with_dense else None
    if dense and record:
        check_same_model(dense, measured, record)
    return {"dense": dense, "pruned": measured} if args.with_dense else {"model": measured}


def check_same_model(dense: model_source.Location, measured: model_source.Location, record: dict) -> None:
    """Raise UsageError if the record beside a checkpoint tells of another dense model than this one.

    A local model may have moved, so its size is compared; one of the hub is known by its id and need not be at hand.
    """
    if dense.is_local:
        total = model_source.count_dense_parameters(dense, model_source.read_config(dense))
        same = record["parameters"]["before"] == total
    else:
        same = record["model"]["source"] == dense.path
    if not same:
        raise UsageError(
            f"--base_model {dense.name}: {measured.path} was pruned from {record['model']['name']} "
            f"({record['model']['source']}, {record['parameters']['before']:,} parameters); name the checkpoint that "
            "you mean with --checkpoint"
        )


def record_path(args: argparse.Namespace, measured: model_source.Location, now: datetime) -> Path:
    """Where the record goes, checked now so that no measurement is lost for want of a place."""
    if args.output_path:
        path, flag = Path(args.output_path), "--output_path"
    else:
        name = records.EVALUATION_RECORD.format(time=f"{now:%Y%m%dT%H%M%SZ}")
        # A model without a record of ours may lie anywhere; its evaluation goes into the current folder.
        path = Path(measured.path if records.read_pruning_record(measured.path) else "") / name
        flag = "--output_path, left out"
    checkpoint.check_record_path(path, flag)
    return path


def windows_of(args: argparse.Namespace, text: str, tokenizer, config, location: model_source.Location):
    """The perplexity's windows (W, T), checked against the model's positions and vocabulary."""
    if args.ppl_seqlen > config.max_position_embeddings:
        raise UsageError(
            f"--ppl_seqlen {args.ppl_seqlen} does not fit the {config.max_position_embeddings} positions of "
            f"{location.name}"
        )
    windows = token_windows(tokenizer, text, args.ppl_seqlen, args.ppl_windows)
    check_vocabulary(windows, config, location)
    return windows


def check_vocabulary(ids, config, location: model_source.Location) -> None:
    """Raise UsageError if the tokenizer gives ids that the model does not know."""
    if ids.max() >= config.vocab_size:
        raise UsageError(
            f"{location.flag} {location.name}: its tokenizer gives the token {ids.max()}, but the model's vocabulary "
            f"ends at {config.vocab_size - 1}; put the model's own tokenizer beside it"
        )


@dataclass(frozen=True)
class Subject:
    """A model to measure, with all that can be made ready before its weights are read."""

    name: str  # in the record: "dense", "pruned" or "model"
    location: model_source.Location
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor | None
    prompt: BatchEncoding | None


def prepare(args: argparse.Namespace, name: str, location: model_source.Location, text: str | None) -> Subject:
    """Cut the windows and tokenise the prompt, so that no model is measured in vain for another's faults."""
    config = model_source.read_config(location)
    tokenizer = model_source.read_tokenizer(location)
    if tokenizer is None:
        raise UsageError(f"{location.flag} {location.name}: the folder has no tokenizer, which evaluation needs")
    windows = None if text is None else windows_of(args, text, tokenizer, config, location)
    prompt = tokenizer(args.prompt, return_tensors="pt") if args.prompt else None
    if prompt is not None:
        check_vocabulary(prompt.input_ids, config, location)
    return Subject(name, location, config, tokenizer, windows, prompt)


def measure(args: argparse.Namespace, subject: Subject, stages: records.Stages) -> dict:
    """Read a model and measure it; returns what the record says of it."""
    name, location, windows = subject.name, subject.location, subject.windows
    with stages.stage(f"{name}: read"):
        model = model_source.read_model(location, args.dtype).to(stages.device)
    result = {
        "model": model_source.describe_source(location, subject.config),
        "parameters": cost.count_parameters(model),
        "weight_bytes": cost.weight_bytes(model),
        "file_bytes": location.file_bytes,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if windows is not None:
        with stages.stage(f"{name}: perplexity"):
            result["perplexity"] = asdict(perplexity(model, windows, args.batch_size))
        result["perplexity"]["bos"] = bool(windows[0, 0] == subject.tokenizer.bos_token_id)
    if args.tasks:
        with stages.stage(f"{name}: tasks"):
            result["zero_shot"] = zero_shot(
                model,
                subject.tokenizer,
                args.tasks.split(","),
                num_fewshot=args.num_fewshot,
                batch_size=args.batch_size,
                limit=args.limit,
                data_dir=args.data_dir,
                seed=args.seed,
            )
    if subject.prompt is not None:
        output = model.generate(**subject.prompt.to(model.device), max_new_tokens=PROMPT_TOKENS, do_sample=False)
        result["continuation"] = subject.tokenizer.decode(output[0], skip_special_tokens=True)
    return result


def with_error(value: float, error: float | None, digits: int) -> str:
    """A figure and, where it has one, its standard error."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} +- {error:.{digits}f}"


def print_table(results: dict[str, dict], protocol: str) -> None:
    """Print one row per measured quantity and one column per model."""
    rows = {
        "parameters": lambda r: f"{r['parameters']['total']:,}",
        "parameters of the decoder layers": lambda r: f"{r['parameters']['decoder_layers']:,}",
        "weights": lambda r: f"{r['weight_bytes'] / 1e6:,.1f} MB {r['dtype']}",
    }
    first = next(iter(results.values()))
    if "perplexity" in first:
        rows[f"perplexity, {protocol}"] = lambda r: with_error(
            r["perplexity"]["value"], r["perplexity"]["standard_error"], 3
        )
    for task, scores in first.get("zero_shot", {}).get("tasks", {}).items():
        for metric in ("acc", "acc_norm"):
            if metric in scores:
                rows[f"{task} {metric}"] = lambda r, task=task, metric=metric: with_error(
                    r["zero_shot"]["tasks"][task][metric], r["zero_shot"]["tasks"][task].get(f"{metric}_stderr"), 4
                )
    if first.get("zero_shot", {}).get("averages", {}).get("tasks"):
        rows["mean by the paper's rule, %"] = lambda r: f"{r['zero_shot']['averages']['paper_rule']:.2f}"
    width = max(map(len, rows))
    print(" " * width + "".join(f"{name:>28}" for name in results))
    for name, cell in rows.items():
        print(f"{name:<{width}}" + "".join(f"{cell(result):>28}" for result in results.values()))


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UsageError for a number that no model could satisfy, and where nothing is to be measured."""
    for flag in ("batch_size", "limit", "ppl_windows"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag} {getattr(args, flag)} must be at least 1")
    if args.num_fewshot < 0:
        raise UsageError(f"--num_fewshot {args.num_fewshot} must be at least 0")
    if not math.isfinite(args.sparsity):
        raise UsageError(f"--sparsity {args.sparsity:g} is no number that a checkpoint was pruned by")
    if args.ppl == "none" and not args.tasks:
        raise UsageError("--ppl none leaves nothing to measure; give a text, or --tasks")


def run(args: argparse.Namespace) -> None:
    """Find the models, the text and the tasks, measure, print a table and write the record."""
    check_numbers(args)
    stages = records.Stages(pick_device(args.device))
    locations = find_models(args)
    now = datetime.now(UTC)
    path = record_path(args, locations.get("pruned") or locations["model"], now)
    text, origin = (None, None) if args.ppl == "none" else evaluation_text(args.ppl, Path(args.data_dir), flag="--ppl")
    if args.tasks:
        check_tasks(args.tasks.split(","), num_fewshot=args.num_fewshot, data_dir=args.data_dir)
    subjects = [prepare(args, name, location, text) for name, location in locations.items()]
    results = {subject.name: measure(args, subject, stages) for subject in subjects}
    record = {
        "kind": "evaluation",
        "date": now.isoformat(timespec="seconds"),
        "settings": vars(args),
        "perplexity_text": {"name": args.ppl, "origin": origin, "joined_by": "\n\n", "overlap": 0},
        "results": results,
        "stages": stages.rows,
        "environment": records.environment(stages.device),
    }
    records.write_record(path, record)
    windows = next(iter(results.values())).get("perplexity", {}).get("windows")
    print_table(results, f"{args.ppl}, {windows} windows of {args.ppl_seqlen} tokens")
    for name, result in results.items():
        if "continuation" in result:
            print(f"{name}: {result['continuation']}")
    print(f"record {path}")


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
