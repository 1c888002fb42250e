"""Compare what llama.cpp makes of a GGUF file with what transformers makes of the checkpoint that it was written from.

Both get the same tokens: log-probabilities of each, and the greedy continuation of the prompts; and the same texts to
cut into tokens. llama.cpp is that of scripts/llama_cpp.sh.

OLICA_LLAMA_CPP=FOLDER python scripts/llama_cpp.py MODEL.gguf --checkpoint FOLDER --output_path record.json
"""

import argparse
import json
import os
import shutil
import subprocess
from os.path import expanduser
from pathlib import Path

import torch
from gguf import GGUFReader, LlamaFileType

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.outputs.records import environment, write_record
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model

VARIABLE = "OLICA_LLAMA_CPP"
# The first three are continued; the others are only cut into tokens.
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at 100 degrees Celsius because the pressure of its vapour",
)
TEXTS = (
    *PROMPTS,
    "Two words,  two spaces;\n\n\ttab and don't, 1234567 grüße 文字 ½ 🙂",
    "for (int i = 0; i < 10; ++i) { sum += a[i]; }  // don't",
    "x",
    "\n\n  indented\n",
)


def build_parser() -> argparse.ArgumentParser:
    """The two models, how much is compared, and where the record goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="MODEL.gguf", type=expanduser)
    parser.add_argument("--checkpoint", required=True, help="what the file was written from")
    parser.add_argument("--new_tokens", type=int, default=24, help="length of the continuations")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp; no more than cores are free")
    parser.add_argument("--output_path", type=expanduser, required=True, help="file of the record")
    return parser


def ask(request: dict) -> dict:
    """What llama.cpp answers; requests and answers are described in scripts/llama_cpp.mjs.

    Raises:
        UsageError: it is not there, or fails.
    """
    folder = os.environ.get(VARIABLE)
    if not folder or not (Path(folder) / "node_modules" / "node-llama-cpp").is_dir() or not shutil.which("node"):
        raise UsageError(f"llama.cpp is not at hand: {VARIABLE}=FOLDER bash scripts/llama_cpp.sh installs it")
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(["node", script, folder], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr[-200:])
        names = ", ".join(Path(model).name for model in request["models"])
        raise UsageError(f"llama.cpp does not run {names}: {first.strip()}")
    return json.loads(done.stdout)


def read_by(answer: dict) -> dict[str, str]:
    """The versions that gave an answer."""
    return {"llama.cpp": answer["llama_cpp"], "node-llama-cpp": answer["node_llama_cpp"]}


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Those of each token but the first (T - 1)."""
    tokens = torch.tensor([ids])
    return model(tokens).logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]


@torch.no_grad()
def continuation(model, ids: list[int], new_tokens: int) -> list[int]:
    """The tokens that follow, greedily, the end token among them."""
    settings = dict(max_new_tokens=new_tokens, do_sample=False, repetition_penalty=1.0)
    tokens = torch.tensor([ids])
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0, len(ids) :].tolist()


@torch.no_grad()
def compared(model, tokenizer, prompt: list[int], ours: list[int], theirs: list[int]) -> dict:
    """Two continuations of a prompt and, where they part, by how much the model prefers its own token: nats."""
    row = {"same": ours == theirs, "transformers": tokenizer.decode(ours), "llama.cpp": tokenizer.decode(theirs)}
    parted = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if parted is not None:
        logits = model(torch.tensor([prompt + ours[:parted]])).logits[0, -1]
        row["preferred_by"] = (logits[ours[parted]] - logits[theirs[parted]]).item()
    return row


def compare(args: argparse.Namespace) -> dict:
    """The record of a comparison."""
    location = locate(args.checkpoint, "--checkpoint")
    tokenizer, model = read_tokenizer(location), read_model(location, "float32")
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    ours = [continuation(model, ids, args.new_tokens) for ids in prompts]
    sequences = [prompt + new for prompt, new in zip(prompts, ours, strict=True)]
    expected = [log_probabilities(model, ids) for ids in sequences]
    answer = ask(
        {
            "models": [str(Path(args.file).resolve())],
            "threads": args.threads,
            "sequences": sequences,
            "prompts": prompts,
            "new_tokens": args.new_tokens,
            "texts": TEXTS,
            "timed": [],
            "repeats": 0,
        }
    )
    (found,) = answer["models"]
    difference = torch.cat([torch.tensor(row) for row in found["log_probabilities"]]) - torch.cat(expected)
    reader = GGUFReader(args.file)
    cut = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    return {
        "file": Path(args.file).name,
        "architecture": reader.fields["general.architecture"].contents(),
        "form": LlamaFileType(reader.fields["general.file_type"].contents()).name.removeprefix("MOSTLY_"),
        "bytes": Path(args.file).stat().st_size,
        "checkpoint": location.label,
        "read_by": read_by(answer),
        "compared_with": "transformers in float32, weights as in the checkpoint",
        "log_probabilities": {
            "tokens": difference.numel(),
            "mean_absolute_difference": difference.abs().mean().item(),
            "mean_difference": difference.mean().item(),
            "largest_difference": difference.abs().max().item(),
        },
        "continuations": [
            {"prompt": text} | compared(model, tokenizer, *tokens)
            for text, *tokens in zip(PROMPTS, prompts, ours, found["continuations"], strict=True)
        ],
        "texts_cut_alike": [a == b for a, b in zip(cut, found["tokens"], strict=True)],
        "environment": environment(torch.device("cpu")),
    }


def run(args: argparse.Namespace) -> None:
    """Compare, print and write the record."""
    record = compare(args)
    write_record(Path(args.output_path), record)
    figures, same = record["log_probabilities"], [row["same"] for row in record["continuations"]]
    print(f"{record['file']} ({record['architecture']}, {record['form']}), llama.cpp {record['read_by']['llama.cpp']}")
    print(
        f"mean absolute difference of {figures['tokens']} log-probabilities {figures['mean_absolute_difference']:.5f}"
    )
    print(f"continuations alike {sum(same)} of {len(same)}, ", end="")
    print(f"texts cut alike {sum(record['texts_cut_alike'])} of {len(record['texts_cut_alike'])}")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
