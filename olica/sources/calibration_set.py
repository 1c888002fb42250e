"""The calibration set: token windows drawn from text sources, cached, or repeated from a token file.

Dimensions: N samples, T tokens a sample (`seqlen`).
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import refuse_pointers
from ..errors import UsageError
from ..tensor_files import save_tensors
from .chats import RefusedChat, chat_template, chat_text, messages_of
from .diverse import most_diverse
from .text_sources import Rows, read_rows
from .tokenizers import start_token

logger = logging.getLogger(__name__)

# Part of the cache key: raise it whenever the same request would draw other tokens.
SAMPLING_VERSION = 2
# Ends the search in BookCorpus-like sources, where nearly all of 74 million one-sentence rows are too short.
MAX_TRIED_ROWS = 2_000_000

_IDS = "calibration_ids"
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows `ids` (N, T), int64 on the CPU, and for the record where they come from.

    `sources` has one JSON-able dict a source, in the order of the windows: name, origin, fingerprint, counts
    rows, tried and accepted, acceptance_rate; tried and rate are None for a token file of unknown making.
    `token_hash` is `hash_tokens(ids)`. `tokenizer` is `describe_tokenizer` of the one that was used, or None
    where a token file does not say.
    """

    ids: torch.Tensor
    sources: list[dict]
    token_hash: str
    tokenizer: dict | None


@dataclass(frozen=True)
class Draw:
    """What decides the draw from each source.

    Attributes:
        num_samples: windows.
        seqlen: T, tokens in each.
        seed: of the generator.
        add_bos_token: whether every window begins with the start token, which Gemma wants, and holds one token of text
            less; else a tokenizer that puts one in front of a text does so in windows from its beginning alone.
        candidates: how many times as many windows are drawn of every source, of which those stay that together have
            the most different tokens; 1: all stay. Of a source with fewer rows there are fewer.
    """

    num_samples: int = 128
    seqlen: int = 128
    seed: int = 0
    add_bos_token: bool = False
    candidates: int = 1


def build_calibration_set(
    datasets: str,
    tokenizer: PreTrainedTokenizerBase | None,
    draw: Draw,
    data_dir: Path | None,
    cache_dir: Path,
    vocab_size: int,
) -> CalibrationSet:
    """Make the `draw` from each source of `datasets`, which "+" joins.

    A source is a name of `text_sources.SOURCES` or a path. A token file (.safetensors with `calibration_ids`
    (N, T)) is repeated as it is: it needs no tokenizer, and the draw is not asked for.

    Raises UsageError, naming the flag or file, for wrong values, for sources that cannot be read or have too
    few rows of at least `seqlen` tokens, for a start token that is to be added where there is none, for chats where the
    tokenizer has no chat template, and for token ids outside a vocabulary of `vocab_size`.
    """
    names = split_sources(datasets)
    if _names_token_file(names[0]):
        found = read_token_file(Path(names[0]))
    else:
        _check_numbers(draw.num_samples, draw.seqlen)
        if tokenizer is None:
            raise UsageError(
                f"--datasets {datasets} is text, but --base_model has no tokenizer to read it with: "
                "add one, or give a token file (.safetensors with calibration_ids)"
            )
        sources = [read_rows(name, "train", data_dir) for name in names]
        found = _draw_or_reuse(sources, tokenizer, draw, cache_dir)
    lowest, highest = int(found.ids.min()), int(found.ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise UsageError(
            f"--datasets {datasets} gives token ids from {lowest} to {highest}, but the model's vocabulary "
            f"ends at {vocab_size - 1}: use the tokenizer of --base_model, or a token file made with it"
        )
    return found


def held_back(longer: CalibrationSet, drawn: CalibrationSet, candidates: int = 1) -> torch.Tensor:
    """Windows (M, T) of a longer draw that the calibration set `drawn` (N, T) has nothing of.

    The longer draw differs from the other in the number of samples alone, and so begins, of every source, with the
    same ones, or with the `candidates` times as many that they were chosen of: what follows comes from other rows. A
    row that the source has twice may give a window twice; those that the calibration set has too are left out.
    """
    sources, (_, tokens) = len(drawn.sources), drawn.ids.shape
    further = longer.ids.view(sources, -1, tokens)[:, candidates * len(drawn.ids) // sources :].reshape(-1, tokens)
    return without(further, drawn.ids)


def without(ids: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The windows (M, T) of `ids` that are none of `others` (N, U)."""
    known = set(map(tuple, others.tolist()))
    return ids[[tuple(window) not in known for window in ids.tolist()]]


def is_token_file(datasets: str) -> bool:
    """Whether `--datasets` names a token file rather than text."""
    return _names_token_file(split_sources(datasets)[0])


def calibration_shape(datasets: str, num_samples: int, seqlen: int) -> tuple[int, int]:
    """The (N, T) that `build_calibration_set` will give, without reading any text.

    Raises UsageError for wrong numbers where they count, that is without a token file, or an unreadable one.
    """
    names = split_sources(datasets)
    if _names_token_file(names[0]):
        return tuple(read_token_file(Path(names[0])).ids.shape)
    _check_numbers(num_samples, seqlen)
    return num_samples * len(names), seqlen


def format_prompt(row: dict) -> str:
    """The Alpaca template filled with a row's instruction and, where there is one, input; then its output."""
    template = _PROMPT_WITH_INPUT if row.get("input") else _PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input"), output=row["output"] or "")


def hash_tokens(ids: torch.Tensor) -> str:
    """The sha256 (hex) of the shape of `ids` (N, T) and of its values, all as little-endian int64."""
    shape = np.array(ids.shape, dtype="<i8")
    return hashlib.sha256(shape.tobytes() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Class name, vocabulary size and a sha256 of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = {"vocabulary": tokenizer.get_vocab(), "empty_text": list(tokenizer("")["input_ids"])}
    else:
        # A call overwrites truncation and padding, which this module never asks for.
        rules = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return {"class": type(tokenizer).__name__, "vocabulary_size": len(tokenizer), "vocabulary_sha256": digest}


def read_token_file(path: Path) -> CalibrationSet:
    """The windows of a safetensors file with an integer tensor `calibration_ids` (N, T), and their record.

    Raises UsageError, naming the file, where it is missing, unreadable, damaged or holds something else.
    """
    if not path.is_file():
        raise UsageError(f"--datasets names {path}, which does not exist: give an existing token file")
    refuse_pointers([path])
    try:
        with safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            stored = file.get_tensor(_IDS) if _IDS in names else None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} cannot be read as safetensors ({error}): give a complete file") from error
    if stored is None:
        raise UsageError(f"{path} has the tensors {', '.join(names)}, but a token file needs {_IDS}")
    is_integer = not (stored.is_floating_point() or stored.is_complex() or stored.dtype == torch.bool)
    if stored.ndim != 2 or not is_integer or stored.shape[0] < 1 or stored.shape[1] < 2:
        raise UsageError(
            f"{path} has {_IDS} of shape {tuple(stored.shape)} and type {stored.dtype}: "
            "it must be integers (samples, tokens), at least (1, 2)"
        )
    return _with_record(path, stored.long(), metadata)


def _with_record(path: Path, ids: torch.Tensor, metadata: dict[str, str]) -> CalibrationSet:
    """The windows with the record that `_write_tokens` left in the metadata, if they were written by it."""
    token_hash = hash_tokens(ids)
    if "token_hash" not in metadata:
        counts = {"rows": len(ids), "tried": None, "accepted": len(ids), "acceptance_rate": None}
        source = {"name": path.name, "origin": str(path), "fingerprint": token_hash, **counts}
        return CalibrationSet(ids, [source], token_hash, None)
    try:
        sources, tokenizer = json.loads(metadata["sources"]), json.loads(metadata["tokenizer"])
    except (KeyError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} has a damaged record of its sources: delete it and draw again") from error
    if metadata["token_hash"] != token_hash:
        raise UsageError(f"{path} holds other tokens than it was written with: delete it and draw again")
    return CalibrationSet(ids, sources, token_hash, tokenizer)


def _check_numbers(num_samples: int, seqlen: int) -> None:
    if num_samples < 1:
        raise UsageError(f"--num_samples is {num_samples}: give 1 or more")
    if seqlen < 2:
        raise UsageError(f"--seqlen is {seqlen}: give 2 or more")


def _names_token_file(name: str) -> bool:
    return name.endswith(".safetensors")


def split_sources(datasets: str) -> list[str]:
    """The sources between the plus signs, unless the whole is an existing path."""
    names = [os.path.expanduser(name.strip()) for name in datasets.split("+")]
    if not all(names):
        raise UsageError(f"--datasets {datasets!r} has an empty source: join names or paths with one +")
    whole = os.path.expanduser(datasets.strip())
    if len(names) == 1 or Path(whole).exists():
        return [whole]
    for name in names:
        if _names_token_file(name):
            raise UsageError(f"--datasets {datasets} mixes the token file {name} with others: give it alone")
        if names.count(name) > 1:
            raise UsageError(f"--datasets {datasets} has {name} twice, with the same rows: name it once")
    return names


def _draw_or_reuse(
    sources: Sequence[Rows], tokenizer: PreTrainedTokenizerBase, request: Draw, cache_dir: Path
) -> CalibrationSet:
    """The cached draw of the same request, or else a new one, which is then cached."""
    for rows in sources:
        refuse_chats_without_template(rows, tokenizer)
    described = describe_tokenizer(tokenizer)
    path = cache_dir / f"{_cache_key(sources, tokenizer, described, request)}.safetensors"
    shape = (request.num_samples * len(sources), request.seqlen)
    if path.is_file():
        try:
            cached = read_token_file(path)
        except UsageError as error:
            logger.warning("the cached calibration set is drawn anew: %s", error)
        else:
            if cached.ids.shape == shape:
                logger.info("calibration set read from %s", path)
                return cached
            logger.warning("the cached calibration set is drawn anew: %s has another shape", path)
    draws = [_draw_windows(rows, tokenizer, request) for rows in sources]
    ids = torch.tensor([window for windows, _ in draws for window in windows])  # (N, T)
    drawn = CalibrationSet(ids, [record for _, record in draws], hash_tokens(ids), described)
    _write_tokens(drawn, path)
    return drawn


def _draw_windows(rows: Rows, tokenizer: PreTrainedTokenizerBase, request: Draw) -> tuple[list[list[int]], dict]:
    """Windows of `seqlen` tokens from distinct random rows that are long enough, and the source's record.

    Prose is cropped at random, prompts and chats keep their beginning. As in the released code every source starts from
    the same seed, and a row that was drawn before costs one draw of the generator and nothing else.
    """
    rng = random.Random(request.seed)
    start = [start_token(tokenizer)] if request.add_bos_token else []
    of_text = request.seqlen - len(start)
    limit = min(len(rows.table), MAX_TRIED_ROWS)
    tried, windows, refused = set(), [], []
    wanted = request.num_samples * request.candidates
    with tqdm(total=wanted, desc=Path(rows.name).name, unit="sample", leave=False) as bar:
        while len(windows) < wanted:
            if len(tried) == limit:
                if len(windows) >= request.num_samples:
                    break  # of fewer candidates
                raise _too_few(rows, request, len(windows), limit, refused)
            index = rng.randint(0, len(rows.table) - 1)
            if index in tried:
                continue
            tried.add(index)
            try:
                tokens, is_whole = _row_tokens(rows, index, tokenizer, start)
            except RefusedChat as error:
                refused.append(str(error))
                continue
            if len(tokens) < of_text:
                continue
            first = 0 if is_whole else rng.randint(0, len(tokens) - of_text)
            windows.append(start + tokens[first : first + of_text])
            bar.update()
    logger.info("%s: %d of %d tried rows accepted", rows.name, len(windows), len(tried))
    if refused:
        logger.warning("%s: left out %s", rows.name, refused_in_words(refused))
    counts = {"rows": len(rows.table), "tried": len(tried), "accepted": len(windows)}
    record = {"name": rows.name, "origin": rows.origin, "fingerprint": rows.fingerprint, **counts}
    record["acceptance_rate"] = len(windows) / len(tried)
    if request.candidates == 1:
        return windows, record
    return [windows[index] for index in most_diverse(windows, request.num_samples)], record


def row_text(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool, bool]:
    """The text of a row, empty where it has none; whether it is a chat, and whether it is a prompt.

    Raises RefusedChat where the chat template refuses a chat, UsageError where its messages are none.
    """
    row = rows.table[index]
    if rows.chat_field and row[rows.chat_field]:
        messages = messages_of(row[rows.chat_field], f"{rows.origin}: row {index + 1}")
        return chat_text(tokenizer, messages), True, False
    is_prompt = rows.has_prompts and bool(row["instruction"])
    text = format_prompt(row) if is_prompt else (row[rows.text_field] if rows.text_field else None) or ""
    return text, False, is_prompt


def _row_tokens(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase, start: list[int]) -> tuple[list[int], bool]:
    """The tokens of a row, none where it has no text, and whether they are to be read from their beginning.

    `start` has the start token if one is put in front of every window, and is empty otherwise.
    Raises as `row_text`.
    """
    text, is_chat, is_prompt = row_text(rows, index, tokenizer)
    # Templates write all special tokens themselves; the tokenizer would put a second start token before theirs.
    tokens = tokenizer(text, verbose=False, add_special_tokens=not (start or is_chat))["input_ids"]
    if is_chat and start and tokens[:1] == start:
        tokens = tokens[1:]
    return tokens, is_chat or is_prompt


def refuse_chats_without_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError if rows are chats, and the tokenizer cannot make texts of them."""
    if rows.chat_field and chat_template(tokenizer) is None:
        raise UsageError(
            f"{rows.origin} holds chats (column {rows.chat_field}), but the tokenizer of the model has no chat "
            "template: put its chat_template.jinja beside it, take the model that is trained for chats, or give "
            "the file a column text instead"
        )


def refused_in_words(refused: list[str]) -> str:
    """How many chats the template refused, and why the first of them."""
    return f"{len(refused)} chats that the tokenizer's chat template refuses (the first: {refused[0]})"


def _too_few(rows: Rows, request: Draw, accepted: int, tried: int, refused: list[str]) -> UsageError:
    others = f"; among the others are {refused_in_words(refused)}" if refused else ""
    return UsageError(
        f"--datasets {rows.name} has too few long rows: {accepted} of {tried} tried ({accepted / tried:.2%}) "
        f"have --seqlen {request.seqlen} tokens or more, but --num_samples asks for {request.num_samples}{others}: "
        "lower one of the two, or give a source with longer rows"
    )


def _cache_key(sources: Sequence[Rows], tokenizer: PreTrainedTokenizerBase, described: dict, request: Draw) -> str:
    """The sha256 of everything that decides the draw; `described` is what `describe_tokenizer` says of `tokenizer`."""
    of_chats = {"chat_template": chat_template(tokenizer)} if any(rows.chat_field for rows in sources) else {}
    decides = {
        "version": SAMPLING_VERSION,
        "sources": [[rows.name, rows.origin, rows.fingerprint] for rows in sources],
        "tokenizer": described,
        **asdict(request),
        **of_chats,
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _write_tokens(drawn: CalibrationSet, path: Path) -> None:
    """Write the cache file whole or not at all; the run does not need it, so a failure is only a warning."""
    metadata = {
        "sources": json.dumps(drawn.sources),
        "tokenizer": json.dumps(drawn.tokenizer),
        "token_hash": drawn.token_hash,
    }
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({_IDS: drawn.ids}, unfinished, metadata)
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        if unfinished.exists():
            unfinished.unlink()
        logger.warning("the calibration set could not be cached in %s: %s", path.parent, error)
