"""A vocabulary with fewer tokens: without those that a text has least, and every text can still be written.

A tokenizer of byte pairs begins with bytes or characters and joins tokens by its merges, each of two into a third. A
token that no merge reads is a leaf, and can go with the merges that make it: text that had it has the two tokens
instead that it was made of. The rarest leaf goes first, and what it was made of may become a leaf by that (Purason et
al. 2025, "Teaching old tokenizers new words", prune so).

    V entries in the vocabulary
"""

import heapq
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE

from ..errors import UsageError
from ..progress_bar import is_quiet
from .calibration_set import (
    is_token_file,
    refuse_chats_without_template,
    refused_in_words,
    row_text,
    split_sources,
)
from .chats import RefusedChat
from .text_sources import read_rows
from .tokenizers import BYTE, GENERIC_TOKENIZER, SEPARATOR, TOKENIZER_PROBES, tokens_of_probes

logger = logging.getLogger(__name__)

# Of every source so many are counted, from its first row on: enough to rank the tokens that a text has at all.
COUNTED_TOKENS = 10_000_000
# What may put special tokens around a text: those that have no ids, or whose ids can be numbered anew.
POST_PROCESSORS = {"TemplateProcessing", "ByteLevel", "Sequence"}


@dataclass(frozen=True)
class TokenCounts:
    """How often texts have each token, by its id, and for the record what was counted of which source."""

    counts: Counter[int]
    sources: list[dict]


@dataclass(frozen=True)
class ThinnedVocabulary:
    """A tokenizer with fewer tokens.

    Attributes:
        tokenizer: whose ids are the places of the old ones in `rows`.
        rows: the old ids that stay, ascending: the rows of the embedding and of the head that do.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: list[int]


def count_tokens(datasets: str, tokenizer: PreTrainedTokenizerBase, data_dir: Path | None) -> TokenCounts:
    """How often each token is in the first COUNTED_TOKENS of every source of `datasets`, which "+" joins.

    What the tokenizer puts around a text is left out.

    Raises:
        UsageError: a source is a token file, cannot be read, or holds no text.
    """
    if is_token_file(datasets):
        raise UsageError(f"--datasets {datasets}: a token file has too few tokens to choose by; give the texts")
    counts, sources = Counter[int](), []
    for name in split_sources(datasets):
        rows, refused = read_rows(name, "train", data_dir), []
        refuse_chats_without_template(rows, tokenizer)
        counted = read = 0
        with tqdm(total=len(rows.table), desc=Path(name).name, unit="row", leave=False, disable=is_quiet()) as bar:
            while read < len(rows.table) and counted < COUNTED_TOKENS:
                try:
                    text, *_ = row_text(rows, read, tokenizer)
                    tokens = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
                    counts.update(tokens)
                    counted += len(tokens)
                except RefusedChat as error:
                    refused.append(str(error))
                read += 1
                bar.update()
        if refused:
            logger.warning("%s: left out %s", rows.name, refused_in_words(refused))
        if not counted:
            raise UsageError(f"--datasets {datasets}: {rows.origin} has no text whose tokens could be counted")
        source = {"name": rows.name, "origin": rows.origin, "fingerprint": rows.fingerprint}
        read_of = {"rows": len(rows.table), "read": read, "refused": len(refused), "tokens": counted}
        sources.append(source | read_of)
    return TokenCounts(counts, sources)


def check_can_lose_tokens(tokenizer: PreTrainedTokenizerBase, size: int, needed: Iterable[int], behind: int) -> None:
    """Raise UsageError if a tokenizer is not of byte pairs, or needs more than `size` tokens.

    `behind` is how many it has behind the model's rows: they stay, and are not counted.
    """
    rules = _rules_of(tokenizer)
    fewest = len(kept_tokens(rules, {}, 0, needed)) - behind
    if fewest > size:
        raise UsageError(f"--vocab_size {size}: the tokenizer needs {fewest} tokens; give at least that many")


def thin_vocabulary(
    tokenizer: PreTrainedTokenizerBase, counts: Mapping[int, int], size: int, needed: Iterable[int]
) -> ThinnedVocabulary:
    """A tokenizer of `size` tokens, or of as many as it needs, without those that `counts` has least.

    Args:
        tokenizer: of byte pairs.
        counts: how often texts have a token, by its id.
        size: tokens to keep, those that were added to the vocabulary among them.
        needed: ids that stay in any case, besides the added tokens and what texts are made of in the end.

    Raises:
        UsageError: the tokenizer is of another kind.
        ValueError: transformers reads what is left otherwise than its rules say.
    """
    rules = _rules_of(tokenizer)
    rows = kept_tokens(rules, counts, size, needed)
    return ThinnedVocabulary(_with_rules(tokenizer, with_tokens(rules, rows)), rows)


def kept_tokens(rules: dict, counts: Mapping[int, int], size: int, needed: Iterable[int]) -> list[int]:
    """Ids, ascending, of the tokens that stay when the rarest leaves go until `size` are left, or no leaf is.

    `rules` are a tokenizer's, as tokenizer.json has them; the other arguments are those of `thin_vocabulary`.
    """
    ids: dict[str, int] = rules["model"]["vocab"]
    made_of: dict[str, list[list[str]]] = {}  # the first merge that makes a token is the one that a text meets
    readers = Counter[str]()
    for pair in rules["model"]["merges"]:
        made_of.setdefault("".join(pair), []).append(pair)
        readers.update(pair)
    around_texts = _ids_around_texts(rules.get("post_processor"))
    stays = {*needed, *around_texts, *(token["id"] for token in rules["added_tokens"])}
    is_base = _base_of(rules)
    count = {token: counts.get(index, 0) for token, index in ids.items()}

    def entry(token: str) -> tuple[int, int, str]:
        return count[token], -ids[token], token  # of two as rare ones the later goes

    def can_go(token: str) -> bool:
        return not readers[token] and ids[token] not in stays and not is_base(token)

    kept = set(ids.values()) | stays
    leaves = [entry(token) for token in ids if can_go(token)]
    heapq.heapify(leaves)
    while len(kept) > size and leaves:
        times, _, token = heapq.heappop(leaves)
        kept.discard(ids[token])
        pairs = made_of.get(token, [])
        for part in pairs[0] if pairs else []:
            count[part] += times
        for pair in pairs:
            readers.subtract(pair)
        for part in sorted({part for pair in pairs for part in pair}):
            if can_go(part):
                heapq.heappush(leaves, entry(part))
    return sorted(kept)


def with_tokens(rules: dict, rows: list[int]) -> dict:
    """The rules of a tokenizer, as tokenizer.json has them, with the tokens of the old ids `rows` alone."""
    new_ids = {old: new for new, old in enumerate(rows)}
    model = rules["model"]
    vocabulary = {token: new_ids[old] for token, old in model["vocab"].items() if old in new_ids}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocabulary]
    added = [token | {"id": new_ids[token["id"]]} for token in rules["added_tokens"]]
    return rules | {
        "model": model | {"vocab": vocabulary, "merges": merges},
        "added_tokens": added,
        "post_processor": _renumbered(rules.get("post_processor"), new_ids),
        "truncation": None,
        "padding": None,
    }


def _renumbered(part: Any, new_ids: Mapping[int, int]) -> Any:
    """What puts special tokens around a text, with their new ids."""
    if isinstance(part, list):
        return [_renumbered(item, new_ids) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        name: [new_ids[index] for index in value] if name == "ids" else _renumbered(value, new_ids)
        for name, value in part.items()
    }


def _ids_around_texts(part: Any) -> Iterator[int]:
    """The ids of what is put around a text."""
    if isinstance(part, list):
        for item in part:
            yield from _ids_around_texts(item)
    elif isinstance(part, dict):
        for name, value in part.items():
            yield from value if name == "ids" else _ids_around_texts(value)


def _base_of(rules: dict) -> Callable[[str], bool]:
    """What says of a token whether texts are made of it in the end, so that it cannot go.

    That is every character, unless all bytes are tokens that can stand for it; then it is those and the separator,
    which decoders turn into a space before they see bytes.
    """
    vocabulary, unknown = rules["model"]["vocab"], rules["model"].get("unk_token")
    falls_back = rules["model"].get("byte_fallback")
    if falls_back and sum(map(bool, map(BYTE.fullmatch, vocabulary))) == 256:
        return lambda token: token in (unknown, SEPARATOR) or bool(BYTE.fullmatch(token))
    return lambda token: token == unknown or len(token) == 1 or bool(falls_back and BYTE.fullmatch(token))


def _rules_of(tokenizer: PreTrainedTokenizerBase) -> dict:
    """A tokenizer's rules, as tokenizer.json has them; raises UsageError if tokens cannot be taken from such."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    model, post = rules["model"], rules.get("post_processor") or {}
    kinds = [post.get("type"), *(inner["type"] for inner in post.get("processors", []))]
    affixes = [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    strange = [f"its model is {model['type']}"] if model["type"] != "BPE" else [f"it has a {name}" for name in affixes]
    strange += [f"its post-processor is {kind}" for kind in kinds if kind and kind not in POST_PROCESSORS]
    if strange:
        raise UsageError(f"--vocab_size cannot take tokens from this tokenizer: {strange[0]}")
    return rules


def _with_rules(tokenizer: PreTrainedTokenizerBase, rules: dict) -> PreTrainedTokenizerBase:
    """A tokenizer as it is, but for its rules.

    Some classes put rules of their own in the place of those in the file; then the class is one that does not.

    Raises:
        ValueError: neither makes of a text what the rules make of it.
    """
    follows = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
    wanted = [follows.encode(text, add_special_tokens=False).ids for text in TOKENIZER_PROBES]
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, FULL_TOKENIZER_FILE).write_text(json.dumps(rules), encoding="utf-8")
        path = Path(folder, TOKENIZER_CONFIG_FILE)
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # by their old ids; the file has them too
        for changed in ({}, {"tokenizer_class": GENERIC_TOKENIZER}):
            path.write_text(json.dumps(settings | changed), encoding="utf-8")
            with suppress(Exception):  # the libraries share none
                read = AutoTokenizer.from_pretrained(folder)
                if tokens_of_probes(read) == wanted and len(read) == follows.get_vocab_size():
                    return read
    raise ValueError("transformers makes other tokens of a text than the rules that are left do")
