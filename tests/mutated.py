"""Models whose files were mutated, each driven through the commands in a process of its own: for test_hammering.py."""

import json
import logging
import math
import os
import random
import resource
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from conftest import TEST_DATA, make_tokenizer, save_tiny
from mutations import mutate
from safetensors.torch import save_file
from tiny_families import make_family
from tiny_gguf import GGUF_FAMILIES, GGUF_SIZES, write_gguf

import model_evaluate
import model_export
import model_pruning
from olica.command_line import run_command
from olica.methods.recipes import RECIPES
from olica.model.families import FAMILIES
from olica.sources.gguf_header import read_header

COMMANDS = {"prune": model_pruning, "evaluate": model_evaluate, "export": model_export}
# What a command may take beyond what this process has when it begins.
MEMORY, SECONDS = 4 * 2**30, 120
WORDS = "Old owls read long books of law by candle light, and sleep all day in dusty halls of stone.\n"
TEXT, ROWS, CALIBRATION, SEQLEN = "held.txt", "rows.jsonl", "ids.safetensors", 16
MADE_BY = ["--base_model=tiny", f"--datasets={CALIBRATION}", "--data_dir=data", "--save_dir=out", "--batch_size=4"]
OF_TEXT = [f"--datasets={ROWS}", "--num_samples=6", f"--seqlen={SEQLEN}"]
MEASURING = [f"--ppl={TEXT}", "--ppl_seqlen=16", "--ppl_windows=4", "--output_path=said.json"]


def dense(draw: random.Random, folder: Path) -> None:
    """A dense model of any family, its weights in one file or in several."""
    family = draw.choice([*FAMILIES])
    model = make_family(family, grouped=draw.random() < 0.5, tied=draw.random() < 0.3, peculiar=draw.random() < 0.5)
    model.save_pretrained(folder, max_shard_size=draw.choice(["5GB", "100KB"]))
    make_tokenizer().save_pretrained(folder)


def pruned(draw: random.Random, folder: Path) -> None:
    """A pruned checkpoint: one of those that the test has made, or one of the first format, of any family."""
    old = TEST_DATA / "checkpoints" / draw.choice([*FAMILIES])
    source = draw.choice([*sorted(Path("made/out").glob("tiny*")), old])
    shutil.copytree(source, folder)
    if source == old:
        make_tokenizer().save_pretrained(folder)


def recorded(draw: random.Random, folder: Path) -> None:
    """A pruned checkpoint where its command has made it, beside the dense model."""
    shutil.copytree("made", folder.parent, dirs_exist_ok=True)
    folder.symlink_to("out/tiny_sparsity-0.2")


def gguf_file(draw: random.Random, folder: Path) -> None:
    """A GGUF file of any family that transformers reads."""
    family = draw.choice([*GGUF_FAMILIES])
    architecture, own = GGUF_FAMILIES[family]
    folder.mkdir()
    write_gguf(make_family(family, peculiar=False, **GGUF_SIZES | own), architecture, folder / "model.gguf")


# How a model is made, what of it is mutated, how often of 20, and what is called of it.
Kind = tuple[Callable[[random.Random, Path], None], str, int, tuple[str, ...]]
KINDS: list[Kind] = [
    (dense, "config", 5, ("prune", "evaluate")),
    (dense, "weights", 4, ("prune", "evaluate")),
    (dense, "tokenizer", 2, ("prune", "evaluate")),
    (dense, "generation", 1, ("prune", "evaluate")),
    (gguf_file, "gguf", 2, ("prune", "evaluate")),
    (pruned, "config", 2, ("evaluate", "export")),
    (pruned, "weights", 2, ("evaluate", "export")),
    (recorded, "record", 2, ("prune", "evaluate", "export")),
]


def by_recipe(name: str) -> list[str]:
    """The flag of a recipe, and what a model of three layers wants of one that corrects MLPs."""
    corrected = ["--mlp_num=1", "--ratio=0.1"] if "mlp_num" in RECIPES[name].parameter_names else []
    return [f"--recipe={name}", *corrected]


def arguments_of(draw: random.Random, what: str, kind: str) -> list[str]:
    """What a command is called with, for the model in the folder `model`."""
    path = "model/model.gguf" if kind == "gguf" else "out/tiny_sparsity-0.2" if kind == "record" else "model"
    match what:
        case "prune" if kind == "record":  # the record says whether a checkpoint is that of the same command
            return [*MADE_BY, *by_recipe("olica"), "--sparsity=0.2,0.1"]
        case "prune":
            text = OF_TEXT if kind in ("tokenizer", "gguf") else []
            return [*MADE_BY, *text, f"--base_model={path}", *by_recipe(draw.choice([*RECIPES]))]
        case "evaluate":
            with_dense = ["--with_dense"] if kind == "record" else []
            return [f"--checkpoint={path}", *MEASURING, *with_dense]
        case "export":
            form = draw.choice(["--layout=dense", "--layout=dense", "--gguf=q8_0", "--gguf=f16"])
            return [path, form, "--output_path=exported" + (".gguf" if "gguf" in form else "")]
    raise ValueError(what)


def fault(what: str, arguments: list[str], status: int, errors: str) -> str | None:
    """What is wrong with how a command ended."""
    if "Traceback" in errors:
        return "traceback"
    checkpoints = [*Path("out").glob("tiny*"), *Path("out").glob("model*"), *Path().glob("exported")]
    match status:
        case 2:
            said = [line for line in errors.splitlines() if ": error: " in line]
            if len(said) != 1 or not errors.endswith(said[0] + "\n"):
                return "not one sentence at the end"
            places = {"prune": "out/model*", "export": "*exported*"}
            if what in places and any(Path().glob(places[what])):
                return "half-written"
        case 0 if what == "evaluate":
            (result, *_) = json.loads(Path("said.json").read_text())["results"].values()
            if not 0 < result["perplexity"][TEXT]["value"] < math.inf:
                return "no finite perplexity"
        case 0 if "--gguf" in " ".join(arguments):
            read_header(Path("exported.gguf"))
        case 0:
            for checkpoint in checkpoints:
                if call("evaluate", [f"--checkpoint={checkpoint}", *MEASURING], Path("later")):
                    later = Path("later").read_text()
                    if "Traceback" in later or "the perplexity is not finite" not in later:
                        return f"{checkpoint} is not sound: {later}"
        case _:
            return f"status {status}"
    return None


def call(command: str, arguments: list[str], errors: Path) -> int:
    """The exit status of a command, whose errors are written to a file."""
    module, own = COMMANDS[command], os.dup(2)
    logging.getLogger().handlers.clear()  # they write to where an earlier command wrote its errors
    with errors.open("w") as said, open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(said):
        os.dup2(said.fileno(), 2)  # what libraries in C say
        try:
            return run_command(module.build_parser(), module.run, arguments)
        except SystemExit as ended:
            return ended.code
        except BaseException:
            traceback.print_exc(file=said)
            return 1
        finally:
            os.dup2(own, 2)
            os.close(own)


def limit_memory_and_time() -> None:
    """No size in a file may take down the machine, or take for ever."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def drive(draw: random.Random, row: Kind, number: int, out: int) -> None:
    """Mutate a model in the current folder and call what is called of it; writes how each command ended to `out`."""
    make, kind, _, commands = row
    folder = Path(str(number)).absolute()
    folder.mkdir()
    make(draw, folder / "model")
    did = mutate(draw, folder / "model", kind)
    for name in (TEXT, ROWS, CALIBRATION):
        shutil.copy(f"made/{name}", folder)
    os.chdir(folder)
    limit_memory_and_time()
    for what in commands:
        arguments = arguments_of(draw, what, kind)
        status = call(what, arguments, Path("errors"))
        errors = Path("errors").read_text(errors="replace")
        report = {"number": number, "case": f"{make.__name__}, {did}", "command": [what, *arguments]}
        report |= {"status": status, "errors": errors, "fault": fault(what, arguments, status, errors)}
        os.write(out, (json.dumps(report) + "\n").encode())


def prepare(folder: str) -> None:
    """Make what all start from: a text, a calibration set, and pruned checkpoints beside their dense model."""
    os.chdir(folder)
    Path(TEXT).write_text(WORDS * 4)
    Path(ROWS).write_text("".join(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(12)))
    ids = torch.randint(3, 259, (6, SEQLEN), generator=torch.Generator().manual_seed(0))
    save_file({"calibration_ids": ids}, CALIBRATION)
    save_tiny("tiny", num_key_value_heads=2)
    for layout, recipe in (("olica", "olica"), ("deci", "olica-plus"), ("stock", "olica-plus")):
        if call("prune", [*MADE_BY, *by_recipe(recipe), f"--layout={layout}"], Path("errors")):
            raise AssertionError(Path("errors").read_text())


def main(seed: str, count: int, folder: str) -> None:
    """Drive so many mutations, each in a child of its own; `report.jsonl` says how each of their commands ended."""
    os.chdir(folder)
    out = os.open("report.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rows = [row for row in KINDS for _ in range(row[2])]
    for number in range(count):
        if (child := os.fork()) == 0:
            status = 1
            try:
                drive(random.Random(f"{seed} {number}"), rows[number % len(rows)], number, out)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        if ended := os.waitpid(child, 0)[1]:
            raise AssertionError(f"mutation {number} ended with {os.waitstatus_to_exitcode(ended)}")
        shutil.rmtree(str(number), ignore_errors=True)


if __name__ == "__main__":
    prepare(sys.argv[2]) if sys.argv[1] == "--prepare" else main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
