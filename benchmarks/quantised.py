"""Perplexity and bytes of a dense or pruned model whose decoder layers are in 4 bits (NF4 of bitsandbytes).

    python benchmarks/quantised.py --checkpoint smollm2 --ppl wikitext2 --output_path evaluation.json

Every linear layer but the head becomes packed 4-bit weights with a float32 scale for each 64 of them, so that a weight
takes 4.5 bits. The library packs and unpacks them, on the CPU too; they are unpacked once and multiplied in float32:
what is measured is what the weights lost, not the arithmetic of a processor. Embeddings, head and norms stay as they
are, and are counted in the dtype in which they are stored. The record is that of an evaluation. bitsandbytes is needed,
which no list of ours names: `pip install bitsandbytes==0.50.2`.
"""

import argparse
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.evaluate import make_protocol
from olica.evaluation.measures import text_measure
from olica.evaluation.settings import CHOICES, EvaluationSettings
from olica.evaluation.subject import prepare
from olica.machine import pick_device
from olica.model.skeleton import count_parameters
from olica.outputs.records import Stages, environment, write_record
from olica.processes import ALONE
from olica.sources.configuration import describe_source
from olica.sources.locate import locate
from olica.sources.weights import read_model

KIND, BLOCK = "nf4", 64


def bitsandbytes() -> ModuleType:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise UsageError(
            "4 bits are made by bitsandbytes, which is not installed: pip install bitsandbytes==0.50.2"
        ) from error
    return library


def in_four_bits(model: PreTrainedModel, library: ModuleType) -> dict:
    """Round the linear layers of the decoder layers to 4 bits, in place; returns what a record says of it.

    `bytes` are those that the packed weights take, with their scales; the model holds them unpacked.
    """
    rounded = {"unpacked_bytes": 0, "bytes": 0}
    for module in model.get_decoder().layers.modules():
        if isinstance(module, nn.Linear):
            packed, state = library.functional.quantize_4bit(
                module.weight.data, blocksize=BLOCK, quant_type=KIND, compress_statistics=False
            )
            module.weight.data = library.functional.dequantize_4bit(packed, state)
            rounded["unpacked_bytes"] += module.weight.nbytes
            rounded["bytes"] += packed.nbytes + state.absmax.nbytes
    return {"library": f"bitsandbytes {library.__version__}", "kind": KIND, "block": BLOCK, **rounded}


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark, which are those of model_evaluate.py, with its defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="model: a folder, name, hub id or .gguf file")
    add("--ppl", help="texts of the perplexity, names or paths joined by commas")
    add("--ppl_seqlen", type=int, help="tokens per window")
    add("--ppl_windows", type=int, help="only the first so many windows, else all")
    add("--add_bos_token", action="store_true", help="begin every window with the start token (Gemma)")
    add("--data_dir", help="folder searched first for texts")
    add("--device", choices=CHOICES["device"], help="where to run; auto: a GPU if there is one")
    add("--batch_size", type=int, help="windows that go through the model at a time")
    add("--output_path", required=True, help="file of the record")
    defaults = asdict(EvaluationSettings())
    parser.set_defaults(**{action.dest: defaults[action.dest] for action in parser._actions if action.dest in defaults})
    return parser


def run(args: argparse.Namespace) -> None:
    """Quantise the model, measure it, and write the record."""
    asked = EvaluationSettings.of(vars(args))
    check_record_path(Path(asked.output_path), "--output_path")
    library, device, stages = bitsandbytes(), pick_device(asked.device), Stages(pick_device(asked.device))
    location, protocol = locate(asked.checkpoint, "--checkpoint"), make_protocol(asked, "float32")
    subject = prepare("model", location, protocol)
    stored = torch.float32 if location.gguf_file else subject.config.dtype or torch.float32
    model = read_model(location, protocol.dtype).to(device)
    parameters, quantised = count_parameters(model), in_four_bits(model, library)
    whole = model.get_memory_footprint(return_buffers=False)
    result = {
        "model": describe_source(location, subject.config),
        "file_bytes": location.file_bytes,
        "parameters": parameters,
        "dtype": protocol.dtype,
        "quantised": quantised,
        "weight_bytes": (whole - quantised["unpacked_bytes"]) * stored.itemsize // 4 + quantised["bytes"],
        "perplexity": {},
    }
    for text in protocol.texts:
        with stages.stage(f"model: perplexity of {text.name}"):
            result["perplexity"][text.name] = text_measure(model, subject, text, protocol, ALONE)
    record = {
        "kind": "evaluation",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(asked),
        "dtype": protocol.dtype,
        "processes": ALONE.count,
        "results": {"model": result},
        "stages": stages.rows,
        "environment": environment(device),
    }
    write_record(Path(asked.output_path), record)
    print(
        f"weights {result['weight_bytes'] / 1e6:,.1f} MB, {result['quantised']['bytes'] / 1e6:,.1f} MB of them packed"
    )
    for name, measured in result["perplexity"].items():
        print(f"perplexity, {name}, {measured['windows']} windows of {measured['seqlen']}: {measured['value']:.3f}")
    print(f"record {asked.output_path}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
