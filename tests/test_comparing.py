"""What people compare a pruned model with: a short LoRA of it, 4 bits, and whether it still chats."""

import json
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from called import call, load
from conftest import make_llama, make_tokenizer, refused, save_tiny
from safetensors.torch import load_file, save_file
from torch import nn

import model_evaluate
import model_pruning
from olica.sources.locate import locate
from olica.sources.weights import read_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# An answer to every prompt, in their order, as a model that can chat gives it.
GOOD_ANSWERS = (
    "The capital of France is Paris.",
    "There are twelve months in a year.",
    "The sky is blue.",
    "William Shakespeare wrote it.",
    "Humans live on Earth.",
    "The opposite of hot is cold.",
    "Oxygen.",
    "10 + 10 = 20",
    "7 times 8 is 56.",
    "You have 9 apples left.",
    "Here are three fruits:\n\n1. Apple\n2. Banana\n3. Orange",
    "Spring, summer, fall and winter.",
    "1. Monday\n2. Tuesday\n3. Wednesday\n4. Thursday\n5. Friday\n6. Saturday\n7. Sunday",
    "HELLO",
    "I walked to school every day.",
    "Bonjour.",
    "Yes.",
    "Subject: Thank you\n\nDear Ms. Brown,\n\nThank you so much for all of your help this year. I have learned a great "
    "deal in your class.\n\nBest regards,\nAlex",
    "```python\ndef add(a, b):\n    return a + b\n```",
    'print("Hello")',
)


@pytest.fixture
def chat():
    return load("benchmarks/chat.py")


def command(script, *flags: str) -> int:
    return call(script, *flags)


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tiny model, its tokenizer and a token file of sequences that repeat one another."""
    save_tiny(tmp_path / "tiny", num_key_value_heads=2)
    save_file({"calibration_ids": torch.arange(3, 35).repeat(40, 1)}, tmp_path / "ids.safetensors")
    (tmp_path / "text.txt").write_text("seven wise owls read old books by candle light\n" * 20)
    return tmp_path


def test_a_lora_of_a_pruned_model_is_a_pruned_model_that_knows_the_text(tiny, capsys):
    ids, base = f"--datasets={tiny / 'ids.safetensors'}", f"--base_model={tiny / 'tiny'}"
    flags = [base, ids, f"--save_dir={tiny / 'out'}", f"--data_dir={tiny}", "--mlp_num=1", "--ratio=0.1"]
    command(model_pruning, *flags)
    pruned, retrained = tiny / "out/tiny_sparsity-0.2", tiny / "retrained"
    script = load("benchmarks/lora.py")
    flags = [f"--checkpoint={pruned}", ids, f"--data_dir={tiny}", "--epochs=6"]
    assert command(script, *flags, f"--output_path={retrained}") == 0
    assert "30 steps" in capsys.readouterr().out
    record = json.loads((retrained / "lora_run.json").read_text())
    assert record["samples"] == {"trained": [37, 32], "held_back": [3, 32]} and record["steps"] == 6 * math.ceil(37 / 8)
    before, after = (record["loss_held_back"][when] for when in ("before", "after"))
    assert after < before - 1
    assert (retrained / "olica_run.json").read_bytes() == (pruned / "olica_run.json").read_bytes()
    ours, theirs = (read_model(locate(str(folder))) for folder in (pruned, retrained))
    changed = {
        name.removesuffix(".weight")
        for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True)
        if not torch.equal(weight, other)
    }
    layers = ours.model.layers.named_modules(prefix="model.layers")
    linear = {name for name, module in layers if isinstance(module, nn.Linear)}
    assert changed == linear, "every linear layer but the head, and nothing else"
    assert any("correction" in name for name in linear) and any("q_proj.reduce" in name for name in linear)
    adapters = sum(8 * sum(module.weight.shape) for name, module in ours.named_modules() if name in linear)
    assert record["parameters_of_adapters"] == adapters
    measure = [f"--ppl={tiny / 'text.txt'}", "--ppl_seqlen=32", f"--output_path={tiny / 'measured.json'}"]
    command(model_evaluate, f"--checkpoint={retrained}", *measure)
    measured = json.loads((tiny / "measured.json").read_text())["results"]["model"]
    assert measured["parameters"] == record["parameters"]
    command(script, *flags, f"--output_path={tiny / 'again'}")
    files = (load_file(folder / "model.safetensors") for folder in (retrained, tiny / "again"))
    one, other = files
    assert all(torch.equal(weight, other[name]) for name, weight in one.items()), "the seed decides all"


def test_a_lora_of_a_dense_model_keeps_its_dtype(tiny):
    make_llama().bfloat16().save_pretrained(tiny / "half")
    script, ids = load("benchmarks/lora.py"), f"--datasets={tiny / 'ids.safetensors'}"
    command(script, f"--checkpoint={tiny / 'half'}", ids, f"--data_dir={tiny}", f"--output_path={tiny / 'retrained'}")
    assert read_model(locate(str(tiny / "retrained"))).dtype == torch.bfloat16
    assert not (tiny / "retrained/olica_run.json").exists() and not (tiny / "retrained/tokenizer.json").exists()


def test_wrong_input_to_lora(tiny, capsys):
    script, ids = load("benchmarks/lora.py"), f"--datasets={tiny / 'ids.safetensors'}"
    flags = [f"--checkpoint={tiny / 'tiny'}", f"--data_dir={tiny}", f"--output_path={tiny / 'retrained'}"]
    assert "--epochs 0 must be at least 1" in refused(capsys, command, script, *flags, ids, "--epochs=0")
    assert "exists already" in refused(capsys, command, script, *flags, ids, f"--output_path={tiny / 'tiny'}")
    save_file({"calibration_ids": torch.arange(3, 35).view(1, 32)}, tiny / "one.safetensors")
    one = f"--datasets={tiny / 'one.safetensors'}"
    assert "--num_samples: give at least 2" in refused(capsys, command, script, *flags, one)
    assert not (tiny / "retrained").exists()


def test_good_answers_satisfy_the_rules_and_others_do_not(chat):
    assert len(chat.PROMPTS) == len(GOOD_ANSWERS) == 20
    assert len({prompt.text for prompt in chat.PROMPTS}) == 20
    for prompt, good in zip(chat.PROMPTS, GOOD_ANSWERS, strict=True):
        right = prompt.judge(good)
        assert right and all(right.values()), (prompt.text, right)
        wrong = [other for other in GOOD_ANSWERS if other != good]
        garbage = ["", "the the the the the the", "\n\n\n", "1. 1. 1. 1.", "?!", "I am a helpful assistant."]
        for answer in [*wrong, *garbage, prompt.text, prompt.text.lower()]:
            assert not all(prompt.judge(answer).values()), (prompt.text, answer)


def test_a_list_counts_lines_that_start_with_a_number(chat):
    (listing,) = (prompt for prompt in chat.PROMPTS if "numbered list" in prompt.text)
    for answer, numbered in (
        ("1. Apple\n2. Pear", False),
        ("1. Apple 2. Pear 3. Kiwi", False),
        ("Apple\nPear\nKiwi", False),
        ("Sure!\n1) Apple\n\n2) Pear\n 3) Kiwi", True),
    ):
        assert listing.judge(answer)["has at least three lines that start with a number"] == numbered


def test_what_goes_round(chat):
    once = list(range(8))
    assert chat.goes_round([*once, 9, *once, 10, *once])
    assert not chat.goes_round([*once, 9, *once]) and not chat.goes_round([*once[:7], 9] * 2 + once[:7])
    assert chat.goes_round([1] * 10) and not chat.goes_round([1] * 9) and not chat.goes_round([])


def test_the_template_writes_the_prompt_once(chat):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = chat.prompt_ids(tokenizer, "Is it?")
    assert tokenizer.decode(ids) == "[user] Is it?</s>[assistant] "
    assert ids.count(tokenizer.eos_token_id) == 1


def test_answers_are_greedy_until_a_stop_token(chat):
    """By logits that the test takes itself, one token after the other, without a cache."""
    model, prompt = make_llama(), [5, 60, 7, 200]
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=1.5)
    expected = list(prompt)
    for _ in range(12):
        expected.append(model(torch.tensor([expected])).logits[0, -1].argmax().item())
    expected = expected[len(prompt) :]
    assert chat.answer(model, prompt, [2], 12) == expected
    stop = expected[3]
    first = expected.index(stop) + 1
    stopped = chat.answer(model, prompt, [2, stop], 12)
    assert stopped == expected[:first]
    tokenizer = make_tokenizer()
    rows = [chat.judged(chat.PROMPTS[0], ids, [2, stop], tokenizer) for ids in (stopped, expected[:first][:-1])]
    assert [row["stopped"] for row in rows] == [True, False]


def test_chat_records_answers_and_totals(chat, tiny, capsys):
    flags = [f"--checkpoint={tiny / 'tiny'}", f"--output_path={tiny / 'chat.json'}", "--new_tokens=9"]
    assert "its tokenizer has no chat template; give an instruction model" in refused(capsys, command, chat, *flags)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny / "tiny")
    assert "do not fit in the 256 positions" in refused(capsys, command, chat, *flags, "--new_tokens=250")
    assert "--new_tokens 0 must be at least 1" in refused(capsys, command, chat, *flags, "--new_tokens=0")
    assert command(chat, *flags) == 0
    record = json.loads((tiny / "chat.json").read_text())
    assert [row["prompt"] for row in record["answers"]] == [prompt.text for prompt in chat.PROMPTS]
    assert all(row["tokens"] == 9 or row["stopped"] for row in record["answers"])
    assert record["stop_tokens"] == [2] and record["totals"]["right"] == record["totals"]["faultless"] == 0
    assert all(re.compile(rule) for rules in record["rules"].values() for rule in rules.values())
    assert "prompts: 20, right: 0" in capsys.readouterr().out


def answer_row(right: bool, stopped: bool, goes_round: bool) -> dict:
    return {"right": right, "stopped": stopped, "goes_round": goes_round}


def test_totals(chat):
    kinds = [(True, True, False), (True, True, True), (True, False, False), (False, True, False)]
    rows = [answer_row(*kind) for kind in kinds]
    assert chat.totals(rows) == {"prompts": 4, "right": 3, "stopped": 3, "go_round": 1, "faultless": 1}


class Quarters:
    """In place of bitsandbytes: weights are rounded to quarters, and packed into as many bytes as it packs them."""

    __version__ = "0"

    def __init__(self):
        self.functional = self

    def quantize_4bit(self, weight, blocksize, quant_type, compress_statistics):
        assert (blocksize, quant_type, compress_statistics) == (64, "nf4", False)
        scales = torch.zeros(math.ceil(weight.numel() / blocksize))
        state = SimpleNamespace(absmax=scales, rounded=(4 * weight).round() / 4)
        return torch.zeros(math.ceil(weight.numel() / 2), dtype=torch.uint8), state

    def dequantize_4bit(self, packed, state):
        return state.rounded


def test_a_model_in_four_bits_is_evaluated_as_any_other(tiny, monkeypatch):
    script = load("benchmarks/quantised.py")
    monkeypatch.setattr(script, "bitsandbytes", Quarters)
    flags = [
        f"--ppl={tiny / 'text.txt'}",
        "--ppl_seqlen=48",
        "--ppl_windows=5",
        f"--output_path={tiny / 'record.json'}",
    ]
    assert command(script, f"--checkpoint={tiny / 'tiny'}", *flags) == 0
    record = json.loads((tiny / "record.json").read_text())
    result, settings = record["results"]["model"], record["settings"]
    assert settings["ppl_seqlen"] == 48 and settings["limit"] is None and record["dtype"] == "float32"
    dense = read_model(locate(str(tiny / "tiny")))
    layers = {name: module for name, module in dense.named_modules() if isinstance(module, nn.Linear)}
    del layers["lm_head"]
    weights = [module.weight.numel() for module in layers.values()]
    packed = sum(math.ceil(number / 2) + 4 * math.ceil(number / 64) for number in weights)
    assert len(weights) == 21 and result["quantised"]["bytes"] == packed
    assert result["weight_bytes"] == 4 * (dense.num_parameters() - sum(weights)) + packed
    assert result["parameters"]["total"] == dense.num_parameters()
    for module in layers.values():
        module.weight.data = (4 * module.weight.data).round() / 4
    dense.save_pretrained(tiny / "rounded")
    make_tokenizer().save_pretrained(tiny / "rounded")
    command(model_evaluate, f"--checkpoint={tiny / 'rounded'}", *flags)
    expected = json.loads((tiny / "record.json").read_text())["results"]["model"]
    assert result["perplexity"] == expected["perplexity"]


def test_bitsandbytes_itself_rounds_to_sixteen_steps():
    library = pytest.importorskip("bitsandbytes")
    script, model = load("benchmarks/quantised.py"), make_llama()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    said = script.in_four_bits(model, library)
    after = model.model.layers[0].mlp.up_proj.weight
    steps = [len(block.unique()) for block in after.flatten().split(64)]
    assert max(steps) <= 16 and said["bytes"] * 8 == pytest.approx(4.5 * said["unpacked_bytes"] / 4)
    assert 0 < ((after - before).norm() / before.norm()) < 0.15


def test_without_bitsandbytes_one_sentence_says_so(tiny, chat, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    script = load("benchmarks/quantised.py")
    flags = [f"--checkpoint={tiny / 'tiny'}", f"--output_path={tiny / 'record.json'}"]
    assert "pip install bitsandbytes==0.50.2" in refused(capsys, command, script, *flags, f"--ppl={tiny / 'text.txt'}")
    assert "pip install bitsandbytes==0.50.2" in refused(capsys, command, chat, *flags, "--four_bits")


def test_a_chat_of_a_model_in_four_bits(chat, tiny, monkeypatch):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tiny / "tiny")
    monkeypatch.setattr(chat, "bitsandbytes", Quarters)
    flags = [f"--checkpoint={tiny / 'tiny'}", f"--output_path={tiny / 'chat.json'}", "--new_tokens=5"]
    answers = []
    for further in ([], ["--four_bits"]):
        command(chat, *flags, *further)
        record = json.loads((tiny / "chat.json").read_text())
        answers.append([row["answer"] for row in record["answers"]])
        assert bool(record["quantised"]) == bool(further)
    assert answers[0] != answers[1]
