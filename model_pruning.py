"""Prune a LLaMA-like checkpoint layer by layer, without retraining, and save it."""

import olica_stopping  # isort: skip  # before what takes seconds to import

if __name__ == "__main__":
    olica_stopping.at_once()

import argparse
from dataclasses import fields
from os.path import expanduser

from olica.checks import COMMANDS_OWN
from olica.command_line import run_command
from olica.described import describe
from olica.jobs import Job, prepare
from olica.machine import DEVICES, pick_device
from olica.methods.recipe import PAPERS_TEXT
from olica.methods.recipes import RECIPES
from olica.methods.sizes import describe_plan
from olica.model.configuration_olica import LayerShape
from olica.model.layouts import LAYOUTS
from olica.outputs.names import SPARSITY_OF
from olica.outputs.records import understood
from olica.outputs.weight_shards import ABOUT_LARGEST_FILE
from olica.processes import working_together
from olica.run import run_all
from olica.settings import REFITS, Settings, settings_of
from olica.sources.weights import DTYPES


def build_parser() -> argparse.ArgumentParser:
    """The flags of the released code, with its defaults, and ours; those of recipes come from their parameters."""
    return parser_of_pruning(
        __doc__,
        type=shares,
        help="share of the parameters to remove, in [0, 1); several, joined by commas, share one survey",
    )


def parser_of_pruning(description: str, **sparsity) -> argparse.ArgumentParser:
    """All flags of a pruning, of a command that takes --sparsity as the keyword arguments say."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("model")
    add(group, "base_model", type=expanduser, help="name (7b, llama2-7b, smollm2, ...), hub id, folder or .gguf file")
    add(group, "dtype", choices=["auto", *DTYPES], help="to run and save in; auto: as stored")
    group = parser.add_argument_group("calibration set")
    add(
        group,
        "datasets",
        default=argparse.SUPPRESS,
        help=f"texts joined by +: names or paths; or one token file (default: {own_texts()})",
    )
    add(
        group,
        "data_dir",
        type=expanduser,
        help="folder searched first for named texts; drawn tokens and surveys are kept there",
    )
    add(
        group,
        "num_samples",
        type=int,
        default=argparse.SUPPRESS,
        help=f"samples drawn from each text (default: {own_numbers('num_samples')})",
    )
    add(group, "seqlen", type=int, help="tokens per sample")
    add(group, "seed", type=int, help="seed of the draw")
    add(group, "add_bos_token", action="store_true", help="begin every sample with the start token (Gemma)")
    add(
        group,
        "candidates",
        type=int,
        default=argparse.SUPPRESS,
        help="draw so many times the samples, and keep those with the most different tokens; 1: keep all (default: "
        f"{own_numbers('candidates')})",
    )
    add_pruning(parser, sparsity)
    add_parameters(parser)
    group = parser.add_argument_group("machine")
    add(group, "device", choices=DEVICES, help="where layers run; auto: a GPU if there is one")
    add(group, "cache_dev", choices=DEVICES, help="where hidden states live; auto: where layers run")
    add(group, "batch_size", type=number_or_auto, help="samples that go through a layer at a time; auto: what fits")
    group = parser.add_argument_group("output")
    add(group, "save_dir", type=expanduser, help="folder that receives the checkpoint's folder")
    add(group, "max_shard_size", help=ABOUT_LARGEST_FILE)
    add(group, "overwrite", action="store_true", help="replace an existing checkpoint")
    group.add_argument(
        "--list_recipes",
        action=RecipeList,
        nargs=0,
        default=argparse.SUPPRESS,  # it is no setting
        help="print what each recipe does, then stop",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="print sizes and what the run is expected to take, then stop"
    )
    group.add_argument("--verbose", action="store_true", help="print what the log holds, too")
    return parser


def add(group: argparse._ArgumentGroup, name: str, **settings) -> None:
    """Add the flag of a field of `Settings`, with its default."""
    value = getattr(Settings(), name)
    defaults = {"default": str(value) if "type" in settings else value}
    group.add_argument(f"--{name}", **(defaults | settings))


def own_texts() -> str:
    """What recipes are calibrated on by default, in words."""
    own = [f"{row.text.datasets} for {row.name}" for row in RECIPES.values() if row.text != PAPERS_TEXT]
    return "; ".join([PAPERS_TEXT.datasets, *own])


def own_numbers(name: str) -> str:
    """A number of a recipe's text, and of those that have a text of their own, in words."""
    own = [f"{getattr(row.text, name)} for {row.name}'s own" for row in RECIPES.values() if row.text != PAPERS_TEXT]
    return "; ".join([str(getattr(PAPERS_TEXT, name)), *own])


def add_pruning(parser: argparse.ArgumentParser, sparsity: dict) -> None:
    """The flags that say what is pruned, and how; `sparsity` are the arguments of --sparsity."""
    group = parser.add_argument_group("pruning")
    add(
        group,
        "recipe",
        choices=[*RECIPES],
        help="what is measured, decided and computed: " + "; ".join(f"{r.name}: {r.about}" for r in RECIPES.values()),
    )
    add(group, "sparsity", **sparsity)
    add(
        group,
        "sparsity_of",
        choices=SPARSITY_OF,
        help="what --sparsity is a share of: the whole model, or its decoder layers",
    )
    multiples = ", ".join(f"{one.round_to} with --layout {one.name}" for one in LAYOUTS.values())
    add(
        group,
        "round_to",
        type=number_or_auto,
        help=f"make sizes multiples of this, which some kernels run faster; 1: off; auto: {multiples}",
    )
    add(
        group,
        "layout",
        choices=[*LAYOUTS],
        help="what the checkpoint can hold: " + "; ".join(f"{one.name}: {one.about}" for one in LAYOUTS.values()),
    )
    add(
        group,
        "refit",
        choices=[*REFITS],
        help="what is done with what stays: recipe: what the recipe does; none: nothing, and what its corrections and "
        "biases would hold goes to channels; least-squares: the refit of olica-plus",
    )


class RecipeList(argparse.Action):
    """Prints a table of the recipes and ends the program, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        """See `argparse.Action`."""
        rows = [("recipe", "survey", "sizes", "what is made of a layer", "")]
        rows += [(recipe.name, *recipe.traits(), recipe.about) for recipe in RECIPES.values()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
        for *cells, about in rows:
            print("  ".join([f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)] + [about]).rstrip())
        parser.exit()


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """A group of flags for each set of parameters that recipes have; one that is not given is not set.

    A flag that several sets have stands in the group of the first. What is given is text here: the recipe makes of it
    what its own parameter is.
    """
    flags = {}
    for recipe in RECIPES.values():
        for field in fields(recipe.parameters):
            flags.setdefault(field.name, (recipe.parameters, field, []))[2].append(recipe.name)
    for kind in dict.fromkeys(first for first, _, _ in flags.values()):
        names = [recipe.name for recipe in RECIPES.values() if recipe.parameters is kind]
        group = parser.add_argument_group(f"parameters of {', '.join(names)}")
        for name, (first, field, owners) in flags.items():
            if first is kind:
                others = ", ".join(owner for owner in owners if owner not in names)
                default = f"default: {field.default}" + (f"; also of {others}" if others else "")
                group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f"{field.metadata['help']} ({default})")


def shares(text: str) -> list[float]:
    """The type of --sparsity: a share, or several joined by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor several joined by commas") from error


def number_or_auto(text: str) -> int | str:
    """The type of --batch_size and --round_to: a number, or auto."""
    return text if text == "auto" else int(text)


def print_result(job: Job, record: dict) -> None:
    """Print what was done, and how long and how much memory each stage took."""
    parameters = record["parameters"]
    if job.plan is None:
        print(describe_plan([LayerShape(**shape) for shape in record["plan"]]))
    if record["corrected_layers"]:
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
    """Plan; unless that was all, prune, save and print what was done, for every sparsity."""
    given = {name: value for name, value in vars(args).items() if name not in (*COMMANDS_OWN, "sparsity")}
    settings = settings_of(given)
    with working_together(pick_device(settings.device)) as processes:
        planned = prepare(settings, args.sparsity, processes)
        if processes.is_main:
            for job in planned:
                print(describe(job))
        if not args.dry_run:
            for job, done in zip(planned, run_all(planned), strict=True):
                if processes.is_main:
                    with understood(done.folder):  # it may be of an earlier run
                        print_result(job, done.record)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
