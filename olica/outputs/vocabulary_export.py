"""Write a checkpoint, dense or pruned, with fewer tokens: their rows of embedding and head, and a tokenizer of them.

V entries in the vocabulary, D hidden size
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import UsageError
from ..model.skeleton import count_parameters, without_weights
from ..sources.configuration import describe_source, read_config, refuse_quantised
from ..sources.dense_model import DenseModel
from ..sources.licence import licence_of
from ..sources.locate import locate
from ..sources.model_files import folder_weight_bytes
from ..sources.opening import open_dense_model
from ..sources.tokenizers import read_tokenizer
from ..sources.vocabulary import count_tokens, thin_vocabulary
from .model_card import write_card, write_vocabulary_card
from .records import (
    PRUNING_RECORD,
    VOCABULARY_RECORD,
    environment,
    read_pruning_record,
    understood,
    write_record,
)
from .rewritten import Made, check_path, write_anew

Settings = TypeVar("Settings", PreTrainedConfig, GenerationConfig)

# Of what may generate: settings that name tokens, of which those that are gone are left out. All settings of one token,
# or of several that end a text, end in TOKEN_ID.
TOKEN_ID = "token_id"
LISTS_OF_TOKENS = ("suppress_tokens", "begin_suppress_tokens")
# Settings that name tokens in forms of their own.
NOT_RENUMBERED = ("bad_words_ids", "sequence_bias", "forced_decoder_ids")


@dataclass(frozen=True)
class WantedTokens:
    """Which tokens are to stay.

    Attributes:
        size: how many.
        datasets: texts, joined by +, as `olica.prune` takes them: the tokens that they have most.
        data_dir: where texts are looked for first.
    """

    size: int
    datasets: str
    data_dir: Path | None


def export_with_vocabulary(
    checkpoint: str | Path,
    path: str | Path,
    wanted: WantedTokens,
    largest: int,
    overwrite: bool = False,
) -> dict:
    """Write a checkpoint with so many of its tokens: those that texts have most, and what these are made of.

    Args:
        checkpoint: its folder, name, hub id or .gguf file.
        path: the folder of the new one.
        wanted: which tokens are to stay.
        largest: bytes of weights that a file has at most, unless a single one has more.
        overwrite: whether a checkpoint that is there may be replaced.

    Returns:
        What was done, as `olica_vocabulary.json` in the folder has it.

    Raises:
        UsageError: the tokenizer is of no kind that can lose tokens, or needs more; unreadable files; no room.
    """
    location, path = locate(str(checkpoint), "CHECKPOINT"), Path(path).expanduser()
    check_path(path, location, overwrite)
    config = read_config(location)
    refuse_quantised(config, location)
    if not 0 < wanted.size < config.vocab_size:
        raise UsageError(
            f"--vocab_size {wanted.size}: the model has {config.vocab_size} tokens; give fewer, and at least 1"
        )
    tokenizer = read_tokenizer(location)
    if tokenizer is None:
        raise location.error("the folder has no tokenizer, whose tokens --vocab_size would take")
    source = open_dense_model(location)
    counted = count_tokens(wanted.datasets, tokenizer, wanted.data_dir)
    tokens, generation = sum(counted.counts.values()), source.model.generation_config
    needed = {index for one in (config, generation) for index in _ids_in(one) if 0 <= index < config.vocab_size}
    # A tokenizer may have tokens behind those of the model, such as one for padding; they stay behind its rows.
    without_rows = sum(index >= config.vocab_size for index in tokenizer.get_vocab().values())
    thinned = thin_vocabulary(tokenizer, counted.counts, wanted.size + without_rows, needed)
    rows = [row for row in thinned.rows if row < config.vocab_size]
    with location.in_words("its tokens cannot be numbered anew"):
        smaller, source.model.generation_config = _renumbered(source.model.config, rows), _renumbered(generation, rows)
    smaller.vocab_size = len(rows)
    target = without_weights(lambda: type(source.model)(smaller))
    before, after = count_parameters(source.model)["total"], count_parameters(target)["total"]
    record = {
        "kind": "vocabulary",
        "model": describe_source(location, config) | {"licence": licence_of(location)},
        "tokens": {"before": config.vocab_size, "after": len(rows)},
        "parameters": {"before": before, "after": after},
        "texts": counted.sources,
        "share_of_text_gone": 1 - sum(counted.counts[row] for row in rows) / tokens if tokens else 0.0,
        "environment": environment(torch.device("cpu")),
    }

    def add_records(folder: Path) -> None:
        write_record(folder / VOCABULARY_RECORD, record)
        pruned = read_pruning_record(location.path)
        if not pruned:
            write_vocabulary_card(folder, record)
            return
        with understood(location.path):
            pruned["parameters"]["after"] -= before - after
            pruned["measured_sparsity"] = 1 - pruned["parameters"]["after"] / pruned["parameters"]["before"]
            pruned |= {"tokens": record["tokens"], "weight_bytes_on_disk": folder_weight_bytes(folder)}
            write_record(folder / PRUNING_RECORD, pruned)
            write_card(folder, pruned)

    made = Made(target, thinned.tokenizer, _weights(source, target, rows), add_records)
    write_anew(path, location, source, made, largest)
    return record


def _weights(source: DenseModel, target: PreTrainedModel, rows: list[int]) -> Iterator[Tensor]:
    """The weights of `target`, in the order of its parameters: those of `source`, of matrices (V, D) the rows alone."""
    own = dict(source.model.named_parameters())
    kept = torch.tensor(rows)
    for name, parameter in target.named_parameters():
        weight = source.read([name])[name]
        yield weight if own[name].shape == parameter.shape else weight[kept]


def _ids_in(settings: PreTrainedConfig | GenerationConfig) -> Iterator[int]:
    """The ids of single tokens, and of those that end a text, that settings name."""
    for name, value in settings.to_dict().items():
        if name.endswith(TOKEN_ID):
            yield from [value] if isinstance(value, int) else value or []


def _renumbered(settings: Settings, rows: list[int]) -> Settings:
    """Settings with the new ids of the tokens that they name.

    Raises:
        ValueError: they name tokens in a form that is not known here.
    """
    new_ids = {old: new for new, old in enumerate(rows)}
    settings = copy.deepcopy(settings)
    for name, value in settings.to_dict().items():
        if name in NOT_RENUMBERED and value:
            raise ValueError(f"its settings have {name}; remove it")
        if not (name.endswith(TOKEN_ID) or name in LISTS_OF_TOKENS) or value is None:
            continue
        if isinstance(value, int):
            setattr(settings, name, new_ids.get(value, value))  # one that is no row means that there is none
        else:
            setattr(settings, name, [new_ids[old] for old in value if old in new_ids])
    return settings
