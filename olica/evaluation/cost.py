"""What a model costs: parameters, products, bytes, seconds per forward pass and per generated token.

B sequences, T tokens of each
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..model.configuration_olica import attends_with_all_heads, head_dim


def count_macs(model: PreTrainedModel, tokens: int) -> int:
    """Multiply-accumulates of one forward pass of a sequence of T = `tokens` tokens; no weight is read.

    Every linear map of (in, out) features takes T in out, and the attention of a layer with H heads of width d
    2 H T^2 d: scores and mixed values of all pairs of tokens, the masked ones too. Norms, activations and rotary
    embeddings are left out, as is usual.
    """
    linear = sum(
        module.in_features * module.out_features for module in model.modules() if isinstance(module, nn.Linear)
    )
    config = model.config
    heads = sum(_attended_groups(config)) * (config.num_attention_heads // config.num_key_value_heads)
    return tokens * linear + 2 * heads * head_dim(config) * tokens**2


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that the key/value cache takes for every token: keys and values of all layers, in the model's dtype.

    Values of narrowed heads are cached zero-padded. A layer with a sliding window caches no more than its window.
    """
    return 2 * sum(_attended_groups(model.config)) * head_dim(model.config) * model.dtype.itemsize


def _attended_groups(config) -> list[int]:
    """Key/value heads that the attention of every layer reads and caches, of a dense or pruned model."""
    shapes = getattr(config, "layer_shapes", None)
    if not shapes or attends_with_all_heads(config):
        return [config.num_key_value_heads] * config.num_hidden_layers
    return [shape.get("kv_heads") or config.num_key_value_heads for shape in shapes]


@torch.no_grad()
def generation_latency(
    models: dict[str, PreTrainedModel], prompts: torch.Tensor, new_tokens: int, repeats: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Time greedy generation through the cache.

    The models take turns at every step, so that a clock or a neighbour that changes speed meets all of them alike.

    Args:
        models: causal language models by name, the one to compare with first.
        prompts: (B, T) token ids.
        new_tokens: steps of one token for each of the B sequences, after the one that the prompts give.
        repeats: rounds of one prefill and `new_tokens` steps, beside a first one that is not counted.

    Returns:
        By the names of `models` two rows: `prefill`, the forward pass of the prompts that fills the cache, with the
        logits of the last position only, and `decode`, one step. Each has, in seconds, `median_s`, `min_s` and `max_s`,
        and `ratio`, the median over that of the first model.
    """
    prefill, decode = ({name: [] for name in models} for _ in range(2))
    for _ in range(1 + repeats):
        states = dict.fromkeys(models, (prompts, None))
        for step in range(1 + new_tokens):
            for name, model in models.items():
                taken, states[name] = _timed(model.device, _greedy_step, model, *states[name])
                (decode if step else prefill)[name].append(taken)
    prefill, decode = _compared(prefill, uncounted=1), _compared(decode, uncounted=new_tokens)
    return {name: {"prefill": prefill[name], "decode": decode[name]} for name in models}


def _greedy_step(model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
    """The likeliest next token (B, 1) after `ids` (B, T) and what `cache` holds, and the cache with `ids` in it."""
    output = model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1:].argmax(-1), output.past_key_values


def _timed(device: torch.device, work: Callable, *args, **kwargs) -> tuple[float, object]:
    """Wall-clock seconds of `work`, to the end of what it started on a GPU, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for all that was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _compared(seconds: dict[str, list[float]], uncounted: int) -> dict[str, dict[str, float]]:
    """Median, extremes and ratio to the first model's median, by model, without the first `uncounted` values."""
    timed = {}
    for name, values in seconds.items():
        counted = values[uncounted:]
        timed[name] = {"median_s": statistics.median(counted), "min_s": min(counted), "max_s": max(counted)}
    first = next(iter(timed.values()))["median_s"]
    return {name: row | {"ratio": row["median_s"] / first} for name, row in timed.items()}
