"""Time the stages of pruning against one dense pass of the calibration set through the decoder layers.

    python benchmarks/pruning_speed.py --base_model pruned_models/plain --datasets ids.safetensors
    python benchmarks/pruning_speed.py --shape 7b --dtype bfloat16 --cache_dev cpu      on a GPU
    python benchmarks/pruning_speed.py --shape 7b --scale 8 --layers 8                  its stand-in on a CPU
    python benchmarks/pruning_speed.py --shape qwen3-8b --layers 2 --num_samples 32     two layers of its own width
    python benchmarks/pruning_speed.py --shape 30b --dtype bfloat16 --dry_run           sizes and expected memory alone

With --shape a model of that shape with random weights is written first, shard by shard, into --work_dir; nothing is
downloaded. The dense pass is measured before and after pruning, in the same process.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from math import prod
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.described import describe
from olica.errors import UsageError
from olica.evaluation.cost import synchronize
from olica.jobs import prepare
from olica.machine import DEVICES, BatchSize, pick_device
from olica.outputs.records import flags_of, write_record
from olica.pruning.activations import propagate, record_layer_calls
from olica.run import run as prune_job
from olica.settings import settings_of
from olica.sources.calibration_set import is_token_file, read_token_file
from olica.sources.configuration import read_config
from olica.sources.locate import locate
from olica.sources.opening import open_dense_model
from olica.sources.weights import DTYPES
from olica.tensor_files import save_tensors


@dataclass(frozen=True)
class Shape:
    """Sizes of a public model, as its config.json has them.

    Attributes:
        hidden: D.
        channels: F.
        heads: of queries.
        kv_heads: of keys and values.
        layers: number of decoder layers.
        vocabulary: rows of the embedding.
        head_dim: width of a head.
        is_tied: whether the head is the embedding.
        model_type: family.
    """

    hidden: int
    channels: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 32000
    head_dim: int = 128
    is_tied: bool = False
    model_type: str = "llama"


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "30b": Shape(6656, 17920, 52, 52, 60),
    "65b": Shape(8192, 22016, 64, 64, 80),
    "llama2-70b": Shape(8192, 28672, 64, 8, 80),
    "llama3.2-1b": Shape(2048, 8192, 32, 8, 16, vocabulary=128256, head_dim=64, is_tied=True),
    "llama3.2-3b": Shape(3072, 8192, 24, 8, 28, vocabulary=128256, is_tied=True),
    "llama3-8b": Shape(4096, 14336, 32, 8, 32, vocabulary=128256),
    "llama3-70b": Shape(8192, 28672, 64, 8, 80, vocabulary=128256),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 36, vocabulary=151936, model_type="qwen3"),
}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Flags that go to model_pruning.py as they are, and the batches of the dense pass, whatever those of pruning are.
PRUNING_FLAGS = ("dtype", "device", "cache_dev", "recipe")
DENSE_BATCH_SIZE = 16
# What is timed, and under which names: functions of the library, by the modules that call them.
STAGES = {
    "embed": ("olica.pruning.survey.enter_layers", "olica.pruning.layers.enter_layers"),
    "survey: dense layers, sums": ("olica.pruning.survey.calibrate",),
    "survey: regressions": ("olica.methods.olica.OlicaSurvey.__call__",),
    "survey: errors by size": ("olica.methods.damage.DamageSurvey.__call__",),
    "survey: variants on their way": ("olica.pruning.survey.propagate",),
    "survey: variants compared": ("olica.pruning.survey.Probes.complete",),
    "prune: dense layers, sums": ("olica.pruning.layers.calibrate",),
    "prune: query, key": ("olica.methods.query_key.LowRankQueryKey.__call__",),
    "prune: value, output": ("olica.methods.value_output.NarrowedHeads.__call__",),
    "prune: MLP, correction": ("olica.methods.feed_forward.ThinnedMLP.__call__",),
    "prune: pruned layers": ("olica.pruning.layers.propagate",),
}


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--base_model", help="dense model: name, hub id, folder or .gguf file")
    model.add_argument("--shape", choices=[*SHAPES], help="a model of this shape with random weights")
    parser.add_argument("--scale", type=int, default=1, help="divides widths, heads and vocabulary of --shape")
    parser.add_argument("--layers", type=int, help="layers of --shape (default: its own)")
    parser.add_argument("--datasets", help="token file (default: random tokens)")
    parser.add_argument("--num_samples", type=int, default=256, help="random samples (default: 256)")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens per random sample (default: 128)")
    parser.add_argument("--dtype", default="float32", choices=[*DTYPES], help="default: float32")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="default: auto")
    parser.add_argument("--cache_dev", default="auto", choices=DEVICES, help="default: auto")
    parser.add_argument("--batch_size", default="16", help="as of model_pruning.py (default: 16)")
    parser.add_argument("--sparsity", type=float, default=0.2, help="default: 0.2")
    parser.add_argument("--recipe", default="olica", help="default: olica")
    parser.add_argument("--mlp_num", type=int, help="of recipes that have it (default: the recipe's)")
    parser.add_argument("--dry_run", action="store_true", help="print what is expected of --shape, no weight written")
    parser.add_argument("--work_dir", type=Path, default=Path("pruning_speed"), help="receives models and tokens")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def start_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, dict[str, torch.Size]]:
    """Write all of a model but its weights into an empty folder; returns their sizes, by name, for each file of theirs.

    Every decoder layer has a file of its own.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config.dtype = dtype
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else name.split(".")[-2], []).append(name)
    files = {f"model-{n:05}-of-{len(groups):05}.safetensors": names for n, names in enumerate(groups.values(), 1)}
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {file: {name: shapes[name] for name in names} for file, names in files.items()}


def write_hollow_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Write a model whose weights are holes in files: it can be planned with and takes no room on the disk."""
    for file, shapes in start_model(folder, config, dtype).items():
        header, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(opened.tell() + end)


def write_random_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Write a model with random weights, drawn on `device`, one decoder layer in memory at a time."""
    torch.manual_seed(0)
    for file, shapes in start_model(folder, config, dtype).items():
        weights = {name: _random_weight(shape, device).to(dtype).cpu() for name, shape in shapes.items()}
        save_tensors(weights, folder / file, metadata={"format": "pt"})


def _random_weight(shape: torch.Size, device: torch.device) -> torch.Tensor:
    weight = torch.ones(shape, device=device)
    return weight if len(shape) == 1 else weight.normal_(0, 0.02)


def shape_config(shape: Shape, scale: int = 1, layers: int | None = None) -> PreTrainedConfig:
    """Configuration of a model of the shape: widths, heads and vocabulary divided by `scale`, `layers` or its own."""
    return AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocabulary // scale,
        hidden_size=shape.hidden // scale,
        intermediate_size=shape.channels // scale,
        num_attention_heads=shape.heads // scale,
        num_key_value_heads=shape.kv_heads // scale,
        head_dim=shape.head_dim,
        num_hidden_layers=layers or shape.layers,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=2048,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[shape.model_type]],
    )


def asked_config(args: argparse.Namespace) -> PreTrainedConfig:
    """Configuration of the model that --shape, --scale and --layers describe."""
    shape = SHAPES[args.shape]
    if args.scale < 1 or shape.kv_heads % args.scale:
        raise UsageError(f"--scale {args.scale} does not divide the {shape.kv_heads} key/value heads of {args.shape}")
    return shape_config(shape, args.scale, args.layers)


@torch.no_grad()
def dense_pass(location, dtype: str, ids: torch.Tensor, batch_size: int, device, cache_device) -> float:
    """Seconds that the calibration set (N, T) takes through the dense decoder layers; reading them is not counted."""
    dense, seconds = open_dense_model(location, dtype), 0.0
    with dense.embedding():
        hidden, calls = record_layer_calls(dense.decoder, ids, cache_device)
    for index, layer in dense.layers(device, "dense pass"):
        synchronize(device)
        start = time.perf_counter()
        propagate(layer, hidden, calls[index], BatchSize(batch_size))
        synchronize(device)
        seconds += time.perf_counter() - start
    return seconds


@contextmanager
def timed_stages(device: torch.device):
    """Time what happens inside by the names of STAGES: yields their seconds."""
    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*arguments, **settings):
            synchronize(device)
            start = time.perf_counter()
            result = function(*arguments, **settings)
            synchronize(device)
            seconds[stage] += time.perf_counter() - start
            return result

        return call

    with ExitStack() as patches:
        for stage, targets in STAGES.items():
            for target in targets:
                patches.enter_context(patch(target, timed(stage, resolve_name(target))))
        yield seconds


def run(args: argparse.Namespace) -> None:
    """Make the model if need be, time the dense pass and the pruning, print a table and write the record."""
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    if args.datasets and not is_token_file(args.datasets):
        raise UsageError(f"--datasets {args.datasets}: this benchmark takes a token file")
    if args.dry_run and not args.shape:
        raise UsageError("--dry_run goes with --shape; for --base_model give it to model_pruning.py")
    device = pick_device(args.device)
    cache_device = device if args.cache_dev == "auto" else pick_device(args.cache_dev, "--cache_dev")
    name = args.base_model or str(args.work_dir / f"{args.shape}-{args.scale}-{args.layers or 'all'}")
    if args.dry_run:
        write_hollow_model(Path(name), asked_config(args), DTYPES[args.dtype])
    elif args.shape:
        write_random_model(Path(name), asked_config(args), DTYPES[args.dtype], device)
    location = locate(name)
    tokens = Path(args.datasets or args.work_dir / "ids.safetensors")
    if not args.datasets:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(read_config(location).vocab_size, (args.num_samples, args.seqlen), generator=generator)
        tokens.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"calibration_ids": drawn}, tokens, metadata={})
    flags = {name: getattr(args, name) for name in PRUNING_FLAGS}
    if args.mlp_num is not None:
        flags["mlp_num"] = args.mlp_num
    flags["batch_size"] = args.batch_size if args.batch_size == "auto" else int(args.batch_size)
    data_dir = args.work_dir / "data"
    shutil.rmtree(data_dir, ignore_errors=True)  # a survey that is taken up is no measurement
    flags |= {"base_model": name, "datasets": str(tokens), "data_dir": str(data_dir), "overwrite": True}
    flags["save_dir"] = str(args.work_dir / "pruned")
    (job,) = prepare(settings_of(flags), [args.sparsity])
    if args.dry_run:
        print(describe(job))
        return
    ids = read_token_file(tokens).ids

    def dense(ids: torch.Tensor) -> float:
        return dense_pass(location, args.dtype, ids, DENSE_BATCH_SIZE, device, cache_device)

    dense(ids[:DENSE_BATCH_SIZE])  # what is done once only
    passes = [dense(ids)]
    with timed_stages(device) as seconds:
        record = prune_job(job).record
    passes.append(dense(ids))
    if record["went_on_after"]:
        raise UsageError("--work_dir: this finished a run that had been killed, which is no measurement; run it again")
    report(args, passes, seconds, record)


def print_memory(how: str, peaks: dict[str, int | None]) -> None:
    """Print the peaks of host and device."""
    values = (f"{kind.removesuffix('_bytes')} {value / 1e9:.2f} GB" for kind, value in peaks.items() if value)
    print(f"peak memory, {how}: {', '.join(values)}")


def report(args: argparse.Namespace, passes: list[float], seconds: dict[str, float], record: dict) -> None:
    """Print the stages in seconds and in dense passes, and the memory; write the record."""
    whole = sum(60 * record["stages"][name]["minutes"] for name in ("survey", "prune", "write"))
    rows = seconds | {"all else: reading, writing, waiting": whole - sum(seconds.values()), "pruning": whole}
    dense = statistics.mean(passes)
    print(f"\ndense pass {passes[0]:.2f} s before, {passes[1]:.2f} s after")
    print(f"{'stage':<40}{'seconds':>9}{'dense passes':>14}")
    for name, value in rows.items():
        print(f"{name:<40}{value:>9.2f}{value / dense:>14.3f}")
    measured = {
        kind: max(stage[kind] for stage in record["stages"].values()) if record["stages"]["prune"][kind] else None
        for kind in ("host_bytes", "device_bytes")
    }
    print_memory("measured", measured)
    print_memory("expected", record["expected_peak_memory"])
    if args.output_path:
        write_record(
            args.output_path,
            {
                "kind": "pruning speed",
                "settings": flags_of(args),
                "layers": len(record["plan"]),
                "calibration": record["calibration"]["ids"],
                "dense_pass_seconds": passes,
                "stages": {name: {"seconds": v, "dense_passes": v / dense} for name, v in rows.items()},
                "peak_memory": measured,
                "expected_peak_memory": record["expected_peak_memory"],
                "parameters": record["parameters"],
                "corrected_layers": record["corrected_layers"],
                "environment": record["environment"],
            },
        )


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
