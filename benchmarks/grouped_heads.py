r"""Perplexity of a model pruned with other shares of the attention projections, the MLPs losing the rest.

    python benchmarks/grouped_heads.py --datasets alpaca --data_dir data --ppl a.jsonl,b.jsonl \
        --points 0.1:0.2,0.2 0.1:0.5,0

A point is SPARSITY:QUERY,KEY or SPARSITY:QUERY,KEY,VALUE_OUTPUT, the sparsity a share of the decoder layers; where
value/output is not given it loses what the released code takes. All points are measured on the same windows, so their
differences are surer than their standard errors; the record has the windows. Texts that a table reports are no place to
choose.
"""

import argparse
import copy
from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from pathlib import Path

import torch

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.perplexity import perplexity, token_windows
from olica.jobs import plan_before_survey
from olica.machine import BatchSize, pick_device
from olica.methods.recipe import Method
from olica.methods.recipes import RECIPES
from olica.methods.shares import Sparsities, released_sparsities, spend_rest
from olica.methods.sizes import Budget, Sizes
from olica.model.skeleton import count_parameters
from olica.outputs.records import environment, write_record
from olica.pruning.layers import prune_layers
from olica.pruning.options import PruningOptions, Work
from olica.pruning.progress import Progress, SurveyProgress
from olica.pruning.survey import survey_layers
from olica.sources.calibration_set import CalibrationSet, Draw, build_calibration_set
from olica.sources.configuration import count_dense_parameters, describe_source, read_config, refuse_unprunable
from olica.sources.dense_model import DenseModel
from olica.sources.locate import locate
from olica.sources.text_sources import evaluation_text
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import DTYPES, read_model

BATCH_SIZE = 16


@dataclass(frozen=True)
class Point:
    """A sparsity of the whole model, and shares that the attention projections lose."""

    sparsity: float
    query: float
    key: float
    value_output: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Point":
        """The point written as SPARSITY:QUERY,KEY or SPARSITY:QUERY,KEY,VALUE_OUTPUT."""
        sparsity, _, shares = text.partition(":")
        return cls(float(sparsity), *map(float, shares.split(",")))

    def shares(self, sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
        """What every part of a layer loses: a rule of `FixedShares`."""
        value_output = self.value_output
        if value_output is None:
            value_output = released_sparsities(sizes, budget, k).value_output
        return spend_rest(sizes, budget, self.query, self.key, value_output)

    def in_place_of(self, method: Method) -> Method:
        """The method with these shares."""
        return replace(method, allocate=replace(method.allocate, rule=self.shares))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--base_model", default="smollm2", help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--datasets", required=True, help="calibration texts joined by +, or one token file")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder searched first for texts")
    form = "SPARSITY:QUERY,KEY[,VALUE_OUTPUT]"
    parser.add_argument("--points", required=True, nargs="+", type=Point.parse, help=form)
    parser.add_argument("--num_samples", type=int, default=128, help="samples drawn from each text")
    parser.add_argument("--ppl", required=True, help="texts of the perplexity, names or paths joined by commas")
    parser.add_argument("--ppl_windows", type=int, default=256, help="windows of 128 tokens, of each text")
    parser.add_argument("--mlp_num", type=int, default=6, help="number of MLPs that get a linear correction")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def check_points(points: list[Point], method: Method, sizes: list[Sizes], whole: int) -> None:
    """Raise UsageError for a point that is impossible."""
    for point in points:
        budget = Budget(whole, point.sparsity)
        shape, *_ = plan_before_survey(RECIPES["olica"], point.in_place_of(method), sizes, budget)
        if shape.intermediate_size == sizes[0].intermediate_size:
            raise UsageError(f"--points: {point} leaves nothing for the MLPs to lose")


def draw_calibration_set(args: argparse.Namespace, tokenizer, config) -> CalibrationSet:
    """The calibration set as `model_pruning.py` draws it by default."""
    return build_calibration_set(
        args.datasets,
        tokenizer,
        Draw(args.num_samples),
        data_dir=args.data_dir,
        cache_dir=args.data_dir / "calibration",
        vocab_size=config.vocab_size,
    )


def measure(model, windows: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Perplexity of every text, each with the negative log-likelihood of every window."""
    return {name: asdict(perplexity(model, ids, BATCH_SIZE)) for name, ids in windows.items()}


def run(args: argparse.Namespace) -> None:
    """Survey the model once, measure it, then prune a copy and measure that for every point."""
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    location, device = locate(args.base_model), pick_device(args.device)
    config, tokenizer = read_config(location), read_tokenizer(location)
    refuse_unprunable(config, location)
    if tokenizer is None:
        raise UsageError(f"--base_model {args.base_model}: the folder has no tokenizer, which the windows need")
    calibration = draw_calibration_set(args, tokenizer, config)
    windows = {}
    for name in args.ppl.split(","):
        text, _ = evaluation_text(expanduser(name), args.data_dir, flag="--ppl")
        windows[Path(name).name] = token_windows(tokenizer, text, 128, args.ppl_windows)
    recipe, sizes = RECIPES["olica"], [Sizes.of(config)] * config.num_hidden_layers
    method = recipe.method(recipe.with_parameters({"mlp_num": args.mlp_num}))
    whole = count_dense_parameters(location, config)["decoder_layers"]
    check_points(args.points, method, sizes, whole)
    options = PruningOptions(BatchSize(BATCH_SIZE), device, device)
    dense = read_model(location, args.dtype)
    record = {
        "kind": "grouped heads",
        "settings": {name: str(value) for name, value in vars(args).items()},
        "model": describe_source(location, config),
        "calibration": {"sources": calibration.sources, "token_hash": calibration.token_hash},
        "dense": {"parameters": count_parameters(dense), "perplexity": measure(dense.to(device), windows)},
        "points": [],
        "environment": environment(device),
    }
    dense.to("cpu")
    # Neither the bases nor the ranking of the layers depend on the sizes.
    findings = survey_layers(Work(DenseModel(dense), calibration.ids, method, options), None, SurveyProgress())
    print(f"{'sparsity':>8}{'query':>8}{'key':>8}{'v/o':>8}{'MLPs':>8}{'parameters':>14}  " + "  ".join(windows))
    for point in args.points:
        allocate, budget = point.in_place_of(method).allocate, Budget(whole, point.sparsity)
        plan, shares = allocate(sizes, budget, findings), allocate.shares(sizes, budget)
        model = copy.deepcopy(dense)
        prune_layers(Work(DenseModel(model), calibration.ids, method, options), plan, findings, Progress())
        measured = measure(model.to(device), windows)
        record["points"].append({
            "sparsity": point.sparsity,
            "shares_removed": shares,
            "shape": plan[-1].to_dict(),
            "parameters": count_parameters(model),
            "perplexity": measured,
        })  # fmt: skip
        lost = "".join(f"{share:>8.3f}" for share in shares.values())
        values = "  ".join(f"{of_text['value']:.2f}" for of_text in measured.values())
        print(f"{point.sparsity:>8g}{lost}{model.num_parameters():>14,}  {values}", flush=True)
        if args.output_path:  # after every point: the next one may be stopped
            write_record(args.output_path, record)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
