"""A model that is to be measured, and the protocol: all that can be checked before any weights are read.

W windows, T tokens in each
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UsageError
from ..model.skeleton import try_out, without_weights
from ..sources.calibration_set import hash_tokens
from ..sources.chats import chat_template
from ..sources.configuration import read_config
from ..sources.locate import Location
from ..sources.tokenizers import read_tokenizer, start_token
from .local_rows import local_rows
from .perplexity import token_windows
from .settings import EvaluationSettings

# New tokens of a continuation, and the sequences by which the times of a model are measured: a prompt and what follows.
CONTINUATION_TOKENS = 30
LATENCY = {"sequences": 1, "prompt_tokens": 128, "new_tokens": 32, "repeats": 5}


@dataclass(frozen=True)
class TestText:
    """A text whose perplexity is measured."""

    name: str
    text: str
    origin: str

    @property
    def fingerprint(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def windows(self, tokenizer: PreTrainedTokenizerBase, *cut: Any) -> Tensor:
        """Ids (W, T), by the further arguments of `token_windows`."""
        return token_windows(tokenizer, self.text, *cut)


@dataclass(frozen=True)
class TestWindows:
    """Windows of tokens whose perplexity is measured as they are: no tokenizer cuts them."""

    name: str
    ids: Tensor  # (W, T)
    origin: str

    @property
    def fingerprint(self) -> str:
        """sha256 of the shape and the ids."""
        return hash_tokens(self.ids)

    def windows(self, *_: Any) -> Tensor:
        """The ids (W, T), however texts are cut."""
        return self.ids


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model, and how.

    Attributes:
        asked: the settings. `add_bos_token` goes for windows, tasks and the prompt, `apply_chat_template` for tasks.
        texts: of the perplexity.
        tasks: of lm-eval.
        generated: how many tokens those of them generate that do so, by their names.
        dtype: to run in, a key of `DTYPES` or "auto".
    """

    asked: EvaluationSettings
    texts: list[TestText | TestWindows]
    tasks: list[str]
    generated: dict[str, int]
    dtype: str

    @property
    def data(self) -> dict[str, str]:
        """Digests of the texts and of the local rows, by their names."""
        texts = {text.name: text.fingerprint for text in self.texts}
        return texts | local_rows(self.tasks, self.asked.data_dir)


@dataclass(frozen=True)
class Subject:
    """A model to measure, with all that can be made ready before its weights are read."""

    name: str  # in the record: "dense", "pruned" or "model"
    location: Location
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    windows: dict[str, Tensor]  # (W, T) by the name of the text
    prompt: Tensor | None  # (1, T)


def prepare(name: str, location: Location, protocol: Protocol) -> Subject:
    """Cut the windows and tokenise the prompt, so that no model is measured in vain for another's faults."""
    asked, config, tokenizer = protocol.asked, read_config(location), read_tokenizer(location)
    if tokenizer is None:
        raise UsageError(f"{location.flag} {location.name}: the folder has no tokenizer, which evaluation needs")
    if asked.add_bos_token:
        start_token(tokenizer)
    if asked.apply_chat_template and chat_template(tokenizer) is None:
        raise UsageError(
            f"--apply_chat_template: the tokenizer of {location.name} has no chat template; leave the flag out, or put "
            "the model's chat_template.jinja beside it"
        )
    if protocol.tasks:
        # Without the tokens added to it, such as one for padding, which models often lack and prompts do not have.
        check_vocabulary(tokenizer.vocab_size - 1, config, location)
        if tokenizer.eos_token_id is None and (protocol.generated or tokenizer.bos_token_id is None):
            raise UsageError(
                f"{location.flag} {location.name}: its tokenizer has no end token, which --tasks need; name one as "
                "eos_token in its tokenizer_config.json"
            )
    prompt = prompt_ids(tokenizer, asked.prompt, asked.add_bos_token) if asked.prompt else None
    needed = {f"--ppl_seqlen {asked.ppl_seqlen}": asked.ppl_seqlen} if protocol.texts else {}
    for task, tokens in protocol.generated.items():
        needed[f"--tasks {task}, which generates {tokens} tokens from a prompt"] = tokens + 1
    if asked.cost:
        needed["--cost"] = LATENCY["prompt_tokens"] + LATENCY["new_tokens"]
    if prompt is not None:
        needed["--prompt"] = prompt.shape[1] + CONTINUATION_TOKENS
    check_positions(needed, config, location)
    with location.in_words("its configuration describes no model that can be run"):
        try_out(without_weights(lambda: AutoModelForCausalLM.from_config(config)))
    cut = (asked.ppl_seqlen, asked.ppl_windows, asked.add_bos_token)
    windows = {text.name: text.windows(tokenizer, *cut) for text in protocol.texts}
    for ids in [*windows.values(), *([] if prompt is None else [prompt])]:
        check_vocabulary(ids.max().item(), config, location)
    return Subject(name, location, config, tokenizer, windows, prompt)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, add_bos_token: bool) -> Tensor:
    """Ids (1, T) of a text to continue: its own tokens and, with `add_bos_token`, the start token before them.

    What the tokenizer adds by itself is left out: an end token would say that the text is over, and whether a prompt
    begins with a start token is said by the flag alone, for this prompt as for those of tasks.
    Raises UsageError if the prompt is no text, or the tokenizer makes no token of it or has no start token.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("--prompt is not in the encoding of the system; give it in UTF-8") from error
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UsageError(f"--prompt {prompt!r}: the model's tokenizer makes no token of it; give a longer text")
    return torch.tensor([[start_token(tokenizer), *ids] if add_bos_token else ids])


def check_positions(needed: dict[str, int], config: PreTrainedConfig, location: Location) -> None:
    """Raise UsageError if the model has fewer positions than the tokens `needed` by one of the flags."""
    positions = config.max_position_embeddings
    for flag, tokens in needed.items():
        if tokens > positions:
            raise UsageError(f"{flag}: {tokens} tokens do not fit in the {positions} positions of {location.name}")


def check_vocabulary(token: int, config: PreTrainedConfig, location: Location) -> None:
    """Raise UsageError if the tokenizer's largest token is none that the model knows."""
    if token >= config.vocab_size:
        raise UsageError(
            f"{location.flag} {location.name}: its tokenizer gives the token {token}, but the model's vocabulary "
            f"ends at {config.vocab_size - 1}; put the model's own tokenizer beside it"
        )
