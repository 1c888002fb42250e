"""Load pruned checkpoints on the installed transformers, whatever its release, and say what became of each.

Wants nothing but PyTorch and transformers, 4.46 or newer. Reads from standard input, and writes as its last line, JSON.

Request: `tried`, a list of {"checkpoint": folder, "expected": file of tensors}; `again`, a folder where each is saved
again; `with_olica`, whether the package is imported instead of the checkpoint's own code.
Answer: `transformers` and `packages`, versions; `checkpoints`, by name: nothing where the release has no such family,
else what was reached of `logits` (largest difference to the expected ones), `tokens`, `generated` (the same with a
cache, without one and as expected), `saved` (read again by the release, with the same logits), and the `error` that
ended it.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PACKAGES = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "numpy")


def exists(checkpoint: Path) -> bool:
    """Whether this release has the checkpoint's family."""
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    return model_type == "nemotron-nas" or model_type.replace("olica_", "", 1) in CONFIG_MAPPING


def difference(model, expected: dict) -> float:
    """The largest absolute one of the logits."""
    return (model(expected["ids"]).logits - expected["logits"]).abs().max().item()


@torch.no_grad()
def attempt(checkpoint: Path, expected: dict, chat: str, again: Path, code: dict, row: dict) -> None:
    """Fill `row` with what was reached."""
    # `torch_dtype`: the argument's name in every release; without it old ones take float32, new ones what is stored.
    settings = {"torch_dtype": torch.float32} | code
    # Its cap of scores is left out by the fused attention of some releases, dense or pruned.
    if "gemma2" in checkpoint.name:
        settings["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings).eval()
    row["logits"] = difference(model, expected)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **code)
    texts = {name[len("text ") :]: ids.tolist() for name, ids in expected.items() if name.startswith("text ")}
    row["tokens"] = all(tokenizer(text).input_ids == ids for text, ids in texts.items())
    if chat:
        messages = [{"role": "user", "content": "ab"}]
        row["tokens"] &= tokenizer.apply_chat_template(messages, tokenize=False) == chat
    length = expected["generated"].shape[1] - expected["ids"].shape[1]
    greedy = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
    cached, whole = (
        model.generate(expected["ids"], attention_mask=torch.ones_like(expected["ids"]), use_cache=use, **greedy)
        for use in (True, False)
    )
    row["generated"] = torch.equal(cached, whole) and torch.equal(cached, expected["generated"])
    model.save_pretrained(again)
    tokenizer.save_pretrained(again)
    reread = AutoModelForCausalLM.from_pretrained(again, **settings).eval()
    row["saved"] = difference(reread, expected) == row["logits"]


def run(request: dict) -> dict:
    """The answer."""
    if request["with_olica"]:
        import olica  # noqa: F401
    code = {} if request["with_olica"] else {"trust_remote_code": True}
    rows: dict[str, dict] = {}
    for one in request["tried"]:
        checkpoint = Path(one["checkpoint"])
        row = rows.setdefault(checkpoint.name, {})
        if not exists(checkpoint):
            continue
        with safe_open(one["expected"], "pt") as file:
            expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            chat = file.metadata()["chat"]
        try:
            attempt(checkpoint, expected, chat, Path(request["again"]) / checkpoint.name, code, row)
        except Exception as error:  # the libraries share none
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return {
        "transformers": metadata.version("transformers"),
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "checkpoints": rows,
    }


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(json.dumps(run(json.load(sys.stdin))))
