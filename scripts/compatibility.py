"""Try pruned checkpoints on several releases of transformers; scripts/compatibility.sh installs these and calls this.

Tiny models of every family are pruned to every layout that holds them; this package computes what is to come out. Then
each release loads them (scripts/load_checkpoints.py, in a process of its own), and this package reads what it saved.
"""

import argparse
import json
import os
import subprocess
import sys
from copy import deepcopy
from os.path import expanduser
from pathlib import Path
from shutil import rmtree

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import olica
import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.model.families import FAMILIES
from olica.model.layouts import FUSED_FAMILIES, LAYOUTS
from olica.outputs.records import environment, write_record

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]  # what the tests have there
from conftest import make_tokenizer  # noqa: E402
from tiny_families import ALTERNATING, LLAMA3_SCALING, make_family  # noqa: E402

# What a pruning makes of a family -> the layout, and a recipe that fills it: factors, narrower value heads and a
# correction; fewer heads and channels; the same sizes in all layers; other widths in each.
FORMS = {
    "olica": dict(layout="olica", recipe="olica", mlp_num=1, ratio=0.1),
    "olica-plus": dict(layout="olica", recipe="olica-plus"),
    "stock": dict(layout="stock", recipe="wanda-sp"),
    "deci": dict(layout="deci", recipe="olica-plus"),
}
# As real models of these families are: no width of heads of their own, no windows that old releases gave to all layers,
# no biases that the first release left out.
# Gemma's layers are those that releases without `layer_types` make of the pattern.
WITHOUT_HEAD_DIM = ("qwen2", "smollm3", "granite", "olmo2", "phi3")
USUAL = {
    "qwen2": dict(use_sliding_window=False),
    "smollm3": dict(mlp_bias=False),
    "gemma3_text": dict(layer_types=ALTERNATING, sliding_window_pattern=2),
}
# Of no family's default: a release that overlooks it gives other logits.
THETA = {"rope_type": "default", "rope_theta": 500.0}
ROPE = {
    "llama": LLAMA3_SCALING | {"rope_theta": 500.0},
    "gemma3_text": {"full_attention": THETA, "sliding_attention": THETA | {"rope_theta": 300.0}},
}
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEXTS = ("ab cd", "Two  spaces, 12 grüße 文 🙂\n<mark>x")
NEW_TOKENS = 12


def build_parser() -> argparse.ArgumentParser:
    """Where the releases are, which are tried, and where the record goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that of scripts/compatibility.sh")
    parser.add_argument("--releases", nargs="+", required=True, help="tried with the code of the checkpoints alone")
    parser.add_argument("--with_olica", nargs="*", default=[], help="tried with this package imported")
    parser.add_argument("--checkpoints", nargs="*", type=expanduser, default=[], help="further ones, beside the tiny")
    parser.add_argument("--output_path", type=expanduser, required=True, help="file of the record")
    return parser


def prune_families(folder: Path) -> list[Path]:
    """The checkpoints of all families, pruned by 30 % of their layers."""
    ids, tokenizer = torch.randint(3, 259, (8, 32), generator=torch.Generator().manual_seed(0)), make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<mark>"]})
    tokenizer.chat_template = TEMPLATE
    folder.mkdir()
    save_file({"calibration_ids": ids}, folder / "ids.safetensors")
    made = []
    for family in FAMILIES:
        sizes: dict = dict(hidden_size=72) | (dict(head_dim=None) if family in WITHOUT_HEAD_DIM else {})
        dense = folder / "dense" / family
        sizes["rope_parameters"] = deepcopy(ROPE.get(family, THETA))
        make_family(family, **sizes, **USUAL.get(family, {})).save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        for form, settings in FORMS.items():
            layout = settings["layout"]
            families = LAYOUTS[layout].families
            if (families and family not in families) or (layout != "olica" and family in FUSED_FAMILIES):
                continue
            if family == "mistral" and layout == "deci":  # which has no windows
                config = json.loads((dense / "config.json").read_text())
                (dense / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
            done = olica.prune(
                str(dense), datasets=str(folder / "ids.safetensors"), save_dir=str(folder / "pruned"),
                data_dir=str(folder / "data"), sparsity=0.3, sparsity_of="layers", round_to=1, **settings,
            )  # fmt: skip
            made.append(done.folder.rename(folder / f"{family}_{form}_sparsity-0.3"))
    return made


@torch.no_grad()
def store_expected(checkpoint: Path, folder: Path) -> dict[str, str]:
    """Store what this package makes of a checkpoint: logits, tokens of texts, a greedy continuation."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.randint(3, 259, (2, 40), generator=torch.Generator().manual_seed(1))
    settings = dict(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, repetition_penalty=1.0)
    expected = {"ids": ids, "logits": model(ids).logits, "generated": model.generate(ids, **settings)}
    expected |= {f"text {text}": torch.tensor(tokenizer(text).input_ids) for text in TEXTS}
    path = folder / f"{checkpoint.name}.safetensors"
    chat = tokenizer.chat_template and tokenizer.apply_chat_template([dict(role="user", content="ab")], tokenize=False)
    save_file(expected, path, metadata={"chat": chat or ""})
    return {"checkpoint": str(checkpoint.resolve()), "expected": str(path.resolve())}


def load_on(release: str, with_olica: bool, tried: list[dict[str, str]], folder: Path) -> dict:
    """What a release makes of the checkpoints, as scripts/load_checkpoints.py describes it.

    Raises:
        UsageError: the release is not installed, or does not run at all.
    """
    installed = (folder / release).resolve()
    if not (installed / "transformers").is_dir():
        raise UsageError(f"{folder}: transformers {release} is not there; scripts/compatibility.sh installs it")
    again = folder / "again" / release
    rmtree(again, ignore_errors=True)
    again.mkdir(parents=True)
    paths = [str(installed), *([str(ROOT)] if with_olica else [])]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str((again / "home").resolve()), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [folder.resolve() / "torch" / "bin" / "python", ROOT / "scripts" / "load_checkpoints.py"],
        input=json.dumps({"tried": tried, "again": str(again.resolve()), "with_olica": with_olica}),
        capture_output=True, text=True, env=variables, cwd=again,
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"transformers {release} does not run: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    for one in tried:
        name = Path(one["checkpoint"]).name
        if found["checkpoints"][name].get("saved") is True:
            found["checkpoints"][name]["read_again"] = read_again(again / name, Path(one["expected"]))
    return found | {"with_olica": with_olica}


@torch.no_grad()
def read_again(checkpoint: Path, expected: Path) -> float | str:
    """Largest difference of the logits of what a release saved, as this package reads it; or an error."""
    stored = load_file(expected)
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return (model(stored["ids"]).logits - stored["logits"]).abs().max().item()
    except Exception as error:  # the libraries share none
        return f"{type(error).__name__}: {error}"


def run(args: argparse.Namespace) -> None:
    """Make the checkpoints, try all releases, print in short and write the record."""
    folder = args.folder / "checkpoints"
    rmtree(folder, ignore_errors=True)
    checkpoints = [*prune_families(folder), *map(Path, args.checkpoints)]
    tried = [store_expected(checkpoint, folder) for checkpoint in checkpoints]
    found = []
    for release, with_olica in [*((one, False) for one in args.releases), *((one, True) for one in args.with_olica)]:
        found.append(load_on(release, with_olica, tried, args.folder))
        rows = [row for row in found[-1]["checkpoints"].values() if row]
        bad = [row["error"] for row in rows if "error" in row]
        print(f"transformers {release}{', with olica' if with_olica else ''}: {len(rows)} tried, {len(bad)} failed")
        print(*sorted(set(bad)), sep="\n", end="\n" if bad else "")
    write_record(Path(args.output_path), {"releases": found, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
