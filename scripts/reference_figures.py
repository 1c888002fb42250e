"""Repeat the released code's run on SmolLM2-135M-Instruct and print its figures beside ours.

The released code knows neither grouped heads nor tied embeddings, so the model is made plain first, which changes
no output. The folder `--reference_dir` holds `smollm2_ids.safetensors`: calibration tokens and perplexity windows.

    python scripts/reference_figures.py --reference_dir DIR        about 10 minutes on 2 cores, 3 GB
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.perplexity import perplexity
from olica.outputs.records import write_record
from olica.run import prune
from olica.sources.locate import locate
from olica.sources.weights import read_model

ROOT = Path(__file__).resolve().parents[1]
BATCH_SIZE = 16
PERPLEXITY_TOLERANCE = 0.003


def make_plain(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same function with a key/value head for every query head and a head of its own."""
    settings = model.config.to_dict()
    groups = settings["num_attention_heads"] // settings["num_key_value_heads"]
    plain = LlamaConfig(
        **settings | {"num_key_value_heads": settings["num_attention_heads"], "tie_word_embeddings": False}
    )
    weights = dict(model.state_dict())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weights[name].unflatten(0, (settings["num_key_value_heads"], -1))
            weights[name] = heads.repeat_interleave(groups, dim=0).flatten(0, 1)
    result = LlamaForCausalLM(plain).eval()
    result.load_state_dict(weights)
    return result


def measure(reference: dict, ids_file: Path, folder: Path) -> dict:
    """Prune the plain model, and collect our figures under the reference's names."""
    windows = load_file(ids_file)["perplexity_windows"].long()
    plain = make_plain(read_model(locate("smollm2"), "float32"))
    plain.save_pretrained(folder / "plain")
    figures = {
        "parameters_before": plain.num_parameters(),
        "dense_perplexity": perplexity(plain, windows, BATCH_SIZE).value,
    }
    asked = {"datasets": str(ids_file), "save_dir": folder, "data_dir": str(folder), **reference["options"]}
    done = prune(folder / "plain", overwrite=True, **asked)
    record = done.record
    pruned = AutoModelForCausalLM.from_pretrained(done.folder).eval()
    shape = record["plan"][0]
    return figures | {
        "pruned_perplexity": perplexity(pruned, windows, BATCH_SIZE).value,
        "parameters_after": pruned.num_parameters(),
        "measured_sparsity": record["measured_sparsity"],
        "query_key_sparsity": record["shares_removed"]["query"],
        "value_output_sparsity": record["shares_removed"]["value_output"],
        "feed_forward_sparsity": record["shares_removed"]["feed_forward"],
        "q_rank": shape["q_rank"],
        "v_width": shape["v_head_dim"] * pruned.config.num_key_value_heads,
        "intermediate_size": shape["intermediate_size"],
        "calibrated_layers": record["corrected_layers"],
        "pruning_record": record,
    }


def agrees(name: str, expected, ours) -> bool:
    """Whether a figure is the released code's: perplexities within 0.3 %, shares as printed, all else equal."""
    if name.endswith("perplexity"):
        return abs(ours / expected - 1) <= PERPLEXITY_TOLERANCE
    if isinstance(expected, float):
        return abs(ours - expected) < 1e-6
    return ours == expected


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_dir", required=True, type=Path, help="folder of smollm2_ids.safetensors")
    parser.add_argument(
        "--work_dir", type=Path, default=Path("reference_run"), help="receives both models (default: reference_run)"
    )
    parser.add_argument("--output_path", type=Path, help="file of the record (default: none)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print both columns, write the record if asked, and end with status 1 unless every figure agrees."""
    ids_file = args.reference_dir / "smollm2_ids.safetensors"
    if not ids_file.is_file():
        raise UsageError(f"--reference_dir: there is no {ids_file}")
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    reference = json.loads((ROOT / "tests/data/reference_smollm2.json").read_text())
    with torch.inference_mode():
        ours = measure(reference, ids_file, args.work_dir)
    print(f"{'figure':<24}{'released code':>28}{'ours':>28}")
    agreement = {}
    for name, expected in reference["figures"].items():
        agreement[name] = agrees(name, expected, ours[name])
        mark = "" if agreement[name] else "  differs"
        print(f"{name:<24}{str(expected):>28}{str(ours[name]):>28}{mark}")
    if args.output_path:
        write_record(args.output_path, {"kind": "reference", "reference": reference, "ours": ours})
    if not all(agreement.values()):
        sys.exit(1)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
