"""Measure a pruned or dense checkpoint: perplexity, zero-shot tasks, parameters, memory."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from os.path import exists, expanduser
from pathlib import Path

from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError, memory_in_words
from olica.evaluation.evaluation import CONTINUATION_TOKENS, LATENCY, Measures, Protocol, TestText, measure, prepare
from olica.evaluation.paired import compare
from olica.evaluation.zero_shot import TaskProtocol, check_tasks
from olica.machine import pick_device
from olica.output import with_error
from olica.outputs import checkpoint, identity, records
from olica.outputs.model_card import add_metrics
from olica.processes import join_processes
from olica.sources.configuration import count_dense_parameters, read_config
from olica.sources.locate import Location, locate
from olica.sources.text_sources import evaluation_text
from olica.sources.weights import DTYPES

DEFAULT_BASE_MODEL = "7b"


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
    add(
        "--sparsity_of",
        default=checkpoint.SPARSITY_OF[0],
        choices=checkpoint.SPARSITY_OF,
        help="what --sparsity is a share of, as it was given to model_pruning.py",
    )
    add("--save_dir", type=expanduser, default="./pruned_models", help="folder that received the checkpoint's folder")
    add("--checkpoint", type=expanduser, help="measure this model instead: a folder, name, hub id or .gguf file")
    add("--with_dense", action="store_true", help="measure the dense --base_model in the same call")
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="to run in; auto: as stored")
    add = parser.add_argument_group("measures").add_argument
    add("--ppl", default="wikitext2", help="texts of the perplexity, names or paths joined by commas, or none")
    add("--ppl_seqlen", type=int, default=128, help="tokens per window")
    add("--ppl_windows", type=int, help="only the first so many windows, else all")
    add("--tasks", default="", help="zero-shot tasks of lm-eval, joined by commas; empty: none")
    add("--num_fewshot", type=int, default=0, help="examples in a task's prompt")
    add("--limit", type=row_limit, help="only the first so many rows of every task, or this share below 1, else all")
    add("--add_bos_token", action="store_true", help="begin every window and prompt with the start token (Gemma)")
    add("--cost", action="store_true", help="measure the times of prefill and decoding, and peak memory")
    add("--prompt", help=f"text that every model is to continue, greedily, by {CONTINUATION_TOKENS} tokens")
    add(
        "--data_dir",
        type=expanduser,
        default="./data",
        help="folder searched first for texts and for rows of the paper's tasks",
    )
    add("--seed", type=int, default=0, help="seed of the draw of few-shot examples")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run; auto: a GPU if there is one")
    add("--device_map", choices=["auto"], help="auto: spread a model larger than one GPU over all of them and the host")
    add("--batch_size", type=int, default=16, help="windows or prompts that go through the model at a time")
    add = parser.add_argument_group("output").add_argument
    add(
        "--output_path",
        type=expanduser,
        help="file of the record; else olica_eval_TIME.json in the checkpoint's folder",
    )
    return parser


def row_limit(text: str) -> int | float:
    """The type of --limit: a number of rows, or a share of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def find_models(args: argparse.Namespace) -> dict[str, Location]:
    """The models to measure: "dense" and "pruned" with --with_dense, else "model"."""
    if args.checkpoint:
        measured, base = locate(args.checkpoint, "--checkpoint"), None
    else:
        base = locate(args.base_model or DEFAULT_BASE_MODEL)
        found_by = {"sparsity": args.sparsity, "sparsity_of": args.sparsity_of}
        folder = checkpoint.checkpoint_folder(args.save_dir, base.label, **found_by)
        if not folder.is_dir():
            raise UsageError(f"--save_dir: there is no {folder}; prune the model first, or name one with --checkpoint")
        measured = locate(str(folder), "--save_dir")
    record = records.read_pruning_record(measured.path)
    if base and record and records.has_former_shares(record):
        raise UsageError(
            f"--save_dir: {measured.path} was pruned when {record['settings']['recipe']} had other shares for grouped "
            "heads; prune anew, or name it with --checkpoint"
        )
    name = args.base_model or (record["model"]["name"] if record and args.with_dense else None)
    if args.with_dense and name is None:
        raise UsageError("--with_dense: the checkpoint has no record of its dense model; name it with --base_model")
    dense = locate(name or DEFAULT_BASE_MODEL) if base or args.with_dense else None
    if dense and record:
        check_same_model(dense, measured, record)
    return {"dense": dense, "pruned": measured} if args.with_dense else {"model": measured}


def check_same_model(dense: Location, measured: Location, record: dict) -> None:
    """Raise UsageError if the record beside a checkpoint tells of another dense model than this one.

    A local model may have moved, so its size is compared; one of the hub is known by its id and need not be at hand.
    """
    if dense.is_local:
        total = count_dense_parameters(dense, read_config(dense))["total"]
        same = record["parameters"]["before"] == total
    else:
        same = record["model"]["source"] == dense.path
    if not same:
        raise UsageError(
            f"--base_model {dense.name}: {measured.path} was pruned from {record['model']['name']} "
            f"({record['model']['source']}, {record['parameters']['before']:,} parameters); name the checkpoint that "
            "you mean with --checkpoint"
        )


def record_path(args: argparse.Namespace, measured: Location, now: datetime) -> Path:
    """Where the record goes, checked now so that no measurement is lost for want of a place."""
    if args.output_path:
        path, flag = Path(args.output_path), "--output_path"
    else:
        name = records.EVALUATION_RECORD.format(time=f"{now:%Y%m%dT%H%M%SZ}")
        # A model without a record of ours may lie anywhere; its evaluation goes into the current folder.
        path = Path(measured.path if records.read_pruning_record(measured.path) else "") / name
        flag = "--output_path, left out"
    check_record_path(path, flag)
    return path


def table_rows(result: dict) -> dict[str, str]:
    """What the table says of a model: cell by name of the row."""
    bos = {"none": "", "first window": ", start token in front", "every window": ", start token in each"}
    rows = {
        "parameters": f"{result['parameters']['total']:,}",
        "parameters of the decoder layers": f"{result['parameters']['decoder_layers']:,}",
        "weights": f"{result['weight_bytes'] / 1e6:,.1f} MB {result['dtype']}",
        f"multiply-accumulates of {result['macs']['tokens']} tokens": f"{result['macs']['total'] / 1e9:,.2f} G",
        "cache of a token": f"{result['cache_bytes_per_token'] / 1e3:,.1f} kB",
    }
    for text, measured in result.get("perplexity", {}).items():
        name = f"perplexity, {text}, {measured['windows']} windows of {measured['seqlen']}{bos[measured['bos']]}"
        rows[name] = with_error(measured["value"], measured["standard_error"], 3)
    zero_shot = result.get("zero_shot", {"tasks": {}, "averages": {"tasks": []}})
    for task, scores in zero_shot["tasks"].items():
        for metric in scores["metrics"]:
            rows[f"{task} {metric}"] = with_error(scores[metric], scores.get(f"{metric}_stderr"), 4)
    if averaged := zero_shot["averages"]["tasks"]:
        averages, number = zero_shot["averages"], len(averaged)
        mean = with_error(averages["paper_rule"], averages["standard_error"], 2)
        rows[f"mean of {number} by the paper's rule, %"] = mean
        rows[f"mean of {number} by the released script's rule, %"] = f"{averages['max_rule']:.2f}"
    if "cost" in result:
        taken = result["cost"]
        peak = taken["peak_memory"]
        rows[f"seconds for a prompt of {LATENCY['prompt_tokens']}"] = f"{taken['prefill']['median_s']:.4f}"
        rows["seconds for a new token"] = f"{taken['decode']['median_s']:.4f}"
        rows["peak memory of both"] = f"{(peak['device_bytes'] or peak['host_bytes']) / 1e9:.2f} GB"
    return rows


def difference_rows(compared: dict) -> dict[str, str]:
    """How the pruned model differs from the dense one on the same rows: cell by name of the row."""
    rows = {}
    for text, row in compared["perplexity"].items():
        name = f"difference of the negative log-likelihood, {text}, nats"
        rows[name] = with_error(row["difference"], row["standard_error"], 4, "+")
    for task, metrics in compared["zero_shot"].items():
        for metric, row in metrics.items():
            rows[f"difference of {task} {metric}, %"] = with_error(row["difference"], row["standard_error"], 2, "+")
    if "paper_rule" in compared:
        row = compared["paper_rule"]
        rows["difference of the mean, %"] = with_error(row["difference"], row["standard_error"], 2, "+")
    return rows


def print_table(results: dict[str, dict]) -> None:
    """Print one row per measured quantity and one column per model."""
    cells = {name: table_rows(result) for name, result in results.items()}
    if "to_dense" in (last := list(results.values())[-1]):
        cells[list(results)[-1]] |= difference_rows(last["to_dense"])
    rows = list(dict.fromkeys(row for column in cells.values() for row in column))
    width = max(map(len, rows))
    print(" " * width + "".join(f"{name:>28}" for name in results))
    for row in rows:
        print(f"{row:<{width}}" + "".join(f"{column.get(row, ''):>28}" for column in cells.values()))
    for name, result in results.items():
        if "continuation" in result:
            print(f"{name}: {result['continuation']}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UsageError for a number that no model could satisfy."""
    for flag in ("batch_size", "ppl_windows"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UsageError(f"--{flag} {getattr(args, flag)} must be at least 1")
    if args.limit is not None and not (0 < args.limit < 1 or (isinstance(args.limit, int) and args.limit >= 1)):
        raise UsageError(f"--limit {args.limit} must be a number of rows without a point, or a share of them below 1")
    if args.num_fewshot < 0:
        raise UsageError(f"--num_fewshot {args.num_fewshot} must be at least 0")
    if not math.isfinite(args.sparsity):
        raise UsageError(f"--sparsity {args.sparsity:g} is no number that a checkpoint was pruned by")


def check_processes(args: argparse.Namespace, count: int) -> None:
    """Raise UsageError for what `count` processes cannot do together."""
    if args.device_map and (count > 1 or args.device == "cpu"):
        raise UsageError("--device_map gives one process all GPUs; leave it out, or start one process without --device")
    rows = args.limit if args.limit and args.limit >= 1 else count
    if count > min(rows, args.ppl_windows or count):
        raise UsageError(f"{count} processes have nothing to share in --limit or --ppl_windows below that")
    if args.cost and count > 1:
        raise UsageError("--cost measures one process; leave it out, or start a single process")


def split(names: str) -> Iterator[str]:
    """The names that commas join; of a path that exists, a comma is a part."""
    parts = names.split(",")
    while parts:
        ends = range(len(parts), 1, -1)
        end = next((end for end in ends if exists(expanduser(",".join(parts[:end]).strip()))), 1)
        yield ",".join(parts[:end]).strip()
        parts = parts[end:]


def listed(names: str, flag: str) -> list[str]:
    """The names that commas join, none of them twice."""
    found = [name for name in split(names) if name]
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {names}: a name is there twice")
    return found


def common_dtype(args: argparse.Namespace, locations: dict[str, Location]) -> str:
    """The dtype that models are read in: --dtype; where that is auto and two are compared, the pruned one's for both.

    A dense model in float32 beside a pruned one in bfloat16 would show what the dtype does, not what the pruning did.
    """
    if args.dtype != "auto" or not args.with_dense:
        return args.dtype
    pruned = locations["pruned"]
    if pruned.gguf_file:
        return "float32"
    stored = str(read_config(pruned).dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "auto"


def make_protocol(args: argparse.Namespace, dtype: str) -> Protocol:
    """What is to be measured, its texts and tasks read, in `dtype`; raises UsageError if it is nothing."""
    data_dir = Path(args.data_dir)
    names = [] if args.ppl == "none" else listed(args.ppl, "--ppl")
    texts = [TestText(name, *evaluation_text(expanduser(name), data_dir, flag="--ppl")) for name in names]
    tasks = listed(args.tasks, "--tasks")
    if not names and not tasks and not args.cost:
        raise UsageError(f"--ppl {args.ppl} leaves nothing to measure; give a text, --tasks or --cost")
    of_tasks = TaskProtocol(args.num_fewshot, args.limit, args.add_bos_token, args.seed, args.data_dir)
    generated = check_tasks(tasks, of_tasks) if tasks else {}
    return Protocol(
        texts=texts,
        seqlen=args.ppl_seqlen,
        windows=args.ppl_windows,
        tasks=tasks,
        generated=generated,
        of_tasks=of_tasks,
        prompt=args.prompt,
        cost=args.cost,
        dtype=dtype,
        device_map=args.device_map,
        batch_size=args.batch_size,
    )


def memory_advice(args: argparse.Namespace, count: int, of_host: bool) -> str:
    """What to do when memory, of the host or of a GPU, runs out; batches are single by then, unless `count` share."""
    ways = ["a --dtype of half the width"]
    if count > 1:
        ways.insert(0, "a lower --batch_size")
    if pick_device(args.device).type == "cuda" and not of_host:
        ways += [*([] if args.device_map or count > 1 else ["--device_map auto"]), "--device cpu"]
    return f"give {' or '.join(ways)}"


def run(args: argparse.Namespace) -> None:
    """Find the models, the texts and the tasks, measure, print a table and write the record."""
    check_numbers(args)
    processes, device = join_processes(pick_device(args.device))
    check_processes(args, processes.count)
    locations = find_models(args)
    now = datetime.now(UTC)
    path = record_path(args, locations.get("pruned") or locations["model"], now)
    protocol = make_protocol(args, common_dtype(args, locations))
    subjects = [prepare(name, location, protocol) for name, location in locations.items()]
    stages = records.Stages(device)
    configs = {subject.name: subject.config for subject in subjects}
    evaluation = identity.of_evaluation(vars(args), locations, configs, protocol.data, device)
    measures = Measures(path.parent, path.name if args.output_path else None, evaluation, stages, processes)
    if measures.found and processes.is_main:
        print(f"going on with a stopped evaluation; measured before: {measures.found}")
    with measures.says_how_to_go_on(), memory_in_words(partial(memory_advice, args, processes.count)):
        results = {subject.name: measure(subject, protocol, measures, stages, processes) for subject in subjects}
    if not processes.is_main:
        return
    if args.with_dense:
        results["pruned"]["to_dense"] = compare(results["pruned"], results["dense"])
    record = {
        "kind": "evaluation",
        "date": now.isoformat(timespec="seconds"),
        "settings": vars(args),
        "dtype": protocol.dtype,
        "processes": processes.count,
        "results": results,
        "stages": stages.rows,
        "environment": records.environment(device),
    }
    if args.output_path:
        records.write_record(path, record)
    else:
        path = records.add_record(path, record)
    measures.forget()
    measured = locations.get("pruned") or locations["model"]
    if records.read_pruning_record(measured.path):
        add_metrics(Path(measured.path), results[list(results)[-1]])
    print_table(results)
    if protocol.dtype != args.dtype:
        print(f"both models ran in {protocol.dtype}, as the pruned one is stored; --dtype names another")
    print(f"record {path}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
