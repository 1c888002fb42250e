r"""What a least-squares refit of down_proj leaves of the error of a thinned MLP, on other text than it was fitted to.

    python benchmarks/refit_texts.py --texts bookcorpus,alpaca,openwebtext_1000.jsonl.gz,pysource --data_dir data

Second moments of texts add up, so one pass over each text gives all mixes of them: of every text half of the samples
is for fitting, half for measuring. In every dense layer the MLP keeps the channels that olica-plus would keep, by the
mix; a figure is the error of the refitted MLP over that of the same channels as they were, the geometric mean over
the layers. Below 1 the refit helps. Texts that a table reports are no place to choose.
"""

import argparse
from itertools import combinations
from os.path import expanduser
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.machine import DEVICES, BatchSize, pick_device
from olica.methods.feed_forward import balanced_importance
from olica.methods.moments import Moments, diagonal, full
from olica.methods.refit import LeastSquares
from olica.methods.thinning import highest
from olica.model.modeling_olica import projections_of
from olica.outputs.records import environment, flags_of, write_record
from olica.pruning.activations import calibrate, enter_layers
from olica.sources.calibration_set import Draw, build_calibration_set
from olica.sources.configuration import describe_source, read_config, refuse_unprunable
from olica.sources.locate import locate
from olica.sources.opening import open_dense_model
from olica.sources.tokenizers import read_tokenizer

BATCH_SIZE = 8


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base_model", default="smollm2", help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--texts", required=True, help="names or paths joined by commas")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder searched first for texts")
    parser.add_argument("--num_samples", type=int, default=128, help="samples of each text, half of them to measure on")
    parser.add_argument("--share", type=float, default=0.7, help="of the channels that stay")
    parser.add_argument("--ridges", type=float, nargs="+", default=[0.01, 0.1, 0.3, 1.0, 3.0], help="of the refit")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def mixes_of(texts: list[str]) -> list[tuple[str, ...]]:
    """Each text alone, and all mixes of two and more."""
    return [mix for size in range(1, len(texts) + 1) for mix in combinations(texts, size)]


def second_moments(layer, streams: dict, index: int) -> dict[tuple[str, str], Moments]:
    """Moments of the MLP's intermediate features by text and half, while all texts go through the layer."""
    found = {}
    for text, (hidden, calls) in streams.items():
        half = len(hidden) // 2
        for name, rows in (("fit", slice(0, half)), ("measure", slice(half, None))):
            moments = Moments([full("intermediate"), diagonal("mlp_input")], 1)
            calibrate(layer, hidden[rows], calls[index], moments, BatchSize(BATCH_SIZE), advance=True)
            found[text, name] = moments
    return found


def remaining(weight: Tensor, kept: Tensor, refitted: Tensor, moment: Tensor) -> float:
    """tr(dW C dW^T) over the same of the columns as they were, dW what W (O, f) loses."""

    def error(columns: Tensor) -> Tensor:
        lost = weight.clone()
        lost[:, kept] -= columns
        return ((lost @ moment) * lost).sum()

    return (error(refitted) / error(weight[:, kept])).item()


def scores(projections, fitted: list[Moments]) -> Tensor:
    """Importance (F,) of the channels by a mix, as olica-plus ranks them."""
    mixed = {
        statistic: sum(moments[statistic] / moments.count for moments in fitted)
        for statistic in balanced_importance.needs
    }
    return balanced_importance(SimpleNamespace(weights=projections, moments=mixed))


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """Stream all texts through the dense layers together, and fit and measure in each."""
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    if not 0 < args.share < 1:
        raise UsageError(f"--share {args.share:g} is outside (0, 1)")
    if min(args.ridges) <= 0:
        raise UsageError("--ridges must be above 0")
    location, device = locate(args.base_model), pick_device(args.device)
    config, tokenizer = read_config(location), read_tokenizer(location)
    refuse_unprunable(config, location)
    texts = [expanduser(name) for name in args.texts.split(",")]
    drawn = {}
    for text in texts:
        calibration = build_calibration_set(
            text,
            tokenizer,
            Draw(args.num_samples),
            data_dir=args.data_dir,
            cache_dir=args.data_dir / "calibration",
            vocab_size=config.vocab_size,
        )
        if len(calibration.ids) < 2:
            raise UsageError("--num_samples: give at least 2, half of which are measured on")
        drawn[text] = calibration
    dense, mixes = open_dense_model(location), mixes_of(texts)
    streams = {text: enter_layers(dense, calibration.ids, None, device) for text, calibration in drawn.items()}
    logarithms = torch.zeros(len(mixes), len(args.ridges), len(texts), dtype=torch.float64)
    for index, layer in dense.layers(device, "layers"):
        moments, projections = second_moments(layer, streams, index), projections_of(layer)
        weight = projections.down_proj.weight.double()
        means = {key: found[full("intermediate")] / found.count for key, found in moments.items()}
        for number, mix in enumerate(mixes):
            kept = highest(scores(projections, [moments[text, "fit"] for text in mix]), int(args.share * len(weight.T)))
            moment = sum(means[text, "fit"] for text in mix) / len(mix)
            for place, ridge in enumerate(args.ridges):
                refitted = LeastSquares(ridge)(weight, kept, moment)
                left = [remaining(weight, kept, refitted, means[text, "measure"]) for text in texts]
                logarithms[number, place] += torch.tensor(left).log()
    left = (logarithms / config.num_hidden_layers).exp()
    record = {
        "kind": "refit texts",
        "settings": flags_of(args),
        "model": describe_source(location, config),
        "texts": {text: {"sources": c.sources, "token_hash": c.token_hash} for text, c in drawn.items()},
        "error_left": [
            {"fitted_to": list(mix), "ridge": ridge, "measured_on": dict(zip(texts, left[m, r].tolist(), strict=True))}
            for m, mix in enumerate(mixes)
            for r, ridge in enumerate(args.ridges)
        ],
        "environment": environment(device),
    }
    names = [Path(text).name.partition(".")[0] for text in texts]
    print("error that a refit leaves, share of that of the same channels as they were; columns: measured on")
    print(f"{'ridge':>6}" + "".join(f"{name[:16]:>18}" for name in names) + "  fitted to")
    for row in record["error_left"]:
        figures = "".join(f"{value:>18.3f}" for value in row["measured_on"].values())
        print(f"{row['ridge']:>6g}{figures}  " + " + ".join(Path(text).name for text in row["fitted_to"]))
    if args.output_path:
        write_record(args.output_path, record)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
