"""Prune the decoder layers of a dense model one at a time (paper, Algorithm 1).

N samples, of several processes those of this one, T tokens, D hidden size
"""

import torch
from torch import Tensor, nn

from ..methods.moments import Moments
from ..methods.recipe import Findings
from ..model.configuration_olica import LayerShape
from .activations import calibrate, enter_layers, propagate
from .cutting import as_seen, check_complete, cut, heads_of, restore
from .options import Work
from .progress import Progress
from .sharing import combine, keep_layer, taken_up_cut, weights_of
from .soundness import check_finite


@torch.no_grad()
def prune_layers(work: Work, plan: list[LayerShape], findings: list[Findings], progress: Progress) -> None:
    """Prune every decoder layer to `plan`, on the stream that the method names.

    Args:
        work: the model and what is done to it.
        plan: sizes of all layers.
        findings: of the survey, for all layers.
        progress: what is finished of it.

    Raises:
        UsageError: activations are NaN or infinite, a fit or a decomposition fails, or a dtype cannot hold a weight.
    """
    dense, method, options = work.dense, work.method, work.options
    finished, entered, hidden = taken_up_cut(work, progress)
    if finished == len(plan):
        return
    calls: list[dict] = [{}] * len(plan)
    # Where no statistic is read, nothing has to stream.
    is_streaming = any(needs for shape in plan for needs in method.needs(shape))
    if is_streaming:
        hidden, calls = enter_layers(dense, work.own_ids, hidden, options.cache_device)
    for index, layer in dense.layers(options.device, "prune", first=entered if is_streaming else finished):
        if index < finished:
            if method.stream == "pruned":
                restore(layer, dense.config, plan[index], weights_of(work, progress, index))
            propagate(layer, hidden, calls[index], options.batch_size)
            continue
        goes_on = is_streaming and index + 1 < len(plan)
        hidden = _prune_layer(work, index, layer, plan[index], findings[index], (hidden, calls[index], goes_on))
        keep_layer(work, progress, index, layer, hidden if goes_on else None)
    progress.wait()


def _prune_layer(
    work: Work,
    index: int,
    layer: nn.Module,
    shape: LayerShape,
    findings: Findings,
    stream: tuple[Tensor | None, dict, bool],
) -> Tensor | None:
    """Prune `layer` to `shape`.

    Args:
        work: as that of `prune_layers`.
        index: of the layer.
        layer: dense; pruned in place.
        shape: its sizes.
        findings: of the survey.
        stream: hidden states (N, T, D) that enter the layer, keyword arguments of its call, and whether the states that
            leave it are wanted.

    Returns:
        The states that leave it: of the dense layer or of the pruned one, as the method says.
    """
    (hidden, call, goes_on), (method, options) = stream, (work.method, work.options)
    config, replaced = work.dense.config, set()
    is_dense, is_single = method.stream == "dense", len(method.passes) == 1
    following = hidden
    if goes_on and is_dense and not is_single:  # the passes to come see the layer half pruned
        following = hidden.clone()
        propagate(layer, following, call, options.batch_size)
    for stages, needs in zip(method.passes, method.needs(shape), strict=True):
        moments = Moments(needs, heads_of(layer, config))
        advance = goes_on and is_dense and is_single
        calibrate(layer, hidden, call, moments, options.batch_size, advance=advance)
        combine(moments, options.processes)
        check_finite(moments, index, next(layer.parameters()).dtype)
        replaced |= cut(work, index, layer, stages, as_seen(layer, config, moments, findings), shape)
        del moments
    check_complete(layer, config, shape, replaced)
    if goes_on and not is_dense:
        propagate(layer, following, call, options.batch_size)
    return following
