"""A loaded model as lm-evaluation-harness wants it, with log-likelihoods of our own.

lm-eval takes the logits of whole prompts, and the log-softmax of whole batches of them in float32: with a vocabulary of
262,144 tokens 16 prompts of 700 tokens would want 12 GB twice. Of a choice only the tokens of its answer are scored, so
that logits are made of the last positions alone.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import wraps

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..processes import Processes
from ..progress_bar import is_quiet
from ..sources.chats import dated_template

# lm-eval's default is the model's dtype: in bfloat16 a log-likelihood near -40 comes in steps of 0.25, and answers tie.
SOFTMAX_DTYPE = torch.float32
# Metrics are of what lm-eval calls of a model, and this marks what fails there: whatever it is, no fault of the rows.
CALLS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "all_gather", "gather_object", "barrier")
WHILE_RUNNING = "while lm-eval ran the model"


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    processes: Processes,
    add_bos_token: bool,
    apply_chat_template: bool,
):
    """The model for lm-eval.

    Args:
        model: on its device.
        tokenizer: a copy of it is used.
        batch_size: prompts at a time.
        processes: that share the rows.
        add_bos_token: whether prompts begin with the start token.
        apply_chat_template: whether they go through the chat template.
    """
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(tokenizer)
    if apply_chat_template:
        tokenizer.chat_template = dated_template(tokenizer)
    if add_bos_token:
        # lm-eval leaves the token to the tokenizer, and many tokenizers that have one do not put it there.
        tokenizer.add_bos_token, tokenizer.add_eos_token = True, False
    # Prompts are padded by what the model knows: tokens that were added to a tokenizer may lie beyond its embedding.
    special = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    known = (token for token in special if token is not None and token < model.config.vocab_size)
    tokenizer.pad_token_id = next(known, 0)
    # A class of its own: methods that were replaced on the instance would refer to it, and keep the model in memory.
    methods = {name: _marked(getattr(HFLM, name)) for name in CALLS} | {"_loglikelihood_tokens": log_likelihoods}
    wrapped = type("HarnessModel", (HFLM,), methods)(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        add_bos_token=add_bos_token,
    )
    if processes.count > 1:
        # lm-eval joins the processes of a launch only where it reads the model itself.
        wrapped.accelerator = Accelerator()
        wrapped._rank, wrapped._world_size = processes.index, processes.count
    return wrapped


def log_likelihoods(
    self,
    requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
    disable_tqdm: bool = False,
    override_bs: int | None = None,  # noqa: ARG001  # of an automatic size, which is never asked for
) -> list[tuple[float, bool]]:
    """In place of a method of lm-eval's HFLM, which `self` is: the same figures to rounding.

    Answers that differ in their last token alone are read from one forward pass.

    Args:
        self: the model for lm-eval.
        requests: key of the cache, tokens of the context, tokens of the answer.
        disable_tqdm: show no bar.
        override_bs: not used.

    Returns:
        Of each request the log-likelihood of the answer, and whether it is what the model would say greedily.
    """
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, answer) in enumerate(requests):
        if not (context and 0 < len(answer) <= self.max_length):
            raise UsageError(
                f"an answer of {len(answer)} tokens behind {len(context)} cannot be scored by a model of "
                f"{self.max_length} positions"
            )
        # What does not fit is cut off on the left; the last token is only predicted.
        asked.setdefault(tuple((context + answer)[-(self.max_length + 1) : -1]), []).append(number)
    prompts = sorted(asked, key=lambda tokens: (-len(tokens), tokens))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm or is_quiet() or self.rank != 0) as bar:
        for first in range(0, len(prompts), self.batch_size):
            batch = prompts[first : first + self.batch_size]
            longest = [max(len(requests[number][2]) for number in asked[tokens]) for tokens in batch]
            for tokens, steps in zip(batch, last_steps(self.model, batch, longest, self.device), strict=True):
                for number in asked[tokens]:
                    key, _, answer = requests[number]
                    expected = torch.tensor(answer, device=steps.device)
                    own = steps[-len(answer) :]
                    found = own.gather(1, expected[:, None]).sum().item()
                    results[number] = (found, bool((own.argmax(-1) == expected).all()))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, results[number])
                    bar.update()
    return results


def last_steps(
    model: PreTrainedModel, prompts: list[tuple[int, ...]], longest: list[int], device: torch.device
) -> Iterator[Tensor]:
    """Log-probabilities of the tokens behind the last ones of each prompt.

    Args:
        model: what is asked.
        prompts: tokens of each, the longest prompt first.
        longest: behind how many of its last tokens, for each.
        device: where tokens go.

    Yields:
        (n, V) of each prompt in `SOFTMAX_DTYPE`, n being its number of `longest`.
    """
    wanted = [(len(tokens) - last, len(tokens)) for tokens, last in zip(prompts, longest, strict=True)]
    first = min(begin for begin, _ in wanted)
    for row, (begin, end) in zip(tail_logits(model, prompts, first, device), wanted, strict=True):
        yield row[begin - first : end - first].log_softmax(-1, dtype=SOFTMAX_DTYPE)


@torch.no_grad()
def tail_logits(model: PreTrainedModel, prompts: list[tuple[int, ...]], first: int, device: torch.device) -> Tensor:
    """Logits (B, T - first, V) of B prompts, the longest of T tokens first, from position `first` on.

    They are padded on the right, which causal attention never sees.
    """
    ids = torch.zeros(len(prompts), len(prompts[0]), dtype=torch.long)
    for row, tokens in zip(ids, prompts, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return model(ids.to(device), use_cache=False, logits_to_keep=ids.shape[1] - first).logits


def _marked(run: Callable) -> Callable:
    """`run`, whose failures carry the note `WHILE_RUNNING`; log-likelihoods that are NaN are one."""

    @wraps(run)
    def marked(*arguments, **settings):
        try:
            results = run(*arguments, **settings)
        except Exception as error:
            error.add_note(WHILE_RUNNING)
            raise
        answers = results if isinstance(results, list) else []  # of a choice: log-likelihood, and whether it is greedy
        if any(isinstance(answer, tuple) and math.isnan(answer[0]) for answer in answers):
            raise UsageError(
                "a log-likelihood is NaN: the checkpoint yields NaN or infinite logits, or its dtype overflows"
            )
        return results

    return marked
