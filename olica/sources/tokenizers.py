"""A model's tokenizer, with what first conversions and files of SentencePiece need to be read as they were meant."""

import json
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import TOKENIZER_MAPPING, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, TokenizersBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import SPECIAL_TOKENS_MAP_FILE

from ..errors import UsageError
from .configuration import read_config
from .locate import Location

# Texts that a wrong conversion from SentencePiece cuts otherwise than SentencePiece. (None starts with a space: there
# every converted tokenizer has one separator, SentencePiece one for itself and one for the space.)
TOKENIZER_PROBES = ("Two words", "two  spaces, one at the end ", "line\n\n\tand tab", "1234 ü ﬁ ½ 文")
GENERIC_TOKENIZER = "PreTrainedTokenizerFast"  # as every release names the class that follows its file alone
# How vocabularies of SentencePiece spell a byte that no other token holds, and a space.
BYTE, SEPARATOR = re.compile(r"<0x[0-9A-F]{2}>"), "\u2581"
# Any of these says that a folder means to have a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What LLaMA's vocabulary calls the tokens that its first conversions left empty.
USUAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def read_tokenizer(location: Location) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None for a local folder that has none.

    Raises:
        UsageError: it cannot be read, or not as SentencePiece itself reads it.
    """
    in_folder = location.is_local and not location.gguf_file
    if in_folder and not any((Path(location.path) / name).is_file() for name in TOKENIZER_FILES):
        return None
    with location.in_words("its tokenizer cannot be read"):
        tokenizer = _read_of_gguf(location) if location.gguf_file else _read_of_folder(location)
        tokens_of_probes(tokenizer)  # some are read that then fail at the first text
        return tokenizer


def tokens_of_probes(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """What a tokenizer makes of TOKENIZER_PROBES: two that differ here are not the same."""
    return tokenizer(list(TOKENIZER_PROBES), add_special_tokens=False)["input_ids"]


def _read_of_gguf(location: Location) -> PreTrainedTokenizerBase:
    """As AutoTokenizer, which would read the configuration anew."""
    kind = TOKENIZER_MAPPING.get(type(read_config(location)), TokenizersBackend)
    return kind.from_pretrained(location.path, **location.arguments)


def _read_of_folder(location: Location) -> PreTrainedTokenizerBase:
    tokens = _in_place_of_empty_tokens(location)
    if location.find("tokenizer.json") or not location.find("tokenizer.model"):
        tokenizer = AutoTokenizer.from_pretrained(location.path, **tokens)
    else:
        tokenizer = _read_sentencepiece(location, tokens)
    for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
        if getattr(tokenizer, name) == "":  # the vocabulary has none for it
            setattr(tokenizer, name, None)
    return tokenizer


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that texts begin with; raises UsageError if the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise UsageError("--add_bos_token: the model's tokenizer has no start token; leave the flag out")
    return tokenizer.bos_token_id


def _in_place_of_empty_tokens(location: Location) -> dict[str, str]:
    """The special tokens that the tokenizer's settings leave empty, by their names there: the vocabulary's own.

    The first conversions of LLaMA left three of them so. transformers knows no such token, and looks for it for ever.
    """
    settings = get_tokenizer_config(location.path)
    if file := location.find(SPECIAL_TOKENS_MAP_FILE):
        settings |= json.loads(Path(file).read_text(encoding="utf-8"))
    named = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in settings.items()
        if name in USUAL_TOKENS
    }
    if "" not in named.values():
        return {}
    return {name: token for name, token in _own_tokens(location).items() if named.get(name) == ""}


def _own_tokens(location: Location) -> dict[str, str]:
    """The start, end and unknown tokens that a tokenizer's vocabulary has."""
    if file := location.find("tokenizer.model"):
        pieces = SentencePieceProcessor(model_file=file)
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
        return {name: pieces.id_to_piece(index) for name, index in ids.items() if index >= 0}
    stored = json.loads(Path(location.find("tokenizer.json")).read_text(encoding="utf-8"))
    added = {token["content"] for token in stored["added_tokens"]}
    return {name: token for name, token in USUAL_TOKENS.items() if token in added}


def _read_sentencepiece(location: Location, tokens: dict[str, str]) -> PreTrainedTokenizerBase:
    """A tokenizer that exists in SentencePiece form only, converted and checked against SentencePiece itself.

    AutoTokenizer converts Gemma's, but drops the separator before the first word of LLaMA's, Mistral's and Phi-3's.
    """
    reference = SentencePieceProcessor(model_file=location.find("tokenizer.model"))
    # Texts of these families begin with a start token, unless the model says otherwise; older releases knew that.
    start = {"add_bos_token": get_tokenizer_config(location.path).get("add_bos_token") is not False}
    for reader in (AutoTokenizer, LlamaTokenizer):
        tokenizer = reader.from_pretrained(location.path, **start, **tokens)
        if tokens_of_probes(tokenizer) == reference.encode(list(TOKENIZER_PROBES)):
            return tokenizer
    raise ValueError("transformers reads its SentencePiece file otherwise than SentencePiece does")
