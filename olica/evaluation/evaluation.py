"""One evaluation: what is measured of a model and how, each finished measure kept on disk until all are there.

W windows, T tokens in each
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..machine import peak_memory, reset_peak_memory
from ..model.skeleton import count_parameters
from ..outputs.records import Stages, write_record
from ..processes import Processes
from ..sources.configuration import describe_source, read_config
from ..sources.locate import Location
from ..sources.tokenizers import read_tokenizer
from ..sources.weights import read_model
from . import cost
from .perplexity import perplexity, start_token, token_windows
from .zero_shot import SOFTMAX_DTYPE, TaskProtocol, averages, harness_version, local_rows, zero_shot

logger = logging.getLogger(__name__)

# New tokens of a continuation, and the sequences by which a model's cost is measured: LLM-Pruner's 64 tokens for the
# products (the paper's 424 G of LLaMA-7B are those), one prompt and its continuation for the times.
CONTINUATION_TOKENS = 30
MACS_TOKENS = 64
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


@dataclass(frozen=True)
class Protocol:
    """What is measured of every model, and how.

    Attributes:
        texts: of the perplexity.
        seqlen: tokens of a window.
        windows: how many windows count, from the first on; None: all.
        tasks: of lm-eval.
        generated: how many tokens those of them generate that do so, by their names.
        of_tasks: how they are scored; its `add_bos_token` goes for the windows too.
        prompt: a text to continue, or None.
        cost: whether times and peak memory are measured.
        dtype: to run in, a key of `DTYPES` or "auto".
        device_map: "auto" spreads a model over all GPUs and the host; None: the device of the stages.
        batch_size: windows or prompts that go through the model at a time.
    """

    texts: list[TestText]
    seqlen: int
    windows: int | None
    tasks: list[str]
    generated: dict[str, int]
    of_tasks: TaskProtocol
    prompt: str | None
    cost: bool
    dtype: str
    device_map: str | None
    batch_size: int

    @property
    def data(self) -> dict[str, str]:
        """Digests of the texts and of the local rows, by their names."""
        texts = {text.name: text.fingerprint for text in self.texts}
        return texts | local_rows(self.tasks, self.of_tasks.data_dir)


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
    config = read_config(location)
    tokenizer = read_tokenizer(location)
    if tokenizer is None:
        raise UsageError(f"{location.flag} {location.name}: the folder has no tokenizer, which evaluation needs")
    if protocol.of_tasks.add_bos_token:
        start_token(tokenizer)
    if protocol.tasks:
        # Without the tokens added to it, such as one for padding, which models often lack and prompts do not have.
        check_vocabulary(tokenizer.vocab_size - 1, config, location)
        if tokenizer.eos_token_id is None and (protocol.generated or tokenizer.bos_token_id is None):
            raise UsageError(
                f"{location.flag} {location.name}: its tokenizer has no end token, which --tasks need; name one as "
                "eos_token in its tokenizer_config.json"
            )
    prompt = prompt_ids(tokenizer, protocol.prompt, protocol.of_tasks.add_bos_token) if protocol.prompt else None
    needed = {f"--ppl_seqlen {protocol.seqlen}": protocol.seqlen} if protocol.texts else {}
    for task, tokens in protocol.generated.items():
        needed[f"--tasks {task}, which generates {tokens} tokens from a prompt"] = tokens + 1
    if protocol.cost:
        needed["--cost"] = LATENCY["prompt_tokens"] + LATENCY["new_tokens"]
    if prompt is not None:
        needed["--prompt"] = prompt.shape[1] + CONTINUATION_TOKENS
    check_positions(needed, config, location)
    cut = (protocol.seqlen, protocol.windows, protocol.of_tasks.add_bos_token)
    windows = {text.name: token_windows(tokenizer, text.text, *cut) for text in protocol.texts}
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


class Measures:
    """Finished measures of an evaluation, on disk as soon as each is there, so that a stopped one can go on.

    Attributes:
        found: how many measures of an earlier, stopped evaluation were taken up.
    """

    def __init__(self, folder: Path, name: str | None, identity: dict, stages: Stages, processes: Processes):
        """Take up what a file in `folder` holds of an evaluation of the same `identity`.

        The file has the name of the record, if that is fixed, else one that tells it from other evaluations'.
        """
        name = name or f"olica_eval-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
        self._path, self._identity = folder / f".{name}.measures", identity
        self._stages, self._processes = stages, processes
        self._rows: dict[str, dict] = processes.from_main(self._read() if processes.is_main else {})
        self.found = len(self._rows)

    def _read(self) -> dict[str, dict]:
        try:
            stored = json.loads(self._path.read_text())
            wanted = json.loads(json.dumps(self._identity))
            changed = [name for name, value in wanted.items() if stored["identity"][name] != value]
            if not changed:
                return stored["measures"]
            logger.warning("%s is of other %s: measuring all anew", self._path, ", ".join(changed))
            return {}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged: measuring all anew", self._path)
            return {}

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """What was measured under this name, now or before the evaluation was stopped."""
        if name not in self._rows:
            with self._stages.stage(name):
                value = work()
            self._rows[name] = {"value": value, "stage": self._stages.rows[name]}
            if self._processes.is_main:
                write_record(self._path, {"identity": self._identity, "measures": self._rows})
        self._stages.rows[name] = self._rows[name]["stage"]
        return self._rows[name]["value"]

    @contextmanager
    def says_how_to_go_on(self) -> Iterator[None]:
        """Say, where a signal stops the evaluation, what the same command takes up."""
        try:
            yield
        except KeyboardInterrupt as stopped:
            if self._rows:
                stopped.add_note(f"the same command takes up what was measured, the last being {list(self._rows)[-1]}")
            raise

    def forget(self) -> None:
        """Remove the file, now that the record holds all."""
        self._path.unlink(missing_ok=True)


def measure(subject: Subject, protocol: Protocol, measures: Measures, stages: Stages, processes: Processes) -> dict:
    """Read a model and measure what is missing; returns what the record says of it, whole in the main process."""
    name, location, tokenizer = subject.name, subject.location, subject.tokenizer

    @cache
    def model() -> PreTrainedModel:
        with stages.stage(f"{name}: read"):
            model = read_model(location, protocol.dtype, protocol.device_map)
            return model if protocol.device_map else model.to(stages.device)

    def take(what: str, work: Callable[[PreTrainedModel], Any]) -> Any:
        if (key := f"{name}: {what}") not in measures:
            model()  # here, lest reading it is counted as measuring
        return measures.take(key, lambda: work(model()))

    result = {
        "model": describe_source(location, subject.config),
        "file_bytes": location.file_bytes,
        **take("sizes", sizes),
    }
    if subject.windows:
        result["perplexity"] = {
            text.name: take(
                f"perplexity of {text.name}",
                lambda model, text=text: text_measure(model, subject, text, protocol, processes),
            )
            for text in protocol.texts
        }
    if protocol.tasks:
        missing = [task for task in protocol.tasks if f"{name}: {task}" not in measures]

        def score() -> Iterator[tuple[str, dict]]:  # whose first line runs when the first score is asked for
            yield from zero_shot(model(), tokenizer, missing, protocol.of_tasks, protocol.batch_size, processes)

        scores: dict[str, dict] = {}
        with closing(score()) as scored:
            for task in protocol.tasks:
                scores |= take(task, lambda _: next(scored)[1])
        result["zero_shot"] = {
            "tasks": scores,
            "averages": averages(scores),
            "harness": harness_version(),
            "limit": protocol.of_tasks.limit,
            "add_bos_token": protocol.of_tasks.add_bos_token,
            "softmax_dtype": SOFTMAX_DTYPE,
        }
    if protocol.cost:
        result["cost"] = take("cost", lambda model: latencies(model, stages.device))
    if subject.prompt is not None:
        result["continuation"] = take("continuation", lambda model: continuation(model, subject))
    return result


def sizes(model: PreTrainedModel) -> dict:
    """What a model's sizes alone tell."""
    return {
        "parameters": count_parameters(model),
        "weight_bytes": cost.weight_bytes(model),
        "macs": {"tokens": MACS_TOKENS, "total": cost.count_macs(model, MACS_TOKENS)},
        "cache_bytes_per_token": cost.cache_bytes_per_token(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def text_measure(
    model: PreTrainedModel, subject: Subject, text: TestText, protocol: Protocol, processes: Processes
) -> dict:
    """The perplexity of one text, with its protocol."""
    windows = subject.windows[text.name]
    first = windows[0, 0] == subject.tokenizer.bos_token_id
    every = protocol.of_tasks.add_bos_token
    return asdict(perplexity(model, windows, protocol.batch_size, processes)) | {
        "bos": "every window" if every else "first window" if first else "none",
        "origin": text.origin,
        "fingerprint": text.fingerprint,
    }


def latencies(model: PreTrainedModel, device: torch.device) -> dict:
    """Seconds of reading a prompt and of generating a token, and the peak memory of both."""
    shape = (LATENCY["sequences"], LATENCY["prompt_tokens"])
    prompts = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    reset_peak_memory(device)
    timed = cost.generation_latency({"model": model}, prompts, LATENCY["new_tokens"], LATENCY["repeats"])["model"]
    for row in timed.values():
        row.pop("ratio")  # to itself
    return {"protocol": LATENCY, **timed, "peak_memory": peak_memory(device)}


def continuation(model: PreTrainedModel, subject: Subject) -> str:
    """The prompt and what the model continues it by, greedily."""
    ids = subject.prompt.to(model.device)
    # The ids and their mask alone: a tokenizer may list inputs that the model does not take.
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUATION_TOKENS, do_sample=False
    )
    return subject.tokenizer.decode(output[0], skip_special_tokens=True)
