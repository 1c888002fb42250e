r"""Whether an instruction model still chats: twenty fixed prompts, answered greedily and judged by written rules.

    python benchmarks/chat.py --checkpoint smollm2 --output_path chat.json

Each prompt goes through the chat template of the tokenizer, alone. An answer is right when all rules beside its prompt
hold: regular expressions that are found in it. Beside that it is to end with a stop token within the limit, and not to
go round in circles. The prompts are easy, for models of a few hundred million parameters; none has a right answer that
repeats the prompt. Three minutes on 2 cores for SmolLM2.
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from quantised import bitsandbytes, in_four_bits
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.subject import check_positions, check_vocabulary
from olica.machine import DEVICES, pick_device
from olica.model.skeleton import count_parameters
from olica.outputs.records import environment, flags_of, write_record
from olica.sources.chats import chat_template, dated_template
from olica.sources.configuration import describe_source, read_config
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import DTYPES, read_model

# An answer goes round in circles when one run of so many tokens is in it so often.
LOOP_TOKENS, LOOP_TIMES = 8, 3


@dataclass(frozen=True)
class Prompt:
    """What is asked, and the regular expressions that a right answer holds, by what they say of it."""

    text: str
    rules: dict[str, str]

    def judge(self, answer: str) -> dict[str, bool]:
        """Which of the rules hold of an answer."""
        return {says: re.search(rule, answer) is not None for says, rule in self.rules.items()}


def names(*words: str) -> dict[str, str]:
    """A rule for each of `words`: it is in the answer as a word, in small or capital letters; | parts spellings."""
    return {f"names {word.replace('|', ' or ')}": rf"(?i)\b({word})\b" for word in words}


PROMPTS = (
    # Facts.
    Prompt("What is the capital of France?", names("Paris")),
    Prompt("How many months are there in a year?", names("12|twelve")),
    Prompt("What color is the sky on a clear day?", names("blue")),
    Prompt("Who wrote the play Romeo and Juliet?", names("Shakespeare")),
    Prompt("Which planet do humans live on?", names("Earth")),
    Prompt("What is the opposite of hot?", names("cold|cool")),
    Prompt("Which gas do people need to breathe?", names("oxygen")),
    # Arithmetic.
    Prompt("What is 10 + 10?", names("20|twenty")),
    Prompt("What is 7 times 8?", names("56|fifty-six")),
    Prompt("I have 12 apples and eat 3 of them. How many apples are left?", names("9|nine")),
    # Lists.
    Prompt(
        "List three fruits as a numbered list.",
        {"has at least three lines that start with a number": r"(?s)(^|\n)\s*\d+[.):].*\n\s*\d+[.):].*\n\s*\d+[.):]"}
        | {"names a fruit": r"(?i)\b(apple|banana|orange|strawberr|grape|mango|pear|peach|kiwi|cherr)"},
    ),
    Prompt("Name the four seasons of the year.", names("spring", "summer", "autumn|fall", "winter")),
    Prompt("List the days of the week.", names("Monday", "Wednesday", "Friday", "Sunday")),
    # Rewriting, and what an answer is to look like.
    Prompt('Write the word "hello" in capital letters.', {"has HELLO": r"\bHELLO\b"}),
    Prompt('Rewrite in the past tense: "I walk to school every day."', names("walked")),
    Prompt('Translate to French: "Good morning."', names("bonjour")),
    Prompt(
        "Is ice cold? Answer with one word, yes or no.",
        {"is yes and at most four words more": r"(?i)\A\W*yes\b(\W+\w+){0,4}\W*\Z"},
    ),
    Prompt(
        "Write a short email to my teacher Ms. Brown and thank her for her help.",
        names("thank|thanks|grateful")
        | {
            "greets Ms. Brown": r"(?im)^\W*(dear|hi|hello)\b.*\bBrown\b",
            "has at least twenty words": r"(?s)(\w+\b\W+){19}\w",
        },
    ),
    # Code.
    Prompt(
        "Write a Python function add(a, b) that returns the sum of two numbers.",
        {"defines add": r"def add\(\s*\w+.*,\s*\w+.*\)", "returns a sum": r"return \(?\w+ ?\+ ?\w+|return sum\("},
    ),
    Prompt("Write one line of Python that prints the word Hello.", {"prints Hello": r"print\(\s*[\"'][Hh]ello\b"}),
)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="model: a folder, name, hub id or .gguf file")
    parser.add_argument("--new_tokens", type=int, default=160, help="that an answer has at most, stop token included")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--four_bits", action="store_true", help="with weights as benchmarks/quantised.py rounds them")
    parser.add_argument("--output_path", type=Path, help="file of the record")
    return parser


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as the chat template writes it, up to where the answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        chat_template=dated_template(tokenizer),
        add_generation_prompt=True,
        tokenize=False,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Ids that end an answer: the tokenizer's end token, and those that the model's generation settings name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({token for token in (tokenizer.eos_token_id, *named) if token is not None})


def goes_round(ids: Sequence[int]) -> bool:
    """Whether LOOP_TOKENS tokens in a row are in `ids` LOOP_TIMES times or more."""
    runs = Counter(tuple(ids[start : start + LOOP_TOKENS]) for start in range(len(ids) - LOOP_TOKENS + 1))
    return max(runs.values(), default=0) >= LOOP_TIMES


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: Sequence[int], stops: list[int], new_tokens: int) -> list[int]:
    """Ids that the model continues those of a prompt by, greedily, whatever its generation settings say."""
    ids = torch.tensor([prompt], device=model.device)
    # In place of the model's own, which would fill in what others leave open, a penalty for repetition, say.
    model.generation_config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
    )
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output[0, len(prompt) :].tolist()


def judged(prompt: Prompt, ids: list[int], stops: list[int], tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the record says of an answer."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    rules = prompt.judge(text)
    return {
        "prompt": prompt.text,
        "answer": text,
        "tokens": len(ids),
        "rules": rules,
        "right": all(rules.values()),
        "stopped": bool(ids) and ids[-1] in stops,
        "goes_round": goes_round(ids),
    }


def totals(answers: list[dict]) -> dict[str, int]:
    """How many of the answers are right, stopped and go round in circles, and how many have no fault."""
    return {
        "prompts": len(answers),
        "right": sum(row["right"] for row in answers),
        "stopped": sum(row["stopped"] for row in answers),
        "go_round": sum(row["goes_round"] for row in answers),
        "faultless": sum(row["right"] and row["stopped"] and not row["goes_round"] for row in answers),
    }


def run(args: argparse.Namespace) -> None:
    """Ask the model all prompts, print what it answers, and write the record."""
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    if args.new_tokens < 1:
        raise UsageError(f"--new_tokens {args.new_tokens} must be at least 1")
    library = bitsandbytes() if args.four_bits else None
    location, device = locate(args.checkpoint, "--checkpoint"), pick_device(args.device)
    config, tokenizer = read_config(location), read_tokenizer(location)
    if tokenizer is None or chat_template(tokenizer) is None:
        raise location.error("its tokenizer has no chat template; give an instruction model")
    prompts = [prompt_ids(tokenizer, prompt.text) for prompt in PROMPTS]
    check_positions({"--new_tokens": max(map(len, prompts)) + args.new_tokens}, config, location)
    check_vocabulary(max(map(max, prompts)), config, location)
    model = read_model(location, args.dtype).to(device)
    if not (stops := stop_tokens(tokenizer, model)):
        raise location.error("neither its tokenizer nor its generation settings name an end token; name an eos_token")
    quantised = in_four_bits(model, library) if library else None
    answers = [
        judged(prompt, answer(model, ids, stops, args.new_tokens), stops, tokenizer)
        for prompt, ids in zip(PROMPTS, tqdm(prompts, desc="chat", unit="prompt"), strict=True)
    ]
    record = {
        "kind": "chat",
        "settings": flags_of(args),
        "model": describe_source(location, config),
        "parameters": count_parameters(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantised": quantised,
        "template_sha256": hashlib.sha256(dated_template(tokenizer).encode()).hexdigest(),
        "stop_tokens": stops,
        "new_tokens": args.new_tokens,
        "loop": {"tokens": LOOP_TOKENS, "times": LOOP_TIMES},
        "rules": {prompt.text: prompt.rules for prompt in PROMPTS},
        "answers": answers,
        "totals": totals(answers),
        "environment": environment(device),
    }
    for row in answers:
        marks = (
            "right" if row["right"] else "WRONG",
            "" if row["stopped"] else "no stop",
            "goes round" if row["goes_round"] else "",
        )
        print(f"{row['prompt']}\n    {row['answer']!r}\n    {', '.join(filter(None, marks))}")
    print(", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in record["totals"].items()))
    if args.output_path:
        write_record(args.output_path, record)


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
