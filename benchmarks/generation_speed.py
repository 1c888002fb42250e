"""Time prefill and greedy decoding of a dense model and of checkpoints pruned from it, in turns within one process.

    python benchmarks/generation_speed.py --dense smollm2 --checkpoints pruned_models/smollm2_sparsity-{0.2,0.33,0.5}

About two minutes on 2 cores for SmolLM2 and three checkpoints. Compare the ratios: absolute times are the
machine's. Beside each ratio stands the one that the weights promise: the multiplications of a token with them, which
pruning leaves in the head and does not count in attention itself. Decoding one sequence reads every weight once for
each token, so the same ratio is promised to a machine that is bound by its memory.
"""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedModel

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.cost import generation_latency
from olica.machine import DEVICES, pick_device
from olica.model.skeleton import count_parameters
from olica.outputs.records import environment, flags_of, write_record
from olica.sources.locate import locate
from olica.sources.weights import DTYPES, read_model


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dense", required=True, help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--checkpoints", required=True, nargs="+", help="folders of pruned checkpoints")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="dtype to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences at a time")
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds, a turn of every model in each")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    parser.add_argument("--prompt_tokens", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens that each sequence is continued by")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise UsageError for a model named twice, a record that cannot be written, or a number below 1."""
    for name in ("batch_size", "repeats", "prompt_tokens", "new_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least 1")
    if len({args.dense, *args.checkpoints}) <= len(args.checkpoints):
        raise UsageError("--checkpoints: a model is named twice")
    if args.output_path:
        check_record_path(args.output_path, "--output_path")


def read_models(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, PreTrainedModel], dict[str, dict]]:
    """The models that the flags name, the dense one first, and what their records say of their sizes."""
    locations = {args.dense: locate(args.dense, "--dense")}
    locations |= {name: locate(name, "--checkpoints") for name in args.checkpoints}
    models = {name: read_model(location, args.dtype).to(device) for name, location in locations.items()}
    sizes = {
        name: {
            "parameters": count_parameters(model),
            "weight_bytes": model.get_memory_footprint(return_buffers=False),
            "file_bytes": locations[name].file_bytes,
        }
        for name, model in models.items()
    }
    return models, sizes


def check_positions(args: argparse.Namespace, models: dict[str, PreTrainedModel]) -> None:
    """Raise UsageError unless prompts and new tokens fit all the models."""
    needed = args.prompt_tokens + args.new_tokens
    positions = min(model.config.max_position_embeddings for model in models.values())
    if needed > positions:
        raise UsageError(f"--prompt_tokens and --new_tokens: {needed} together do not fit {positions} positions")


def draw_ids(models: dict[str, PreTrainedModel], batch_size: int, tokens: int) -> torch.Tensor:
    """Random token ids (B, T) that all the models know."""
    vocabulary = min(model.config.vocab_size for model in models.values())
    return torch.randint(vocabulary, (batch_size, tokens), generator=torch.Generator().manual_seed(0))


def multiplications(model: PreTrainedModel, tokens: int) -> int:
    """Products of weights with features when `tokens` go through the layers and the last one through the head."""
    head = model.get_output_embeddings().weight.numel()
    return tokens * count_parameters(model)["decoder_layers"] + head


def with_rates(args: argparse.Namespace, row: dict, model: PreTrainedModel, dense: PreTrainedModel) -> dict:
    """A model's `row` of the record with tokens per second, and the ratio of times that its weights promise."""
    for stage, tokens in (("prefill", args.prompt_tokens), ("decode", 1)):
        row[stage] |= {
            "tokens_per_s": args.batch_size * tokens / row[stage]["median_s"],
            "promised_ratio": multiplications(model, tokens) / multiplications(dense, tokens),
        }
    return row


def print_table(args: argparse.Namespace, rows: dict[str, dict]) -> None:
    """Print two lines for each model."""
    batch, prompt, new = args.batch_size, args.prompt_tokens, args.new_tokens
    print(f"{batch} x {prompt} tokens, continued by {new}, medians of {args.repeats} rounds; milliseconds")
    print(f"{'model':<44}{'parameters':>13}{'decoder layers':>16}")
    print(f"{'':<4}{'':<9}{'tokens/s':>10}{'median':>9}{'min':>9}{'max':>9}{'ratio':>8}{'promised':>10}")
    for name, row in rows.items():
        print(f"{name:<44}{row['parameters']['total']:>13,}{row['parameters']['decoder_layers']:>16,}")
        for stage in ("prefill", "decode"):
            timed = row[stage]
            milliseconds = "".join(f"{1e3 * timed[key]:>9.1f}" for key in ("median_s", "min_s", "max_s"))
            ratios = f"{timed['ratio']:>8.3f}{timed['promised_ratio']:>10.3f}"
            print(f"{'':<4}{stage:<9}{timed['tokens_per_s']:>10.1f}{milliseconds}{ratios}")


def run(args: argparse.Namespace) -> None:
    """Read the models, time them, print a table and write the record."""
    device = pick_device(args.device)
    check_flags(args)
    models, sizes = read_models(args, device)
    check_positions(args, models)
    prompts = draw_ids(models, args.batch_size, args.prompt_tokens)
    timed = generation_latency(models, prompts, args.new_tokens, args.repeats)
    dense = models[args.dense]
    rows = {name: with_rates(args, sizes[name] | timed[name], model, dense) for name, model in models.items()}
    print_table(args, rows)
    if args.output_path:
        described = {"settings": flags_of(args), "models": rows, "environment": environment(device)}
        write_record(args.output_path, {"kind": "generation speed"} | described)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
