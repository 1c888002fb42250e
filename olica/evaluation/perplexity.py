"""Perplexity on windows of text.

W windows, T tokens in each, V entries in the vocabulary.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..machine import BatchSize
from ..processes import ALONE, Processes
from ..progress_bar import is_quiet
from ..sources.tokenizers import start_token
from .paired import pack_floats, standard_error


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with its protocol; `standard_error` is None where one window is all there is."""

    value: float
    standard_error: float | None
    mean_nll: float  # nats per predicted token
    windows: int
    seqlen: int  # tokens in each window
    predictions: int  # tokens predicted in all windows together
    nll_by_window: str  # `paired.pack_floats` of the mean of every window, for paired comparisons


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seqlen: int,
    limit: int | None = None,
    add_bos_token: bool = False,
) -> torch.Tensor:
    """Cut `text` into non-overlapping windows of `seqlen` tokens, ids (W, T); a shorter tail is dropped.

    The text is tokenised once, as a whole, with the tokenizer's defaults: one that puts a token in front, as
    LLaMA's puts <s>, does so in the first window only, as in the paper. With `add_bos_token` every window begins with
    the start token instead, and holds one token of text less. `limit` keeps that many windows.
    Raises UsageError if a window is too short to predict anything, the text does not fill one, or the tokenizer has no
    start token that could be added.
    """
    if seqlen < 2:
        raise UsageError(f"--ppl_seqlen {seqlen}: a window needs at least 2 tokens, one of them predicted")
    # verbose=False: that the text is longer than the model's context is what the windows are for.
    ids = tokenizer(text, verbose=False, add_special_tokens=not add_bos_token)["input_ids"]
    ids = torch.tensor(ids, dtype=torch.long)
    of_text = seqlen - add_bos_token
    windows = len(ids) // of_text
    if windows == 0:
        raise UsageError(f"--ppl_seqlen {seqlen}: the text has only {len(ids)} tokens; give a smaller one or more text")
    cut = ids[: windows * of_text].view(windows, of_text)[:limit]
    return torch.cat([torch.full((len(cut), 1), start_token(tokenizer)), cut], dim=1) if add_bos_token else cut


def bytes_predicted(tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor) -> int:
    """Bytes, in UTF-8, of the text that all windows (W, T) have behind their first tokens, which are given.

    Perplexities by different tokenizers are comparable as bits per byte. Where a window cuts a character in two, its
    halves count as the three bytes of what stands for them.
    """

    def size(ids: torch.Tensor) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    return sum(size(window) - size(window[:1]) for window in windows)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: torch.Tensor, batch_size: int, processes: Processes = ALONE
) -> Perplexity:
    """Perplexity of a causal model on `windows` (W, T): exp of the mean negative log-likelihood.

    The paper's protocol: every window is its own sequence, its first token is given and the other T-1 are
    predicted. Log-probabilities are taken in float32 whatever the dtype of the model. The standard error
    is value * `paired.standard_error` of the windows' means, by the delta method.
    Of several `processes` each takes every so-many-th batch, the same batches that one alone would take. A batch that
    does not fit into memory is done in halves.
    Raises UsageError if the result is not a finite number.
    """
    mine = list(enumerate(windows.split(batch_size)))[processes.index :: processes.count]
    # Filled in place: small tensors kept from between the large ones would pin the allocator's freed memory.
    nll = torch.zeros(len(windows), dtype=torch.float64, device=model.device)  # nats per window

    def fill(first: int, batch: torch.Tensor, rows: slice) -> None:
        ids = batch[rows].to(model.device)
        logits = model(ids, use_cache=False).logits  # (B, T, V)
        # One window at a time: the float32 copy of a whole batch's logits would be the largest tensor of all.
        for index, (row, targets) in enumerate(zip(logits, ids, strict=True), first + rows.start):
            nll[index] = cross_entropy(row[:-1].float(), targets[1:])

    fitting = BatchSize(batch_size)
    for number, batch in tqdm(mine, desc="perplexity", unit="batch", disable=is_quiet() or not processes.is_main):
        fitting.run(partial(fill, number * batch_size, batch), len(batch))
    processes.add_up([nll])
    nll = nll.cpu()
    value = nll.mean().exp().item()
    if not math.isfinite(value):
        raise UsageError(
            f"the perplexity is not finite (mean negative log-likelihood {nll.mean():.4g}): "
            "the checkpoint yields NaN or infinite logits, or its dtype overflows"
        )
    count, seqlen = windows.shape
    error = standard_error(nll.numpy(), consecutive=True)
    error = None if error is None else value * error
    return Perplexity(value, error, nll.mean().item(), count, seqlen, count * (seqlen - 1), pack_floats(nll))
