"""The measures of an evaluation, each kept on disk as soon as it is finished until all are there."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..machine import peak_memory, reset_peak_memory
from ..model.skeleton import count_parameters
from ..outputs.records import Stages, write_record
from ..processes import Processes
from ..sources.configuration import describe_source
from ..sources.weights import read_model
from . import cost
from .harness_model import SOFTMAX_DTYPE
from .perplexity import bytes_predicted, perplexity
from .subject import CONTINUATION_TOKENS, LATENCY, Protocol, Subject, TestText, TestWindows
from .zero_shot import averages, harness_version, zero_shot

logger = logging.getLogger(__name__)

# Tokens by which products are counted, as LLM-Pruner does: the paper's 424 G of LLaMA-7B are those.
MACS_TOKENS = 64


class Measures:
    """Finished measures of an evaluation, on disk as soon as each is there, so that a stopped one can go on.

    Attributes:
        found: how many measures of an earlier, stopped evaluation were taken up.
    """

    def __init__(self, folder: Path, name: str | None, identity: dict, stages: Stages, processes: Processes):
        """Take up what a file in `folder` holds of an evaluation of the same `identity`.

        The file has the name of the record, if that is fixed, else one that no other evaluation has.
        """
        name = name or f"olica_eval-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"
        self._path, self._identity = self._place(folder, name), identity
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
            logger.info("%s: measured in %.1f s", name, 60 * self._stages.rows[name]["minutes"])
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

    @classmethod
    def remove(cls, folder: Path, name: str) -> None:
        """Remove the file of this name from `folder`, if it is there."""
        cls._place(folder, name).unlink(missing_ok=True)

    @staticmethod
    def _place(folder: Path, name: str) -> Path:
        return folder / f".{name}.measures"


def measure(subject: Subject, protocol: Protocol, measures: Measures, stages: Stages, processes: Processes) -> dict:
    """Read a model and measure what is missing; returns what the record says of it, whole in the main process."""
    name, location, asked = subject.name, subject.location, protocol.asked

    @cache
    def model() -> PreTrainedModel:
        with stages.stage(f"{name}: read"):
            model = read_model(location, protocol.dtype, asked.device_map)
            return model if asked.device_map else model.to(stages.device)

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
            yield from zero_shot(model(), subject.tokenizer, missing, asked, processes)

        scores: dict[str, dict] = {}
        with closing(score()) as scored:
            for task in protocol.tasks:
                scores |= take(task, lambda _: next(scored)[1])
        result["zero_shot"] = {
            "tasks": scores,
            "averages": averages(scores),
            "harness": harness_version(),
            "limit": asked.limit,
            "add_bos_token": asked.add_bos_token,
            "apply_chat_template": asked.apply_chat_template,
            "softmax_dtype": str(SOFTMAX_DTYPE).removeprefix("torch."),
        }
    if asked.cost:
        result["cost"] = take("cost", lambda model: latencies(model, stages.device))
    if subject.prompt is not None:
        result["continuation"] = take("continuation", lambda model: continuation(model, subject))
    return result


def sizes(model: PreTrainedModel) -> dict:
    """What follows from a model's sizes alone."""
    return {
        "parameters": count_parameters(model),
        "weight_bytes": model.get_memory_footprint(return_buffers=False),
        "macs": {"tokens": MACS_TOKENS, "total": cost.count_macs(model, MACS_TOKENS)},
        "cache_bytes_per_token": cost.cache_bytes_per_token(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def text_measure(
    model: PreTrainedModel, subject: Subject, text: TestText | TestWindows, protocol: Protocol, processes: Processes
) -> dict:
    """The perplexity of one text, with its protocol."""
    windows = subject.windows[text.name]
    found = asdict(perplexity(model, windows, protocol.asked.batch_size, processes))
    size = bytes_predicted(subject.tokenizer, windows)
    first = windows[0, 0] == subject.tokenizer.bos_token_id
    every = protocol.asked.add_bos_token
    return found | {
        "bytes": size,
        "bits_per_byte": found["mean_nll"] * found["predictions"] / math.log(2) / size if size else None,
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
