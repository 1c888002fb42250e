"""Record the call of every decoder layer once, and replay it over the hidden states in batches.

The keyword arguments that a decoder layer is given (masks, rotary embeddings, whatever a release of transformers
passes) are kept and replayed unread: naming them is what broke older pruners on newer releases.

    N samples, T tokens, D hidden size
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import linear

from ..machine import BatchSize
from ..methods.moments import TAPS, Moments
from ..model.modeling_olica import projections_of
from ..sources.dense_model import DenseModel

# Rows of the head that are in single precision at a time.
HEAD_ROWS = 8192


class _SeenEnough(Exception):
    """Ends a forward pass of which nothing more is wanted."""


@contextmanager
def _in_place_of(layers: nn.ModuleList, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Have `forward`, given the index too, take the place of every decoder layer's own.

    Only `forward` is replaced, on the instance: whatever else transformers reads from its layers is still there.
    """
    for index, layer in enumerate(layers):
        layer.forward = partial(forward, index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _pass_through(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[dict]]]:
    """Let every decoder layer return its input, and note the inputs of the first and the first call of each.

    The last one ends the pass by `_SeenEnough`.
    """
    inputs: list[Tensor] = []
    calls: list[dict] = [{} for _ in layers]

    def forward(index: int, hidden_states: Tensor, **kwargs) -> Tensor:
        calls[index] = calls[index] or kwargs
        if index == 0:
            inputs.append(hidden_states)
        if index == len(layers) - 1:
            raise _SeenEnough
        return hidden_states

    with _in_place_of(layers, forward):
        yield inputs, calls


@contextmanager
def reading_logits(dense: DenseModel, positions: Tensor, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields (states (n, T, D) behind the last decoder layer) -> logits (n, P, V) at `positions` (P,).

    They are in single precision, of weights as they are, since differences of small changes sink in the rounding of
    half precision; the head works on `device`.
    """
    with dense.head(), torch.no_grad():
        head = dense.model.get_output_embeddings()
        home = head.weight.device

        def project(hidden: Tensor) -> Tensor:
            single = hidden.to(device).float()  # no head of a supported family has a bias
            return torch.cat([linear(single, rows.to(device).float()) for rows in head.weight.split(HEAD_ROWS)], -1)

        def logits(states: Tensor) -> Tensor:
            states = states.to(home)

            def forward(index: int, hidden_states: Tensor, **_) -> Tensor:
                return states if index == 0 else hidden_states  # without the factor that some models put in front

            with _in_place_of(dense.decoder.layers, forward):
                return dense.model(inputs_embeds=states, use_cache=False, logits_to_keep=positions).logits

        head.forward = project
        try:
            yield logits
        finally:
            del head.forward


@torch.no_grad()
def record_layer_calls(
    decoder: nn.Module, calibration_ids: Tensor, cache_device: torch.device
) -> tuple[Tensor, list[dict]]:
    """Embed the calibration set and learn how the base model calls its decoder layers.

    Args:
        decoder: the base model, of which only the embedding needs its weights.
        calibration_ids: (N, T).
        cache_device: where the hidden states are to live.

    Returns:
        Hidden states (N, T, D) that enter the first layer, and for each layer the keyword arguments of a call with one
        sample: leading dimensions of 1, which broadcast over any batch. They stay where the model was run.
    """
    embedding = decoder.embed_tokens.weight
    hidden = torch.empty(*calibration_ids.shape, embedding.shape[1], dtype=embedding.dtype, device=cache_device)
    with _pass_through(decoder.layers) as (inputs, calls):
        for row, sample in zip(hidden, calibration_ids.split(1), strict=True):
            try:
                decoder(sample.to(embedding.device), use_cache=False)
            except _SeenEnough:
                row.copy_(inputs.pop()[0])
    return hidden, calls


def enter_layers(
    dense: DenseModel, calibration_ids: Tensor, hidden: Tensor | None, cache_device: torch.device
) -> tuple[Tensor, list[dict]]:
    """As `record_layer_calls`, but with the hidden states (N, T, D) that an earlier run kept, if there are any."""
    with dense.embedding():
        ids = calibration_ids if hidden is None else calibration_ids[:1]
        embedded, calls = record_layer_calls(dense.decoder, ids, cache_device)
    return embedded if hidden is None else hidden.to(cache_device), calls


@contextmanager
def recording(layer: nn.Module, taps: set[str], stop: bool) -> Iterator[dict[str, Tensor]]:
    """Keep the activations of a forward of `layer` at each of `taps` (keys of TAPS), in the dictionary yielded.

    With `stop` the forward ends by `_SeenEnough` when the last of them has been seen.
    """
    seen: dict[str, Tensor] = {}

    def keep(tap: str, activations: Tensor) -> None:
        seen[tap] = activations
        if stop and len(seen) == len(taps):
            raise _SeenEnough

    def hook(tap: str, side: str):
        if side == "input":
            return lambda _, args: keep(tap, args[0])
        return lambda _module, _args, output: keep(tap, first_of(output))

    projections, handles = projections_of(layer), []
    for tap in taps:
        name, side = TAPS[tap]
        module = layer if name == "layer" else getattr(projections, name)
        register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
        handles.append(register(hook(tap, side)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_of(output: Tensor | tuple) -> Tensor:
    """The hidden states that a decoder layer returned, of which some releases made a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _forward(layer: nn.Module, hidden: Tensor, call: dict) -> Tensor:
    return first_of(layer(hidden, **call))


def calibrate(
    layer: nn.Module, hidden: Tensor, call: dict, moments: Moments, batch_size: BatchSize, advance: bool
) -> None:
    """Fill `moments` while the hidden states (N, T, D) stream through `layer`: hooks on.

    With `advance` the hidden states are replaced by the layer's outputs on the way; without, what comes behind the last
    of the taps is not computed.
    """
    if not (moments.taps or advance):
        return
    device = next(layer.parameters()).device
    call = send_to_device(call, device)
    with recording(layer, moments.taps, stop=not advance) as seen:

        def work(rows: slice) -> None:
            output = None
            try:
                output = _forward(layer, hidden[rows].to(device), call)
            except _SeenEnough:
                pass
            finally:
                activations = dict(seen)
                seen.clear()  # kept any longer, they would stand beside those of the next batch
            moments.update(activations)
            if advance:  # last: a batch that finds no memory is done again, and must not have replaced its input
                hidden[rows] = output

        batch_size.run(work, len(hidden))


def propagate(layer: nn.Module, hidden: Tensor, call: dict, batch_size: BatchSize) -> None:
    """Replace the hidden states (N, T, D) by the outputs of `layer`: hooks off."""
    device = next(layer.parameters()).device
    call = send_to_device(call, device)

    def work(rows: slice) -> None:
        hidden[rows] = _forward(layer, hidden[rows].to(device), call)

    batch_size.run(work, len(hidden))
