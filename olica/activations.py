"""Record the call of every decoder layer once, and replay it over the hidden states in batches.

The keyword arguments that a decoder layer is given (masks, rotary embeddings, whatever a release of transformers
passes) are kept and replayed unread: naming them is what broke older pruners on newer releases.

    N samples, T tokens, D hidden size
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .modeling_olica import projections_of
from .moments import TAPS, Moments


@contextmanager
def _pass_through(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """Let every decoder layer return its input, and note the inputs of the first and the first call of each.

    Only `forward` is replaced, on the instance: whatever else transformers reads from its layers is still there.
    """
    inputs: list[Tensor] = []
    calls: list[dict] = [{} for _ in layers]

    def forward(index: int, hidden_states: Tensor, **kwargs) -> Tensor:
        calls[index] = calls[index] or kwargs
        if index == 0:
            inputs.append(hidden_states)
        return hidden_states

    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield inputs, calls
    finally:
        for layer in layers:
            del layer.forward


def _to_device(value, device):
    """`value` with every tensor in it moved to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


@torch.no_grad()
def record_layer_calls(
    model: nn.Module, calibration_ids: Tensor, cache_device: torch.device, device: torch.device
) -> tuple[Tensor, list[dict]]:
    """Embed the calibration set and learn how the base model calls its decoder layers.

    Args:
        model: the base model (`model.layers` are its decoder layers).
        calibration_ids: (N, T).
        cache_device: where the hidden states are to live.
        device: where the layers will run.

    Returns:
        Hidden states (N, T, D) that enter the first layer, and for each layer the keyword arguments of a call with one
        sample: leading dimensions of 1, which broadcast over any batch.
    """
    embedding = model.embed_tokens.weight
    hidden = torch.empty(*calibration_ids.shape, embedding.shape[1], dtype=embedding.dtype, device=cache_device)
    with _pass_through(model.layers) as (inputs, calls):
        for row, sample in zip(hidden, calibration_ids.split(1), strict=True):
            model(sample.to(embedding.device), use_cache=False)
            row.copy_(inputs.pop()[0])
    return hidden, _to_device(calls, device)


def layer_outputs(layer: nn.Module, hidden: Tensor, call: dict, batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Run a decoder layer over hidden states (N, T, D) in batches.

    Yields:
        The rows of the batch and the layer's output for them (B, T, D), on the layer's device.
    """
    device = next(layer.parameters()).device
    for start in range(0, len(hidden), batch_size):
        rows = slice(start, start + batch_size)
        output = layer(hidden[rows].to(device), **call)
        yield rows, output[0] if isinstance(output, tuple) else output


@contextmanager
def recording(layer: nn.Module, taps: set[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the activations of the latest forward of `layer` at each of `taps` (keys of TAPS)."""
    seen: dict[str, Tensor] = {}

    def hook(tap: str, side: str):
        if side == "input":
            return lambda module, args: seen.__setitem__(tap, args[0])
        return lambda module, args, output: seen.__setitem__(tap, output)

    projections, handles = projections_of(layer), []
    for tap in taps:
        name, side = TAPS[tap]
        module = getattr(projections, name)
        register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
        handles.append(register(hook(tap, side)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def calibrate(layer: nn.Module, hidden: Tensor, call: dict, moments: Moments, batch_size: int, advance: bool) -> None:
    """Fill `moments` while the hidden states (N, T, D) stream through `layer`: hooks on.

    With `advance` the hidden states are replaced by the layer's outputs on the way.
    """
    with recording(layer, moments.taps) as seen:
        for rows, output in layer_outputs(layer, hidden, call, batch_size):
            moments.update(seen)
            if advance:
                hidden[rows] = output.to(hidden.device)


def propagate(layer: nn.Module, hidden: Tensor, call: dict, batch_size: int) -> None:
    """Replace the hidden states (N, T, D) by the outputs of `layer`: hooks off."""
    for rows, output in layer_outputs(layer, hidden, call, batch_size):
        hidden[rows] = output.to(hidden.device)
