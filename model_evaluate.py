"""Measure a pruned or dense checkpoint: perplexity, zero-shot tasks, parameters, memory."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
from dataclasses import asdict

from olica.command_line import run_command
from olica.evaluation.evaluate import evaluate
from olica.evaluation.settings import CHOICES, EvaluationSettings
from olica.evaluation.subject import CONTINUATION_TOKENS
from olica.terminal import with_error


def build_parser() -> argparse.ArgumentParser:
    """The flags of the released code and ours, with the defaults of `EvaluationSettings`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--base_model", help="dense model: name, hub id, folder or .gguf file (7b, or what --checkpoint's record says)")
    add("--sparsity", type=float, help="with --base_model, finds the checkpoint in --save_dir")
    add(
        "--sparsity_of",
        choices=CHOICES["sparsity_of"],
        help="what --sparsity is a share of, as it was given to model_pruning.py",
    )
    add("--save_dir", help="folder that received the checkpoint's folder")
    add("--checkpoint", help="measure this model instead: a folder, name, hub id or .gguf file")
    add("--with_dense", action="store_true", help="measure the dense --base_model in the same call")
    add("--dtype", choices=CHOICES["dtype"], help="to run in; auto: as stored")
    add = parser.add_argument_group("measures").add_argument
    add("--ppl", help="texts of the perplexity, names or paths joined by commas, or none")
    add("--ppl_seqlen", type=int, help="tokens per window")
    add("--ppl_windows", type=int, help="only the first so many windows, else all")
    add("--tasks", help="zero-shot tasks of lm-eval, joined by commas; empty: none")
    add("--num_fewshot", type=int, help="examples in a task's prompt")
    add("--limit", type=row_limit, help="only the first so many rows of every task, or this share below 1, else all")
    add("--add_bos_token", action="store_true", help="begin every window and prompt with the start token (Gemma)")
    add(
        "--apply_chat_template",
        action="store_true",
        help="put the prompts of --tasks through the chat template of the model's tokenizer",
    )
    add("--cost", action="store_true", help="measure the times of prefill and decoding, and peak memory")
    add("--prompt", help=f"text that every model is to continue, greedily, by {CONTINUATION_TOKENS} tokens")
    add("--data_dir", help="folder searched first for texts and for rows of the paper's tasks")
    add("--seed", type=int, help="seed of the draw of few-shot examples")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=CHOICES["device"], help="where to run; auto: a GPU if there is one")
    add("--device_map", choices=["auto"], help="auto: spread a model larger than one GPU over all of them and the host")
    add("--batch_size", type=int, help="windows or prompts that go through the model at a time")
    add = parser.add_argument_group("output").add_argument
    add("--output_path", help="file of the record; else olica_eval_TIME.json in the checkpoint's folder")
    add("--verbose", action="store_true", help="print what the log holds, too")
    parser.set_defaults(**asdict(EvaluationSettings()))
    return parser


def row_limit(text: str) -> int | float:
    """The type of --limit: a number of rows, or a share of them."""
    try:
        return int(text)
    except ValueError:
        return float(text)


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
        if measured["bits_per_byte"]:  # ids may stand for no text
            rows[f"bits per byte, {text}"] = f"{measured['bits_per_byte']:.4f}"
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
        rows[f"seconds for a prompt of {taken['protocol']['prompt_tokens']}"] = f"{taken['prefill']['median_s']:.4f}"
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


def run(args: argparse.Namespace) -> None:
    """Evaluate as the flags say, and print what came of it."""
    settings = vars(args).copy()
    del settings["verbose"]
    done = evaluate(settings.pop("checkpoint"), **settings)
    if done is None:
        return
    print_table(done.record["results"])
    if (dtype := done.record["dtype"]) != args.dtype:
        print(f"both models ran in {dtype}, as the pruned one is stored; --dtype names another")
    print(f"record {done.path}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
