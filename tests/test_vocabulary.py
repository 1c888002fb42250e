"""Checkpoints with fewer tokens: what goes, against plain counting; the same logits for the tokens that stay."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from called import ROOT, call
from conftest import edit_config, make_llama, make_tokenizer, refused, write_json
from made_records import RECORD
from safetensors.torch import save_file
from test_export import PLAN, write
from tiny_commands import export_model
from tiny_families import make_family
from tiny_gguf import GEMMA, GEMMA_PIECES, GGUF_SIZES, LLAMA_PIECES, train_sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import model_evaluate
import olica
from olica.errors import UsageError
from olica.evaluation.paired import compare
from olica.evaluation.perplexity import bytes_predicted, token_windows
from olica.outputs.vocabulary_export import WantedTokens, export_with_vocabulary
from olica.sources import thinned_vocabulary
from olica.sources.locate import locate
from olica.sources.text_sources import evaluation_text
from olica.sources.thinned_vocabulary import count_tokens, kept_tokens, with_tokens
from olica.sources.tokenizers import read_tokenizer

LICENCE = (ROOT / "LICENSE").read_text().splitlines()
# What no text above has: other scripts, halves of characters, control characters.
STRANGE = "Zażółć 文字 \u0001 🦉\n\n\t'tis ﬁ²"
SIZE = 400


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs of the licence: 512 tokens, the special ones of which are the last; texts begin with <s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LICENCE, trainers.BpeTrainer(vocab_size=510, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 510)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A file of the last paragraphs of the licence, so that what the others have goes first."""
    return write_json(tmp_path_factory.mktemp("texts") / "text.jsonl", [{"text": line} for line in LICENCE[-60:]])


def save_dense(folder: Path, family: str = "llama", **settings) -> PreTrainedModel:
    model = make_family(family, vocab_size=512, **settings)
    for one in (model.config, model.generation_config):
        one.bos_token_id, one.eos_token_id, one.pad_token_id = 510, 511, None
    model.save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return model


def fewer(folder: Path, texts: Path, size: int = SIZE, **more) -> dict:
    wanted = WantedTokens(size, str(texts), None)
    return export_with_vocabulary(folder, folder.with_name("fewer"), wanted, 10**9, **more)


def tokens_by_id(folder: Path) -> dict[int, str]:
    return {index: token for token, index in AutoTokenizer.from_pretrained(folder).get_vocab().items()}


def rules_of(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def made_rules(tokens: str, merges: list[str], **model) -> dict:
    vocabulary = {token: index for index, token in enumerate(tokens.split())}
    model = {"vocab": vocabulary, "merges": [merge.split() for merge in merges]} | model
    return {"model": model, "added_tokens": [], "post_processor": None}


def test_the_rarest_leaf_goes_and_its_parts_are_as_frequent_as_both():
    rules = made_rules("a b c ab abc bc", ["a b", "ab c", "b c"])
    often = {"a": 9, "b": 9, "c": 9, "ab": 1, "abc": 4, "bc": 3}
    counts = {rules["model"]["vocab"][token]: times for token, times in often.items()}
    left = [kept_tokens(rules, counts, size, []) for size in (6, 5, 4, 3, 1)]
    # bc (3) is rarer than abc (4); then abc alone is a leaf, since it reads ab, which thereby has 1 + 4.
    assert left == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert kept_tokens(rules, counts, 4, [5]) == [0, 1, 2, 5]  # bc is needed
    # Of two as rare ones the later goes.
    assert kept_tokens(rules, {}, 5, []) == [0, 1, 2, 3, 4]


def by_plain_counting(rules: dict, counts: dict[int, int], size: int) -> list[int]:
    """What is left, every step looked up anew in all merges that are left."""
    ids, merges = dict(rules["model"]["vocab"]), list(map(tuple, rules["model"]["merges"]))
    times = {token: counts.get(index, 0) for token, index in ids.items()}
    added = {token["content"] for token in rules["added_tokens"]}
    left = {**ids, **{token["content"]: token["id"] for token in rules["added_tokens"]}}
    while len(left) > size:
        free = [t for t in left if len(t) > 1 and t not in added and not any(t in merge for merge in merges)]
        token = min(free, key=lambda t: (times[t], -ids[t]))
        for part in next(merge for merge in merges if "".join(merge) == token):
            times[part] += times[token]
        merges = [merge for merge in merges if "".join(merge) != token]
        del left[token]
    return sorted(left.values())


def test_what_stays_of_a_trained_tokenizer_is_what_plain_counting_leaves(texts):
    tokenizer = trained_tokenizer()
    rules, counts = rules_of(tokenizer), count_tokens(str(texts), tokenizer, None).counts
    for size in (500, 430, 300, 258):
        assert kept_tokens(rules, counts, size, []) == by_plain_counting(rules, counts, size)


def test_tokens_are_counted_as_texts_have_them(texts, monkeypatch):
    tokenizer = trained_tokenizer()
    found = count_tokens(str(texts), tokenizer, None)
    by_hand = Counter(
        index for line in LICENCE[-60:] for index in tokenizer(line, add_special_tokens=False)["input_ids"]
    )
    assert found.counts == by_hand and found.sources[0]["tokens"] == by_hand.total()
    assert found.sources[0]["read"] == found.sources[0]["rows"] == 60
    monkeypatch.setattr(thinned_vocabulary, "COUNTED_TOKENS", 100)
    shorter = count_tokens(str(texts), tokenizer, None)
    assert 100 <= shorter.counts.total() < 200 and 1 < shorter.sources[0]["read"] < 60


@pytest.mark.parametrize("size", [500, 300, 258])
def test_every_text_is_still_written_and_read(size, texts):
    tokenizer = trained_tokenizer()
    counts = count_tokens(str(texts), tokenizer, None).counts
    found = thinned_vocabulary.thin_vocabulary(tokenizer, counts, size, [])
    assert len(found.tokenizer) == len(found.rows) == size
    for text in [*LICENCE, STRANGE]:
        ids = found.tokenizer(text)["input_ids"]
        assert found.tokenizer.decode(ids, skip_special_tokens=True) == text
        # The same pieces by their new numbers, the start token among them.
        assert found.tokenizer.convert_ids_to_tokens(ids)[:1] == ["<s>"] and max(ids) < size
    old = {index: token for token, index in tokenizer.get_vocab().items()}
    assert [old[row] for row in found.rows] == found.tokenizer.convert_ids_to_tokens(range(size))


@pytest.mark.parametrize("pieces", [LLAMA_PIECES, GEMMA_PIECES])
def test_characters_go_where_bytes_can_stand_for_them(tmp_path, pieces, texts):
    """Tokenizers of SentencePiece, of whose characters some can go too."""
    family = "llama" if pieces is LLAMA_PIECES else "gemma3_text"
    sizes = GGUF_SIZES | (GEMMA if family != "llama" else {}) | {"vocab_size": 500}
    make_family(family, peculiar=False, **sizes).save_pretrained(tmp_path / "dense")
    train_sentencepiece(tmp_path / "dense", **pieces)
    record = fewer(tmp_path / "dense", texts, 290)
    assert record["tokens"] == {"before": 500, "after": 290}
    found, before = read_tokenizer(locate(str(tmp_path / "fewer"))), read_tokenizer(locate(str(tmp_path / "dense")))
    characters = [{token for token in one.get_vocab() if len(token) == 1} for one in (found, before)]
    assert characters[0] < characters[1] and len(before) - len(found) == 210
    for text in [*LICENCE[:40], STRANGE]:
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == before.decode(
            before(text)["input_ids"], skip_special_tokens=True
        )


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma3_text", True), ("qwen2", True)])
def test_logits_of_what_stays_are_those_of_the_dense_model(tmp_path, texts, family, tied):
    dense = save_dense(tmp_path / "dense", family, tied=tied)
    record = fewer(tmp_path / "dense", texts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    old = {token: index for index, token in tokens_by_id(tmp_path / "dense").items()}
    rows = torch.tensor([old[token] for _, token in sorted(tokens_by_id(tmp_path / "fewer").items())][:SIZE])
    ids = torch.randint(0, SIZE, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(ids).logits, dense(rows[ids]).logits[..., rows])
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (SIZE - 2, SIZE - 1)
    lost = (1 if tied else 2) * (512 - SIZE) * dense.config.hidden_size
    assert record["parameters"] == {"before": dense.num_parameters(), "after": model.num_parameters()}
    assert dense.num_parameters() - model.num_parameters() == lost
    told = json.loads((tmp_path / "fewer/olica_vocabulary.json").read_text())
    assert told == record and 0 < told["share_of_text_gone"] < 0.2
    card = (tmp_path / "fewer/README.md").read_text()
    assert f"with {SIZE} of its 512 tokens" in card and "The tokens that text.jsonl had least" in " ".join(card.split())


def test_a_pruned_checkpoint_loses_tokens_too_and_its_record_knows(tmp_path, texts):
    pruned = write("llama", [replace(PLAN[0], o_bias=True), *PLAN[1:]], tmp_path / "pruned", vocab_size=512)
    trained_tokenizer().save_pretrained(tmp_path / "pruned")
    (tmp_path / "pruned/olica_run.json").write_text(json.dumps(RECORD))
    record = fewer(tmp_path / "pruned", texts)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer")
    assert type(model) is type(pruned) and model.config.layer_shapes == pruned.config.layer_shapes
    told = json.loads((tmp_path / "fewer/olica_run.json").read_text())
    gone = record["parameters"]["before"] - record["parameters"]["after"]
    assert gone == pruned.num_parameters() - model.num_parameters() > 0
    assert told["parameters"]["after"] == RECORD["parameters"]["after"] - gone
    assert told["measured_sparsity"] == 1 - told["parameters"]["after"] / RECORD["parameters"]["before"]
    assert "Of the 512 tokens of its vocabulary 400 are left" in (tmp_path / "fewer/README.md").read_text()


def test_settings_name_tokens_by_their_new_ids(tmp_path, texts):
    save_dense(tmp_path / "dense")
    path = tmp_path / "dense/generation_config.json"
    settings = json.loads(path.read_text())
    kept = json.loads(json.dumps(fewer(tmp_path / "dense", texts)))["tokens"]["after"]
    stayed = tokens_by_id(tmp_path / "fewer").values()
    gone, lost = [i for i in range(300, 510) if tokens_by_id(tmp_path / "dense")[i] not in stayed][:2]
    lists = {"suppress_tokens": [66, gone], "begin_suppress_tokens": [66, lost]}
    path.write_text(json.dumps(settings | lists | {"eos_token_id": [511, 65], "pad_token_id": gone}))
    fewer(tmp_path / "dense", texts, overwrite=True)
    written, names = (
        json.loads((tmp_path / "fewer/generation_config.json").read_text()),
        tokens_by_id(tmp_path / "fewer"),
    )
    old = tokens_by_id(tmp_path / "dense")
    assert [names[index] for index in written["eos_token_id"]] == ["</s>", old[65]] and kept == SIZE
    assert [names[index] for index in written["suppress_tokens"]] == [old[66], old[gone]]
    assert [names[index] for index in written["begin_suppress_tokens"]] == [old[66]]
    assert names[written["pad_token_id"]] == old[gone]  # what is needed stays


def test_it_is_pruned_and_measured_like_any_other_in_bits_per_byte(tmp_path, texts, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_dense(Path("dense"))
    fewer(Path("dense").absolute(), texts)
    (tmp_path / "held.txt").write_text("\n\n".join(LICENCE))
    done = olica.prune("fewer", datasets=str(texts), sparsity=0.2, num_samples=4, seqlen=16, mlp_num=0)
    measured = olica.evaluate(done.folder, base_model="fewer", with_dense=True, ppl="held.txt", ppl_seqlen=32)
    results = measured.record["results"]
    found, tokenizer = results["pruned"]["perplexity"]["held.txt"], AutoTokenizer.from_pretrained("fewer")
    windows = token_windows(tokenizer, evaluation_text("held.txt", None)[0], 32)
    # (The first window alone begins with <s>, whose bytes are in neither.)
    assert found["bytes"] == bytes_predicted(tokenizer, windows)
    nats = found["mean_nll"] * found["predictions"]
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / found["bytes"])
    assert "held.txt" in results["pruned"]["to_dense"]["perplexity"]
    # With the tokens of the dense model other windows are measured: no row of one is a row of the other.
    dense = olica.evaluate("dense", ppl="held.txt", ppl_seqlen=32, ppl_windows=9).record["results"]["model"]
    ours = olica.evaluate("fewer", ppl="held.txt", ppl_seqlen=32, ppl_windows=9).record["results"]["model"]
    assert compare(ours, dense)["perplexity"] == {} and compare(ours, ours)["perplexity"]
    assert call(model_evaluate, "--checkpoint=fewer", "--ppl=held.txt", "--ppl_seqlen=32", "--device=cpu") == 0
    assert f"bits per byte, held.txt {' ':>5}" in capsys.readouterr().out


def test_bytes_of_windows_are_those_of_all_but_their_first_tokens():
    tokenizer = make_tokenizer()
    text = "seven owls, and then some more of them"
    assert bytes_predicted(tokenizer, token_windows(tokenizer, text, 9)) == 8 * (len(text) // 9)
    trained = trained_tokenizer()
    windows = token_windows(trained, "\n".join(LICENCE), 64)
    counted = sum(len("".join(trained.convert_ids_to_tokens(window[1:]))) for window in windows)
    assert bytes_predicted(trained, windows) == counted  # a character of a byte-level token is a byte


def spaced_rules(byte_tokens: range) -> dict:
    """Of SentencePiece's kind: four letters and the separator, a merge, and so many of the tokens that are bytes."""
    tokens = "<unk> \u2581 a b c \u2581a " + " ".join(f"<0x{byte:02X}>" for byte in byte_tokens)
    return made_rules(tokens, ["\u2581 a"], byte_fallback=True, unk_token="<unk>")


def test_spaces_stay_and_characters_too_where_not_all_bytes_are_tokens():
    rare = {2: 5, 3: 1, 4: 2, 5: 9}  # the separator itself is never counted
    kept = kept_tokens(spaced_rules(range(256)), rare, 0, [])
    assert kept == [0, 1, *range(6, 262)]
    kept = kept_tokens(spaced_rules(range(128, 256)), rare, 0, [])
    assert kept == [0, 1, 2, 3, 4, *range(6, 134)]


def test_what_is_put_around_a_text_stays_though_it_was_never_added():
    rules = made_rules("a b ab", ["a b"]) | {
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"ab": {"id": "ab", "ids": [2]}}}
    }
    assert kept_tokens(rules, {}, 0, []) == [0, 1, 2]
    assert with_tokens(rules, [0, 1, 2])["post_processor"] == rules["post_processor"]


def test_what_was_lost_is_known_of_what_is_made_of_the_model(tmp_path, texts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_dense(Path("dense"))
    fewer(tmp_path / "dense", texts)
    done = olica.prune("fewer", datasets=str(texts), sparsity=0.2, num_samples=4, seqlen=16, mlp_num=0)
    first = json.loads(Path("fewer/olica_vocabulary.json").read_text())
    assert json.loads((done.folder / "olica_vocabulary.json").read_text()) == first
    export_with_vocabulary(done.folder, "again", WantedTokens(300, str(texts), None), 10**9)
    again = json.loads(Path("again/olica_vocabulary.json").read_text())
    assert again["earlier"] == first and again["tokens"] == {"before": 400, "after": 300}
    for folder, tokens in ((done.folder, 400), (Path("again"), 300)):
        assert f"Of the 512 tokens of its vocabulary {tokens} are left" in (folder / "README.md").read_text()


def test_tokens_behind_the_rows_of_the_model_stay_behind_them(tmp_path, texts):
    save_dense(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense/generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 512}))
    assert fewer(tmp_path / "dense", texts)["tokens"]["after"] == SIZE
    assert AutoTokenizer.from_pretrained(tmp_path / "fewer").pad_token_id == SIZE
    assert json.loads((tmp_path / "fewer/generation_config.json").read_text())["pad_token_id"] == SIZE
    with pytest.raises(UsageError, match="--vocab_size 100: the tokenizer needs 258 tokens"):
        fewer(tmp_path / "dense", texts, size=100, overwrite=True)


def test_the_command_says_what_went(tmp_path, texts, capsys):
    save_dense(tmp_path / "dense")
    flags = [f"--vocab_size={SIZE}", f"--datasets={texts}", f"--output_path={tmp_path / 'new'}"]
    assert export_model(tmp_path / "dense", *flags) == 0
    said = capsys.readouterr().out
    assert said.startswith("tokens 512 -> 400; ") and "\nparameters " in said and "\nsaved " in said
    share = json.loads((tmp_path / "new/olica_vocabulary.json").read_text())["share_of_text_gone"]
    assert f"{share:.2%} of the texts' tokens are gone\n" in said


def test_wrong_input_ends_in_a_sentence_and_writes_nothing(tmp_path, texts, capsys):
    save_dense(tmp_path / "dense")
    new, size, text = f"--output_path={tmp_path / 'new'}", f"--vocab_size={SIZE}", f"--datasets={texts}"
    save_file({"calibration_ids": torch.ones(2, 4, dtype=torch.long)}, tmp_path / "ids.safetensors")
    for flags, words in (
        ([size], "--vocab_size: name texts by --datasets"),
        ([text], "--datasets is for --vocab_size"),
        (["--vocab_size=512", text], "the model has 512 tokens; give fewer, and at least 1"),
        (["--vocab_size=0", text], "give fewer, and at least 1"),
        (["--vocab_size=100", text], "--vocab_size 100: the tokenizer needs 258 tokens; give at least that many"),
        ([size, f"--datasets={tmp_path / 'ids.safetensors'}"], "a token file has too few tokens"),
        ([size, "--datasets=nowhere"], "neither an existing path nor one of"),
        ([size, text, "--layout=stock"], "not allowed with argument"),
    ):
        assert words in refused(capsys, export_model, tmp_path / "dense", new, *flags)
    whole = Tokenizer(models.Unigram([("<unk>", 0.0), *((chr(97 + index), -1.0) for index in range(26))], unk_id=0))
    make_llama(vocab_size=512).save_pretrained(tmp_path / "unigram")
    PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>").save_pretrained(tmp_path / "unigram")
    assert "cannot take tokens from this tokenizer: its model is Unigram" in refused(
        capsys, export_model, tmp_path / "unigram", new, size, text
    )
    make_llama(vocab_size=512).save_pretrained(tmp_path / "bare")
    assert "the folder has no tokenizer" in refused(capsys, export_model, tmp_path / "bare", new, size, text)
    write_json(tmp_path / "empty.jsonl", [{"text": ""}])
    empty = f"--datasets={tmp_path / 'empty.jsonl'}"
    assert "has no text whose tokens could be counted" in refused(
        capsys, export_model, tmp_path / "dense", new, size, empty
    )
    write_json(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "owls"}]}])
    chats = f"--datasets={tmp_path / 'chats.jsonl'}"
    assert "has no chat template" in refused(capsys, export_model, tmp_path / "dense", new, size, chats)
    path = tmp_path / "dense/generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": [5, "6"]}))
    assert "eos_token_id is [5, '6']" in refused(capsys, export_model, tmp_path / "dense", new, size, text)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bad_words_ids": [[5, 6]]}))
    assert "name tokens in a way that is not known (they have bad_words_ids; remove it" in refused(
        capsys, export_model, tmp_path / "dense", new, size, text
    )
    edit_config(tmp_path / "dense", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "this checkpoint is quantised" in refused(capsys, export_model, tmp_path / "dense", new, size, text)
    assert not (tmp_path / "new").exists() and not [*tmp_path.glob(".*")]
