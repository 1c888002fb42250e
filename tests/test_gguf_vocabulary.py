"""Vocabularies in GGUF files: against SentencePiece itself, and the names that transformers has for splits."""

import gguf
import pytest
import sentencepiece
from conftest import make_llama, make_tokenizer
from sentencepiece import sentencepiece_model_pb2
from tiny_families import make_family
from tiny_gguf import (
    GEMMA,
    GEMMA_PIECES,
    GGUF_SIZES,
    LLAMA_PIECES,
    config_of,
    fields_of,
    merging_tokenizer,
    save,
    train_sentencepiece,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from olica.errors import UsageError
from olica.outputs.gguf_file import write_gguf
from olica.outputs.gguf_vocabulary import SPLITS, vocabulary_of
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scores_make_sentencepiece_cut_text_as_the_tokenizer_does(family, tmp_path):
    """SentencePiece itself is given the tokens, kinds and scores of the file."""
    pieces = LLAMA_PIECES if family == "llama" else GEMMA_PIECES
    model = make_family(
        family, peculiar=False, **GGUF_SIZES | (GEMMA if family != "llama" else {}) | {"vocab_size": 504}
    )
    model.save_pretrained(tmp_path / "dense")
    train_sentencepiece(tmp_path / "dense", **pieces)
    write_gguf(tmp_path / "dense", tmp_path / "tiny.gguf")
    fields, tokenizer = fields_of(tmp_path / "tiny.gguf"), read_tokenizer(locate(str(tmp_path / "dense")))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.add_space_prefix"] == (family == "llama")
    described = sentencepiece_model_pb2.ModelProto()
    described.trainer_spec.model_type, described.trainer_spec.byte_fallback = 2, True
    described.normalizer_spec.add_dummy_prefix = fields["tokenizer.ggml.add_space_prefix"]
    described.normalizer_spec.remove_extra_whitespaces = False
    names = ("tokens", "scores", "token_type")
    for token, score, kind in zip(*(fields[f"tokenizer.ggml.{name}"] for name in names), strict=True):
        described.pieces.add(piece=token, score=score, type=kind)
    trained = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "dense" / "tokenizer.model"))
    found = sentencepiece.SentencePieceProcessor(model_proto=described.SerializeToString())
    for text in ("Pruned models load like any other.", "two  spaces, ü and\ttab", "Licensed works\n\n of 1234 authors"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert found.encode(text) == ids == trained.encode(text)
    types = fields["tokenizer.ggml.token_type"]
    assert types.count(gguf.TokenType.BYTE) == 256 and types[-3:] == [gguf.TokenType.UNUSED] * 3
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD503]"


def test_added_tokens_and_templates_are_written(tmp_path):
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    folder = save(make_llama(), tmp_path / "dense", tokenizer)
    write_gguf(folder, tmp_path / "tiny.gguf")
    fields = fields_of(tmp_path / "tiny.gguf")
    assert fields["tokenizer.ggml.tokens"][260:262] == ["<think>", "<|end|>"]
    types = fields["tokenizer.ggml.token_type"]
    assert types[258:263] == [1, 1, 4, 3, 5] and types[:3] == [3, 3, 3]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert not fields["tokenizer.ggml.add_bos_token"]


def test_names_of_splits_are_those_that_transformers_knows():
    for name in ("llama-bpe", "qwen2", "qwen35", "tekken"):
        assert SPLITS[(GGUF_PRE_TOKENIZER_SPLITS[name],)] == name


def split_by(*steps) -> PreTrainedTokenizerFast:
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([WORDS], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), WORDS], "smollm"),
        ([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), "isolated"), BYTES], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), "isolated"), BYTES], "tekken"),
    ],
)
def test_how_text_is_split_has_a_name(steps, name):
    assert vocabulary_of(split_by(*steps), config_of()).split == name


def sentencepiece_like(**settings) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="<unk>", **settings))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def normalising() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like(byte_fallback=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def splitting() -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like(byte_fallback=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


OTHERS = {
    "it splits text in a way that llama.cpp has no name for": lambda: split_by(
        pre_tokenizers.Split(Regex("x"), "isolated"), BYTES
    ),
    "it splits text in a way that llama.cpp has no name for; those": lambda: split_by(
        pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "it is of the kind Unigram, not BPE": lambda: PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], unk_id=0)), unk_token="a"
    ),
    "its list of merges is empty: it has no rule that joins characters to longer tokens": make_tokenizer,
    "it can spell no character in bytes, as SentencePiece does where it has no other token": sentencepiece_like,
    r"it changes text by a normaliser \(NFKC\), besides marking spaces": normalising,
    r"it splits text by a step \(Whitespace\) that SentencePiece lacks": splitting,
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(message):
    said = f"^--gguf: the model's tokenizer cannot be written for llama.cpp, since {message}.* can are byte-level BPE"
    with pytest.raises(UsageError, match=said):
        vocabulary_of(OTHERS[message](), config_of())


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(UsageError, match="a token of id 259, but the model's embedding 200 rows"):
        vocabulary_of(merging_tokenizer(), config_of(vocab_size=200))
