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
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..model.skeleton import count_parameters, without_weights
from ..sources.configuration import describe_source, read_config, refuse_quantised
from ..sources.dense_model import DenseModel
from ..sources.licence import licence_of
from ..sources.locate import Location, locate
from ..sources.model_files import folder_weight_bytes
from ..sources.opening import open_dense_model
from ..sources.thinned_vocabulary import (
    ThinnedVocabulary,
    TokenCounts,
    check_can_lose_tokens,
    count_tokens,
    thin_vocabulary,
)
from ..sources.tokenizers import read_tokenizer
from .model_card import write_card, write_vocabulary_card
from .records import (
    PRUNING_RECORD,
    VOCABULARY_RECORD,
    environment,
    read_pruning_record,
    read_vocabulary_record,
    understood,
    write_record,
)
from .rewritten import Made, check_path, write_anew

Settings = TypeVar("Settings", PreTrainedConfig, GenerationConfig)

# Settings whose names end so are the id of a token, or of several.
TOKEN_ID = "token_id"
# Settings that are lists of ids, of which those of tokens that are gone are left out.
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
    config, pruned = read_config(location), read_pruning_record(location.path)
    refuse_quantised(config, location)
    if not 0 < wanted.size < config.vocab_size:
        raise UsageError(
            f"--vocab_size {wanted.size}: the model has {config.vocab_size} tokens; give fewer, and at least 1"
        )
    tokenizer = read_tokenizer(location)
    if tokenizer is None:
        raise location.error("the folder has no tokenizer, whose tokens --vocab_size would take")
    source = open_dense_model(location)
    counted, thinned = _chosen(location, source, tokenizer, wanted)
    rows = [row for row in thinned.rows if row < config.vocab_size]
    smaller = renumbered(source.model.config, thinned.rows)
    smaller.vocab_size = len(rows)
    # Which is written beside the weights.
    source.model.generation_config = renumbered(source.model.generation_config, thinned.rows)
    target = without_weights(lambda: type(source.model)(smaller))
    before, after = count_parameters(source.model)["total"], count_parameters(target)["total"]
    tokens, earlier = counted.counts.total(), read_vocabulary_record(location.path)
    record = {
        "kind": "vocabulary",
        "model": describe_source(location, config) | {"licence": licence_of(location)},
        "tokens": {"before": config.vocab_size, "after": len(rows)},
        "parameters": {"before": before, "after": after},
        "texts": counted.sources,
        "share_of_text_gone": 1 - sum(counted.counts[row] for row in thinned.rows) / tokens,
        **({"earlier": earlier} if earlier else {}),
        "environment": environment(torch.device("cpu")),
    }

    def add_records(folder: Path) -> None:
        write_record(folder / VOCABULARY_RECORD, record)
        if not pruned:
            write_vocabulary_card(folder, record)
            return
        with understood(location.path):
            pruned["parameters"]["after"] -= before - after
            pruned["measured_sparsity"] = 1 - pruned["parameters"]["after"] / pruned["parameters"]["before"]
            pruned["weight_bytes_on_disk"] = folder_weight_bytes(folder)
            write_record(folder / PRUNING_RECORD, pruned)
            write_card(folder, pruned)

    made = Made(target, thinned.tokenizer, _weights(source, target, rows), add_records)
    write_anew(path, location, source, made, largest)
    return record


def _chosen(
    location: Location, source: DenseModel, tokenizer: PreTrainedTokenizerBase, wanted: WantedTokens
) -> tuple[TokenCounts, ThinnedVocabulary]:
    """What texts have of a model's tokens, and the tokenizer with those that stay.

    A tokenizer may have tokens behind those of the model, such as one for padding; they stay behind its rows, and are
    none of the `wanted` ones.

    Raises:
        UsageError: as `export_with_vocabulary`; all but faults of the texts before these are read.
    """
    size, settings = source.config.vocab_size, (source.config, source.model.generation_config)
    behind = sum(index >= size for index in tokenizer.get_vocab().values())
    with location.in_words("its settings name tokens in a way that is not known"):
        needed = {index for one in settings for index in ids_in(one) if 0 <= index < size}
    check_can_lose_tokens(tokenizer, wanted.size, needed, behind)
    counted = count_tokens(wanted.datasets, tokenizer, wanted.data_dir)
    with location.in_words("its tokenizer cannot be made smaller"):
        return counted, thin_vocabulary(tokenizer, counted.counts, wanted.size + behind, needed)


def _weights(source: DenseModel, target: PreTrainedModel, rows: list[int]) -> Iterator[Tensor]:
    """The weights of `target`, in the order of its parameters: those of `source`, or their `rows` where it has V."""
    own = dict(source.model.named_parameters())
    kept = torch.tensor(rows)
    for name, parameter in target.named_parameters():
        weight = source.read([name])[name]
        yield weight if own[name].shape == parameter.shape else weight[kept]


def ids_in(settings: PreTrainedConfig | GenerationConfig) -> list[int]:
    """The ids of tokens that settings name one by one.

    Raises:
        ValueError: they name tokens in a form that is not known here.
    """
    found = []
    for name, value in settings.to_dict().items():
        if name in NOT_RENUMBERED and value:
            raise ValueError(f"they have {name}; remove it")
        if name.endswith(TOKEN_ID) and value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(index) is int for index in ids):
                raise ValueError(f"{name} is {value!r}; make it a whole number, or a list of some")
            found += ids
    return found


def renumbered(settings: Settings, rows: list[int]) -> Settings:
    """Settings with the new ids of the tokens that they name; ids that are none of the old `rows` stay as they are.

    (Such an id, -1 say, stands for no token.) From lists of tokens that are not to be generated, those are left out
    that are gone.
    """
    new_ids = {old: new for new, old in enumerate(rows)}
    settings = copy.deepcopy(settings)
    for name, value in settings.to_dict().items():
        if name in LISTS_OF_TOKENS and value:
            setattr(settings, name, [new_ids[old] for old in value if old in new_ids])
        elif name.endswith(TOKEN_ID) and value is not None:
            several = isinstance(value, list)
            ids = [new_ids.get(old, old) for old in (value if several else [value])]
            setattr(settings, name, ids if several else ids[0])
    return settings
