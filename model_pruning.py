"""Prune a LLaMA-like checkpoint layer by layer, without retraining, and save it."""

import stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    stopping.at_once()

import argparse
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from os.path import expanduser
from pathlib import Path

from transformers import PreTrainedConfig

from olica import LayerShape
from olica.command_line import run_command
from olica.errors import UsageError, memory_in_words
from olica.evaluation import cost
from olica.machine import BatchSize, pick_device
from olica.methods.allocation import (
    Sparsities,
    allocate,
    correction_rank,
    describe_plan,
    jumps,
    with_corrections,
)
from olica.methods.recipes import RECIPES, Recipe, recipe_name
from olica.model.configuration_olica import head_dim
from olica.outputs import checkpoint, identity, records
from olica.outputs.model_card import write_card
from olica.outputs.run_folder import RunFolder
from olica.pruning.layers import prune_layers
from olica.pruning.memory import Task, expected_peaks, fit_batch_size
from olica.pruning.options import PruningOptions, check_mlp_num
from olica.pruning.survey import choose_corrected, survey_layers
from olica.sources import weights
from olica.sources.calibration_set import CalibrationSet, build_calibration_set, calibration_shape, is_token_file
from olica.sources.configuration import count_dense_parameters, describe_source, read_config, refuse_unprunable, try_out
from olica.sources.dense_model import is_streamed, open_dense_model
from olica.sources.locate import Location, locate
from olica.sources.tokenizers import read_tokenizer


def build_parser() -> argparse.ArgumentParser:
    """The flags of the released code, with its defaults, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add(
        "--base_model",
        default="7b",
        type=expanduser,
        help="name (7b, llama2-7b, smollm2, ...), hub id, folder or .gguf file",
    )
    add("--dtype", default="auto", choices=["auto", *weights.DTYPES], help="to run and save in; auto: as stored")
    add = parser.add_argument_group("calibration set").add_argument
    add("--datasets", default="bookcorpus+alpaca", help="texts joined by +: names or paths; or one token file")
    add(
        "--data_dir",
        default="./data",
        type=expanduser,
        help="folder searched first for named texts; drawn tokens are kept there",
    )
    add("--num_samples", type=int, default=128, help="samples drawn from each text")
    add("--seqlen", type=int, default=128, help="tokens per sample")
    add("--seed", type=int, default=0, help="seed of the draw")
    add = parser.add_argument_group("pruning").add_argument
    add(
        "--recipe",
        default="olica",
        type=recipe_name,
        choices=[*RECIPES],
        help="what is computed at each stage, see the README",
    )
    add("--sparsity", type=float, default=0.2, help="share of the parameters to remove, in [0, 1)")
    add(
        "--sparsity_of",
        default=checkpoint.SPARSITY_OF[0],
        choices=checkpoint.SPARSITY_OF,
        help="what --sparsity is a share of: the whole model, or its decoder layers",
    )
    add("--k", type=float, default=3.0, help="how many times the share of value/output query/key lose")
    add("--mlp_num", type=int, default=6, help="number of MLPs that get a linear calibration")
    add("--ratio", type=float, default=0.03, help="rank of a calibration, a share of the hidden size in (0, 1]")
    add("--round_to", type=int, default=1, help="make sizes multiples of this, which some kernels run faster; 1: off")
    add("--percdamp", type=float, default=0.5, help="ridge penalty in mean diagonals of X^T X, above 0")
    add = parser.add_argument_group("machine").add_argument
    devices = ["auto", "cpu", "cuda"]
    add("--device", default="auto", choices=devices, help="where layers run; auto: a GPU if there is one")
    add("--cache_dev", default="auto", choices=devices, help="where hidden states live; auto: where layers run")
    add("--batch_size", type=batch_size, default=16, help="samples that go through a layer at a time; auto: what fits")
    add = parser.add_argument_group("output").add_argument
    add("--save_dir", default="./pruned_models", type=expanduser, help="folder that receives the checkpoint's folder")
    add("--overwrite", action="store_true", help="replace an existing checkpoint")
    add("--dry_run", action="store_true", help="print sizes, parameters and expected memory, then stop")
    return parser


def memory_advice(args: argparse.Namespace, of_host: bool) -> str:
    """What to do when memory, the host's or a GPU's, runs out with a single sample at a time, or outside of batches."""
    ways = ["a --dtype of half the width", "a smaller calibration set (--num_samples, --seqlen)"]
    if pick_device(args.device).type == "cuda":
        if of_host == (args.cache_dev == "cpu"):  # hidden states live where there is no room
            ways.insert(0, f"--cache_dev {'cuda' if of_host else 'cpu'}")
        if not of_host:
            ways.append("--device cpu")
    return f"give {', '.join(ways[:-1])} or {ways[-1]}"


def batch_size(text: str) -> int | str:
    """The type of --batch_size: a number, or auto."""
    return text if text == "auto" else int(text)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise UsageError for a number that no model could satisfy."""
    if not 0 <= args.sparsity < 1:
        raise UsageError(f"--sparsity {args.sparsity:g} is outside [0, 1): it is the share of parameters to remove")
    if not 0 < args.k < math.inf:
        raise UsageError(f"--k {args.k:g} must be a number above 0: it is a ratio of shares")
    if not 0 < args.percdamp < math.inf:
        raise UsageError(f"--percdamp {args.percdamp:g} must be a number above 0: without it the fit may be singular")
    if not 0 < args.ratio <= 1:
        raise UsageError(f"--ratio {args.ratio:g} is outside (0, 1]: it is a share of the hidden size")
    if args.batch_size != "auto" and args.batch_size < 1:
        raise UsageError(f"--batch_size {args.batch_size} must be at least 1")


# Layers that lose so many times what was asked are warned of: the embedding, which is not pruned, has the rest.
WARNED_RATIO = 1.5


@dataclass(frozen=True)
class Parameters:
    """Parameters of the dense model and of the planned one, as `cost.count_parameters` gives them."""

    before: dict[str, int]
    planned: dict[str, int]

    def lost(self, part: str) -> float:
        """Share of the "total", or of the "decoder_layers", that the plan removes."""
        return 1 - self.planned[part] / self.before[part]


@dataclass(frozen=True)
class Job:
    """All that is decided before a weight is read."""

    recipe: Recipe
    location: Location
    config: PreTrainedConfig
    options: PruningOptions
    plan: list[LayerShape]
    sparsities: Sparsities
    jumps: list[str]
    parameters: Parameters
    bytes_per_weight: int
    disk_bytes: int
    memory: dict[str, int | None]
    folder: Path


def make_options(
    args: argparse.Namespace, config: PreTrainedConfig, recipe: Recipe, plan: list[LayerShape]
) -> PruningOptions:
    """What the recipe leaves open, checked against the model."""
    check_mlp_num(args.mlp_num, config.num_hidden_layers, recipe)
    device = pick_device(args.device)
    # With every channel left there is no residual to restore.
    mlp_num = args.mlp_num if plan[0].intermediate_size < config.intermediate_size else 0
    return PruningOptions(
        percdamp=args.percdamp,
        mlp_num=mlp_num,
        correction_rank=correction_rank(config, args.ratio, args.round_to) if mlp_num else 0,
        batch_size=BatchSize(1 if args.batch_size == "auto" else args.batch_size),
        device=device,
        cache_device=device if args.cache_dev == "auto" else pick_device(args.cache_dev, "--cache_dev"),
    )


def check_seqlen(seqlen: int, flag: str, config: PreTrainedConfig) -> None:
    """Raise UsageError, naming the flag that decides it, if a sample is longer than the model's positions."""
    positions = config.max_position_embeddings
    if seqlen > positions:
        raise UsageError(f"{flag}: samples of {seqlen} tokens do not fit the model's {positions} positions")


def prepare(args: argparse.Namespace) -> Job:
    """Check all that can be checked without weights, and plan."""
    check_numbers(args)
    recipe = RECIPES[args.recipe]
    location = locate(args.base_model)
    config = read_config(location)
    refuse_unprunable(config, location)
    ids_shape = calibration_shape(args.datasets, args.num_samples, args.seqlen)
    check_seqlen(ids_shape[1], "--datasets" if is_token_file(args.datasets) else "--seqlen", config)
    dense = count_dense_parameters(location, config)
    whole = dense["total" if args.sparsity_of == "model" else "decoder_layers"]
    plan, sparsities = allocate(recipe, config, whole, args.sparsity, args.k, args.round_to)
    options = make_options(args, config, recipe, plan)
    # Which layers are calibrated is not known yet, but all corrections have one size.
    sized = with_corrections(plan, list(range(options.mlp_num)), options.correction_rank)
    bytes_per_weight = weights.bytes_per_weight(location, config, args.dtype)
    task = Task(config, dense["total"], plan[0], ids_shape, bytes_per_weight, recipe, is_streamed(location))
    if args.batch_size == "auto":
        fit_batch_size(task, options)
    with location.in_words("its configuration describes no model that can be pruned and run"):
        pruned = checkpoint.pruned_skeleton(config, sized)
        try_out(pruned)
    planned = cost.count_parameters(pruned)
    return Job(
        recipe=recipe,
        location=location,
        config=config,
        options=options,
        plan=plan,
        sparsities=sparsities,
        jumps=jumps(recipe, config, whole, args.sparsity, args.k),
        parameters=Parameters(dense, planned),
        bytes_per_weight=bytes_per_weight,
        disk_bytes=planned["total"] * bytes_per_weight + 2 * task.states,  # two, while one takes the place of the other
        memory=expected_peaks(task, options),
        folder=checkpoint.checkpoint_folder(
            args.save_dir, location.label, args.sparsity, recipe.name, args.sparsity_of
        ),
    )


def print_plan(job: Job, sparsity: float) -> None:
    """Print the sizes of the layers, the parameters and the expected peak memory; warn where layers lose far more."""
    before, after = job.parameters.before["total"], job.parameters.planned["total"]
    rank, number = job.options.correction_rank, job.options.mlp_num
    size = job.bytes_per_weight / 1e9
    print(describe_plan(job.plan))
    if number:
        print(f"and a correction of rank {rank} beside {number} MLPs, which the survey chooses")
    of_model, of_layers = job.parameters.lost("total"), job.parameters.lost("decoder_layers")
    print(f"parameters   {before:,} -> {after:,}, sparsity {of_model:.4f} of the model, {of_layers:.4f} of its layers")
    for jump in job.jumps:
        print(f"note         {jump}: between the two the shares of --recipe {job.recipe.name} jump")
    if of_layers > WARNED_RATIO * sparsity:
        print(
            f"note         the decoder layers lose {of_layers:.0%}, since they are but "
            f"{job.parameters.before['decoder_layers'] / before:.0%} of the model and nothing else is pruned; "
            "--sparsity_of layers takes --sparsity as their share"
        )
    print(f"weights      {before * size:.3f} GB -> {after * size:.3f} GB")
    device = f", device {job.memory['device_bytes'] / 1e9:.2f} GB" if job.memory["device_bytes"] else ""
    print(f"peak memory  host {job.memory['host_bytes'] / 1e9:.2f} GB{device} (expected)")
    print(f"batch size   {job.options.batch_size.size}")


def draw_calibration_set(args: argparse.Namespace, tokenizer, config: PreTrainedConfig) -> CalibrationSet:
    """The calibration set that the flags describe."""
    return build_calibration_set(
        args.datasets,
        tokenizer,
        num_samples=args.num_samples,
        seqlen=args.seqlen,
        seed=args.seed,
        data_dir=Path(args.data_dir),
        cache_dir=Path(args.data_dir) / "calibration",
        vocab_size=config.vocab_size,
    )


def prune_and_save(args: argparse.Namespace, job: Job, progress: RunFolder) -> dict:
    """Draw the calibration set, survey, prune and save; returns the record, which lies beside the checkpoint."""
    options, stages = job.options, records.Stages(job.options.device)
    with stages.stage("calibration set"):
        tokenizer = read_tokenizer(job.location)
        calibration = draw_calibration_set(args, tokenizer, job.config)
    with stages.stage("open model"):
        dense = open_dense_model(job.location, args.dtype)
        before = cost.count_parameters(dense.model)
    if before != job.parameters.before:  # the plan was made before the hub gave the weights
        raise UsageError(
            f"{job.location.flag} {job.location.name}: its weights hold another model than its configuration; give the "
            "same command again, which plans by the weights, now that they are here"
        )
    progress.begin(
        identity.of_run(vars(args), job.location, job.config, calibration.token_hash, options.device),
        args.overwrite,
        dense.layers_prefix,
        len(job.plan),
        options.batch_size,
        in_background=options.device.type == "cuda",  # on the CPU it competes for the cores
    )
    if progress.is_complete:
        return records.read_pruning_record(job.folder)
    work = (job.recipe, options, progress)
    with stages.stage("survey"):
        checkpoint.check_description(progress, dense, job.plan, tokenizer)
        survey = survey_layers(dense, calibration.ids, job.plan, *work)
        plan = choose_corrected(job.plan, survey, job.recipe, options)
    with stages.stage("prune"):
        prune_layers(dense, calibration.ids, plan, survey, *work)
    with stages.stage("write"):
        after = checkpoint.complete(progress, dense, plan, tokenizer)
    record = make_record(args, job, calibration, plan, {"before": before, "after": after}) | {
        "multiple_correlation": [layer.correlation for layer in survey],
        "went_on_after": progress.interruptions,
        "stages": stages.rows,
        "weight_bytes_on_disk": cost.folder_weight_bytes(progress.checkpoint),
    }
    with progress.explained():
        records.write_record(progress.checkpoint / records.PRUNING_RECORD, record)
        write_card(progress.checkpoint, record)
    progress.publish()
    return record


def make_record(
    args: argparse.Namespace,
    job: Job,
    calibration: CalibrationSet,
    plan: list[LayerShape],
    counted: dict[str, dict[str, int]],
) -> dict:
    """What a run was asked, expected to do and did; `counted` are the parameters of the models before and after."""
    before, after = counted["before"], counted["after"]
    return {
        "kind": "pruning",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": vars(args),
        "model": describe_source(job.location, job.config),
        "calibration": {**vars(calibration), "ids": list(calibration.ids.shape)},
        "shares_removed": asdict(job.sparsities),
        "plan": [shape.to_dict() for shape in plan],
        "dense_layer": {"v_head_dim": head_dim(job.config), "intermediate_size": job.config.intermediate_size},
        "corrected_layers": [index for index, shape in enumerate(plan) if shape.correction_rank],
        "parameters": {
            "before": before["total"],
            "planned": job.parameters.planned["total"],
            "after": after["total"],
            "decoder_layers_before": before["decoder_layers"],
            "decoder_layers_after": after["decoder_layers"],
        },
        "measured_sparsity": 1 - after["total"] / before["total"],
        "measured_sparsity_of_layers": 1 - after["decoder_layers"] / before["decoder_layers"],
        "batch_size": job.options.batch_size.size,
        "expected_peak_memory": job.memory,
        "environment": records.environment(job.options.device),
    }


def print_result(job: Job, record: dict) -> None:
    """Print what was done, and how long and how much memory each stage took."""
    parameters = record["parameters"]
    print(f"corrected layers {record['corrected_layers']}")
    print(f"parameters   {parameters['before']:,} -> {parameters['after']:,} (whole model)")
    print(f"             {parameters['decoder_layers_before']:,} -> {parameters['decoder_layers_after']:,} (layers)")
    asked = f"{record['settings']['sparsity']:g} of the {record['settings']['sparsity_of']}"
    print(f"sparsity     {record['measured_sparsity']:.4f} of the model, ", end="")
    print(f"{record['measured_sparsity_of_layers']:.4f} of its layers; asked for {asked}")
    for name, row in record["stages"].items():
        device = f", device {row['device_bytes'] / 1e9:.2f} GB" if row["device_bytes"] else ""
        print(f"{name:<16} {row['minutes'] * 60:7.1f} s, peak host {row['host_bytes'] / 1e9:.2f} GB{device}")
    print(f"saved        {job.folder}")


def run(args: argparse.Namespace) -> None:
    """Plan; unless that was all, check the output folder, prune, save and print what was done."""
    job = prepare(args)
    print_plan(job, args.sparsity)
    if args.mlp_num and not job.options.mlp_num:
        print(f"no MLP loses a channel, so --mlp_num {args.mlp_num} has no effect")
    if args.dry_run:
        return
    checkpoint.check_folder(job.folder)
    with RunFolder.locked(job.folder) as progress:
        needed = 0 if progress.is_published else job.disk_bytes - progress.written_bytes
        checkpoint.check_room(job.folder, needed, args.overwrite or progress.is_published)
        with memory_in_words(partial(memory_advice, args)):
            record = prune_and_save(args, job, progress)
    print_result(job, record)


if __name__ == "__main__":
    stopping.end_with(lambda: run_command(build_parser(), run))
