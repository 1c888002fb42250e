"""Measure how much host memory pruning a GGUF file takes, and whether it grows with the model's depth.

    python benchmarks/reading_memory.py --base_model FILE.gguf --output_path shallow.json
    python benchmarks/reading_memory.py --base_model FILE.gguf --layers 92 --output_path deep.json

With --layers the file is written anew into --work_dir with so many decoder layers, its own over and over. The peaks are
resident sizes of this process, which builds no file itself, from its start on.
"""

import argparse
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.jobs import prepare
from olica.machine import peak_memory
from olica.outputs.records import write_record
from olica.run import run as prune_job
from olica.settings import settings_of
from olica.tensor_files import save_tensors

CPU = torch.device("cpu")
# What is measured takes no more memory of more text than the hidden states of it.
SAMPLES, SEQLEN = 8, 128


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", type=Path, required=True, help="dense model: a .gguf file")
    parser.add_argument("--layers", type=int, help="decoder layers (default: those of the file)")
    parser.add_argument("--sparsity", type=float, default=0.2, help="default: 0.2")
    parser.add_argument("--recipe", default="olica", help="default: olica")
    parser.add_argument("--work_dir", type=Path, default=Path("reading_memory"), help="receives models and tokens")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def deepen(source: Path, target: Path, layers: int) -> None:
    """Write the model of a GGUF file anew with another number of decoder layers: its own, over and over."""
    reader = GGUFReader(source)
    family = reader.fields[Keys.General.ARCHITECTURE].contents()
    block_count = Keys.LLM.BLOCK_COUNT.format(arch=family)
    own = reader.fields[block_count].contents()
    writer = GGUFWriter(target, family)
    for name, field in reader.fields.items():
        if name != Keys.General.ARCHITECTURE and not name.startswith("GGUF."):  # which the writer adds
            value = layers if name == block_count else field.contents()
            kind, *of = field.types
            writer.add_key_value(name, value, kind, of[-1] if kind == GGUFValueType.ARRAY else None)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    placed = {name: name for name in tensors if not name.startswith("blk.")}
    for index in range(layers):
        prefix = f"blk.{index % own}."
        placed |= {name.replace(prefix, f"blk.{index}.", 1): name for name in tensors if name.startswith(prefix)}
    for name, taken in placed.items():
        writer.add_tensor(name, tensors[taken].data, raw_dtype=tensors[taken].tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(args: argparse.Namespace) -> None:
    """Make the file if need be, prune it, print the peaks and write the record."""
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    if args.layers is not None and args.layers < 1:
        raise UsageError(f"--layers {args.layers}: there has to be one at least")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    model = args.base_model
    if args.layers:
        model = args.work_dir / f"{args.base_model.stem}-{args.layers}.gguf"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as another:
            another.submit(deepen, args.base_model, model, args.layers).result()
    tokens = args.work_dir / "ids.safetensors"
    drawn = torch.randint(1000, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0))
    save_tensors({"calibration_ids": drawn}, tokens, metadata={})
    data_dir = args.work_dir / "data"
    shutil.rmtree(data_dir, ignore_errors=True)  # a survey that is taken up is no measurement
    flags = {"base_model": str(model), "datasets": str(tokens), "recipe": args.recipe, "device": "cpu"}
    flags |= {"save_dir": str(args.work_dir / "pruned"), "data_dir": str(data_dir), "overwrite": True}
    (job,) = prepare(settings_of(flags), [args.sparsity])
    before = peak_memory(CPU)["host_bytes"]
    pruned = prune_job(job).record
    peaks = {"prepare": before} | {name: stage["host_bytes"] for name, stage in pruned["stages"].items()}
    layers, parameters = len(pruned["plan"]), pruned["parameters"]["before"]
    for name, peak in peaks.items():
        print(f"{name:<16}{peak / 1e9:>6.2f} GB")
    print(f"{layers} layers, {parameters:,} parameters: at most {max(peaks.values()) / 1e9:.2f} GB")
    if args.output_path:
        record = {
            "kind": "reading memory",
            "file": model.name,
            "file_bytes": model.stat().st_size,
            "layers": layers,
            "parameters": parameters,
            "calibration_ids": [SAMPLES, SEQLEN],
            "recipe": args.recipe,
            "sparsity": args.sparsity,
            "peak_host_bytes": max(peaks.values()),
            "peak_host_bytes_of_stages": peaks,
            "expected_peak_memory": pruned["expected_peak_memory"],
            "environment": pruned["environment"],
        }
        write_record(args.output_path, record)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
