"""Zero-shot tasks whose answers the model writes."""

import json

import pytest
import torch
from conftest import make_llama, raising
from tiny_tasks import ROWS, score, write_rows

from olica.evaluation import zero_shot
from olica.evaluation.local_rows import LOCAL_ROWS, LocalRows
from olica.evaluation.settings import EvaluationSettings

pytestmark = pytest.mark.usefixtures("stock_tasks")


def greedy(model, tokenizer, question: str, tokens: int) -> str:
    """What the bare model says next, one prompt at a time and without a cache."""
    ids = tokenizer.encode(question, add_special_tokens=False)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[-tokens:], skip_special_tokens=True)


@pytest.fixture
def exact_llama():
    """A model of just the tokenizer's vocabulary."""
    return make_llama(num_key_value_heads=2, vocab_size=259)


@pytest.fixture
def generating(monkeypatch, tmp_path, exact_llama, tokenizer):
    """A data folder with a task `sums` of local rows that generates; every second row asks for what the model says."""
    stock = {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    stock |= {"generation_kwargs": {"until": ["Question"], "max_gen_toks": 6}}
    stock |= {"metric_list": [{"metric": "exact_match"}]}
    (tmp_path / "sums.yaml").write_text(json.dumps(stock))
    monkeypatch.setitem(LOCAL_ROWS, "sums", LocalRows(str(tmp_path / "sums.yaml"), "sums", "test"))
    questions = [f"{'What is ' * index}{index} and {index}?" for index in range(6)]
    answers = [greedy(exact_llama, tokenizer, question, 6) for question in questions]
    answers[::2] = ["none"] * 3
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    write_rows(tmp_path / "rows", "sums", rows)
    return tmp_path / "rows"


@pytest.mark.parametrize("pad", ["beyond the vocabulary", "none", "none, nor an unknown one", "its own"])
def test_prompts_are_padded_by_a_token_that_the_model_has(generating, exact_llama, tokenizer, pad):
    match pad:
        case "beyond the vocabulary":
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            assert tokenizer.pad_token_id == exact_llama.config.vocab_size
        case "none, nor an unknown one":
            tokenizer.unk_token = None
        case "its own":
            tokenizer.pad_token = "a"
    before = tokenizer.pad_token
    result = score(exact_llama, tokenizer, ["sums"], generating, batch_size=4)["tasks"]["sums"]
    assert (result["exact_match"], result["samples"]) == (0.5, 6) and tokenizer.pad_token == before


def test_tasks_that_generate_say_how_much(generating):
    write_rows(generating, "piqa_validation", [ROWS["piqa_validation"]])
    assert zero_shot.check_tasks(["piqa", "sums"], EvaluationSettings(data_dir=generating)) == {"sums": 6}


@pytest.mark.parametrize("error", [AssertionError, KeyError, TypeError])
def test_what_fails_in_the_model_is_no_fault_of_the_rows(generating, grouped_llama, tokenizer, error):
    write_rows(generating, "hellaswag_validation", [ROWS["hellaswag_validation"]])
    grouped_llama.register_forward_pre_hook(raising(error("index out of range in self")))
    for task in ("hellaswag", "sums"):
        with pytest.raises(error, match="index out of range in self"):
            score(grouped_llama, tokenizer, [task], generating)
