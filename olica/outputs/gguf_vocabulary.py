"""A tokenizer in the form that llama.cpp reads: tokens with their kinds, merges or scores, and how text is split."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UsageError
from ..sources.tokenizers import BYTE, SEPARATOR

# What a score is of a token that no merge makes: less than that of any other.
NEVER_MERGED = -1e9

# How byte-level tokenizers split a text before they merge bytes, in the spelling of their tokenizer.json.
DIGITS = "digits one by one"
GPT2 = "the words of GPT-2"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The names that llama.cpp has for them.
SPLITS = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (LLAMA3,): "llama-bpe",
    (QWEN2,): "qwen2",
    (QWEN35,): "qwen35",
    (TEKKEN,): "tekken",
}
KNOWN = "byte-level BPE split as by GPT-2, SmolLM, Llama 3, Qwen 2 and 3.5 or Mistral Nemo, and BPE of SentencePiece"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: which algorithm llama.cpp is to use.
        split: its name for how text is split before.
        tokens: by their ids.
        types: what each token is.
        merges: for byte-level BPE, the pairs in their order, joined by a space.
        scores: for SentencePiece, how early each token is merged.
        ids: of special tokens, by their names in a GGUF file.
        flags: whether tokens are put around a text, and a space before it.
        chat_template: one, or several by name.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the fields into a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_merges(self.merges)  # none for SentencePiece, and then no field is written
        for name, index in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.add_{name}", value)
        if isinstance(self.chat_template, dict):
            named = self.chat_template.items()
            writer.add_chat_template([{"name": name, "template": template} for name, template in named])
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Vocabulary:
    """The tokenizer of a model of `config`, whose embedding has a row for each token and maybe more.

    Raises:
        UsageError: llama.cpp has no such tokenizer, or the model has fewer rows than tokens.
    """
    stored = _stored(tokenizer)
    splits = _splits(stored)
    if splits is None:
        model, split = "llama", "default"
        _refuse_normalisation(stored)
    else:
        model, split = "gpt2", SPLITS.get(splits)
        if split is None:
            raise _unwritable("it splits text in a way that llama.cpp has no name for")
    tokens, types = _tokens(tokenizer, config.vocab_size, byte_level=splits is not None)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in stored["model"]["merges"]]
    if not merges:
        raise _unwritable("its list of merges is empty: it has no rule that joins characters to longer tokens")
    # Who merges what differs: byte-level BPE the pair of lowest rank, SentencePiece that which makes the token of the
    # highest score.
    if splits is not None:
        how = {"merges": [" ".join(pair) for pair in merges]}
    else:
        how = {"scores": _scores(stored["model"]["vocab"], merges, len(tokens))}
    return Vocabulary(
        model,
        split,
        tokens,
        types,
        **how,
        ids=_special_ids(tokenizer, config),
        flags=_flags(tokenizer),
        chat_template=tokenizer.chat_template,
    )


def _unwritable(why: str) -> UsageError:
    return UsageError(
        f"--gguf: the model's tokenizer cannot be written for llama.cpp, since {why}; those that can are {KNOWN}"
    )


def _stored(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says of the tokenizer."""
    if not tokenizer.is_fast:
        raise _unwritable("it has no tokenizer.json")
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    if stored["model"]["type"] != "BPE":
        raise _unwritable(f"it is of the kind {stored['model']['type']}, not BPE")
    return stored


def _parts(step: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The steps that a normaliser or splitter of tokenizer.json is made of."""
    if step is not None and step["type"] == "Sequence":
        for part in step[inner]:
            yield from _parts(part, inner)
    elif step is not None:
        yield step


def _splits(stored: dict[str, Any]) -> tuple[str, ...] | None:
    """How a byte-level tokenizer splits text, as a key of SPLITS if llama.cpp knows it; None for SentencePiece."""
    parts = list(_parts(stored["pre_tokenizer"], "pretokenizers"))
    if not any(part["type"] == "ByteLevel" for part in parts):
        return None
    found = []
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append(DIGITS)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                found += [GPT2] if use_regex else []
            case _:
                found.append(json.dumps(part))
    return tuple(found)


def _refuse_normalisation(stored: dict[str, Any]) -> None:
    """Raise UsageError for a tokenizer that is none of SentencePiece, or does more to a text than mark its spaces."""
    if not stored["model"]["byte_fallback"]:
        raise _unwritable("it can spell no character in bytes, as SentencePiece does where it has no other token")
    for part in _parts(stored["normalizer"], "normalizers"):
        match part:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                pass
            case {"type": "Prepend", "prepend": "\u2581"}:
                pass
            case _:
                raise _unwritable(f"it changes text by a normaliser ({part['type']}), besides marking spaces")
    for part in _parts(stored["pre_tokenizer"], "pretokenizers"):
        match part:
            case {"type": "Metaspace", "replacement": "\u2581"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}}:
                pass  # where no space is left: the normaliser has replaced them
            case _:
                raise _unwritable(f"it splits text by a step ({part['type']}) that SentencePiece lacks")


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, byte_level: bool) -> tuple[list[str], list[TokenType]]:
    """The tokens and what they are, one for each row of the embedding; those that the tokenizer lacks are unused."""
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [TokenType.UNUSED] * rows
    vocabulary = tokenizer.get_vocab()
    if (last := max(vocabulary.values())) >= rows:
        raise UsageError(
            f"--gguf: the tokenizer has a token of id {last}, but the model's embedding {rows} rows; "
            "resize the embedding to the tokenizer first"
        )
    added = tokenizer.added_tokens_decoder
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, TokenType.NORMAL
        if not byte_level and BYTE.fullmatch(token):
            types[index] = TokenType.BYTE
        if index in added:
            types[index] = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        if not byte_level and token == tokenizer.unk_token:
            types[index] = TokenType.UNKNOWN
        if not byte_level and types[index] == TokenType.USER_DEFINED:
            tokens[index] = token.replace(SEPARATOR, " ")  # they are looked for in the text as it comes
    return tokens, types


def _scores(vocabulary: dict[str, int], merges: list[list[str]], rows: int) -> list[float]:
    """The higher, the earlier a token is merged; by the first of the merges that make it."""
    scores = [NEVER_MERGED] * rows
    for rank, pair in reversed(list(enumerate(merges))):
        scores[vocabulary["".join(pair)]] = -float(rank)
    return scores


def _special_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    if ids["eos"] is None:  # the model's own; it may have several
        ends = config.eos_token_id
        ids["eos"] = ends[0] if isinstance(ends, list) else ends
    return {name: index for name, index in ids.items() if index is not None}


def _flags(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """What the tokenizer does to a letter."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    return {
        "bos_token": whole[0] == tokenizer.bos_token_id,
        "eos_token": whole[-1] == tokenizer.eos_token_id,
        "space_prefix": tokenizer.convert_ids_to_tokens(bare)[0].startswith(SEPARATOR),
    }
