"""Measure a pruned or dense checkpoint: perplexity, zero-shot tasks, parameters, memory."""

import argparse
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from olica import checkpoint, cost, records
from olica.command_line import run_command
from olica.devices import pick_device
from olica.errors import UsageError
from olica.evaluation import perplexity, token_windows, zero_shot
from olica.text_sources import evaluation_text

DEFAULT_BASE_MODEL = "7b"
PROMPT_TOKENS = 30


def build_parser() -> argparse.ArgumentParser:
    """The flags of the released code, with its defaults, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--base_model", help="dense model: name, hub id, folder or .gguf file (7b, or what --checkpoint's record says)")
    add("--sparsity", type=float, default=0.2, help="with --base_model, finds the checkpoint in --save_dir")
    add("--save_dir", default="./pruned_models", help="folder that received the checkpoint's folder")
    add("--checkpoint", help="measure this model instead: a folder, name, hub id or .gguf file")
    add("--with_dense", action="store_true", help="measure the dense --base_model in the same call")
    add("--dtype", default="auto", choices=["auto", *checkpoint.DTYPES], help="to run in; auto: as stored")
    add = parser.add_argument_group("measures").add_argument
    add("--ppl", default="wikitext2", help="text of the perplexity: a name, a path, or none")
    add("--ppl_seqlen", type=int, default=128, help="tokens per window")
    add("--ppl_windows", type=int, help="only the first so many windows, else all")
    add("--tasks", default="", help="zero-shot tasks of lm-eval, joined by commas; empty: none")
    add("--num_fewshot", type=int, default=0, help="examples in a task's prompt")
    add("--limit", type=int, help="only the first so many rows of every task, else all")
    add("--prompt", help=f"text that every model is to continue, greedily, by {PROMPT_TOKENS} tokens")
    add("--data_dir", default="./data", help="folder searched first for texts and for rows of the paper's tasks")
    add("--seed", type=int, default=0, help="seed of the draw of few-shot examples")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run; auto: a GPU if there is one")
    add("--batch_size", type=int, default=16, help="windows or prompts that go through the model at a time")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", help="file of the record; else olica_eval_TIME.json in the checkpoint's folder")
    return parser


def find_checkpoint(args: argparse.Namespace) -> checkpoint.Location:
    """The model to measure: --checkpoint, or what pruning --base_model by --sparsity left in --save_dir."""
    if args.checkpoint:
        return checkpoint.locate(args.checkpoint, "--checkpoint")
    base = checkpoint.locate(args.base_model or DEFAULT_BASE_MODEL)
    folder = checkpoint.checkpoint_folder(args.save_dir, base.label, args.sparsity)
    if not folder.is_dir():
        raise UsageError(f"--save_dir: there is no {folder}; prune the model first, or name one with --checkpoint")
    return checkpoint.locate(str(folder), "--save_dir")


def find_dense(args: argparse.Namespace, pruned: checkpoint.Location) -> checkpoint.Location:
    """The dense model of --with_dense: --base_model, or the model that the checkpoint's record names."""
    record = records.read_pruning_record(pruned.path)
    name = args.base_model or (record["model"]["name"] if record else None)
    if name is None and args.checkpoint:
        raise UsageError("--with_dense: the checkpoint has no record of its dense model; name it with --base_model")
    return checkpoint.locate(name or DEFAULT_BASE_MODEL)


def measure(args: argparse.Namespace, location: checkpoint.Location, text: str | None, stages: records.Stages) -> dict:
    """Read one model and measure it; returns what its record says."""
    config = checkpoint.read_config(location)
    if text is not None and args.ppl_seqlen > config.max_position_embeddings:
        raise UsageError(
            f"--ppl_seqlen {args.ppl_seqlen} does not fit the {config.max_position_embeddings} positions of "
            f"{location.name}"
        )
    tokenizer = checkpoint.read_tokenizer(location)
    if tokenizer is None:
        raise UsageError(f"{location.flag} {location.name}: the folder has no tokenizer, which evaluation needs")
    with stages.stage(f"read {location.name}"):
        model = checkpoint.read_model(location, args.dtype).to(stages.device)
    result = {
        "model": checkpoint.describe_source(location, config),
        "parameters": cost.count_parameters(model),
        "weight_bytes": cost.weight_bytes(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if text is not None:
        windows = token_windows(tokenizer, text, args.ppl_seqlen, args.ppl_windows)
        with stages.stage(f"perplexity {location.name}"):
            result["perplexity"] = asdict(perplexity(model, windows, args.batch_size))
        result["perplexity"]["bos"] = bool(windows[0, 0] == tokenizer.bos_token_id)
    if args.tasks:
        with stages.stage(f"tasks {location.name}"):
            result["zero_shot"] = zero_shot(
                model,
                tokenizer,
                args.tasks.split(","),
                num_fewshot=args.num_fewshot,
                batch_size=args.batch_size,
                limit=args.limit,
                data_dir=args.data_dir,
                seed=args.seed,
            )
    if args.prompt:
        result["continuation"] = continue_text(model, tokenizer, args.prompt)
    return result


def continue_text(model, tokenizer, prompt: str) -> str:
    """The prompt and what the model makes of it, greedily."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    output = model.generate(ids, max_new_tokens=PROMPT_TOKENS, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def print_table(results: dict[str, dict], protocol: str) -> None:
    """Print one row per measured quantity and one column per model."""
    rows = {
        "parameters": lambda r: f"{r['parameters']['total']:,}",
        "parameters of the decoder layers": lambda r: f"{r['parameters']['decoder_layers']:,}",
        "weights": lambda r: f"{r['weight_bytes'] / 1e6:,.1f} MB {r['dtype']}",
    }
    first = next(iter(results.values()))
    if "perplexity" in first:
        rows[f"perplexity, {protocol}"] = lambda r: (
            f"{r['perplexity']['value']:.3f} +- {r['perplexity']['standard_error'] or 0:.3f}"
        )
    for task, scores in first.get("zero_shot", {}).get("tasks", {}).items():
        for metric in ("acc", "acc_norm"):
            if metric in scores:
                rows[f"{task} {metric}"] = lambda r, task=task, metric=metric: (
                    f"{r['zero_shot']['tasks'][task][metric]:.4f} +- "
                    f"{r['zero_shot']['tasks'][task].get(metric + '_stderr') or 0:.4f}"
                )
    if first.get("zero_shot", {}).get("averages", {}).get("tasks"):
        rows["mean by the paper's rule, %"] = lambda r: f"{r['zero_shot']['averages']['paper_rule']:.2f}"
    width = max(map(len, rows))
    print(" " * width + "".join(f"{name:>28}" for name in results))
    for name, cell in rows.items():
        print(f"{name:<{width}}" + "".join(f"{cell(result):>28}" for result in results.values()))


def run(args: argparse.Namespace) -> None:
    """Find the models and the text, measure, print a table and write the record."""
    for flag in ("batch_size", "limit", "ppl_windows"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag} {getattr(args, flag)} must be at least 1")
    if args.ppl == "none" and not args.tasks:
        raise UsageError("--ppl none leaves nothing to measure; give a text, or --tasks")
    if args.output_path and Path(args.output_path).is_dir():
        raise UsageError(f"--output_path {args.output_path} is a folder; give the name of a file")
    stages = records.Stages(pick_device(args.device))
    locations = {"pruned" if args.with_dense else "model": find_checkpoint(args)}
    if args.with_dense:
        locations = {"dense": find_dense(args, locations["pruned"])} | locations
    text, origin = (None, None) if args.ppl == "none" else evaluation_text(args.ppl, Path(args.data_dir), flag="--ppl")
    results = {name: measure(args, location, text, stages) for name, location in locations.items()}
    now = datetime.now(UTC)
    record = {
        "kind": "evaluation",
        "date": now.isoformat(timespec="seconds"),
        "settings": vars(args),
        "perplexity_text": {"name": args.ppl, "origin": origin, "joined_by": "\n\n", "overlap": 0},
        "results": results,
        "stages": stages.rows,
        "environment": records.environment(stages.device),
    }
    measured = locations["pruned" if args.with_dense else "model"]
    folder = Path(measured.path) if records.read_pruning_record(measured.path) else Path()
    path = Path(args.output_path or folder / records.EVALUATION_RECORD.format(time=f"{now:%Y%m%dT%H%M%SZ}"))
    records.write_record(path, record)
    windows = next(iter(results.values())).get("perplexity", {}).get("windows")
    print_table(results, f"{args.ppl}, {windows} windows of {args.ppl_seqlen} tokens")
    for name, result in results.items():
        if "continuation" in result:
            print(f"{name}: {result['continuation']}")
    print(f"record {path}")


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), run))
