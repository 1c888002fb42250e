"""Stream the calibration set through the dense model before anything is pruned: the findings that decide sizes.

N samples, of several processes those of this one, n those of them that variants of a layer see, T tokens, D hidden
size, V entries in the vocabulary
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..methods.moments import Moments
from ..methods.recipe import Cut, Findings, Layer, TravellingSurvey, Weights
from ..methods.sizes import Sizes
from ..model.configuration_olica import LayerShape
from .activations import calibrate, enter_layers, propagate, reading_logits
from .cutting import as_seen, put
from .options import Work
from .progress import Surveyed, SurveyProgress
from .sharing import combine, keep_survey, probe_rows, spread, taken_up_survey
from .soundness import cast_weights, check_finite, check_logits, check_trial, solvable


@torch.no_grad()
def survey_layers(work: Work, plan: list[LayerShape] | None, progress: SurveyProgress) -> list[Findings]:
    """Survey all dense layers, which are left as they are.

    Args:
        work: the model and what is measured of it.
        plan: sizes of all layers as far as they are decided before; None where the findings decide.
        progress: what is finished of it.

    Returns:
        The findings of every layer; empty ones of a method without a survey.

    Raises:
        UsageError: activations are NaN or infinite, or a fit fails.
    """
    dense, options, survey = work.dense, work.options, work.method.survey
    layers = dense.config.num_hidden_layers
    if survey is None:
        return [{} for _ in range(layers)]
    processes, samples = options.processes, len(work.calibration_ids)
    work = replace(work, calibration_ids=work.calibration_ids[spread(survey.reads(samples), samples)])
    probes = Probes(survey, work, survey.samples(samples)) if isinstance(survey, TravellingSurvey) else None
    so_far = taken_up_survey(work, progress, probes.shares if probes else [])
    found, hidden = list(so_far.findings), so_far.hidden
    if processes.from_main(progress.is_complete):
        return found
    needs = [survey.needs(index, layers) for index in range(layers)]
    if probes:
        probes.take_up(so_far.travelling)
    is_streaming = any(needs) or probes is not None
    calls: list[dict] = [{}] * layers
    if is_streaming:
        hidden, calls = enter_layers(dense, work.own_ids, hidden, options.cache_device)
    for index, layer in dense.layers(options.device, "survey", first=len(found)):
        last, shape = index + 1 == layers, None if plan is None else plan[index]
        entering = hidden[probes.own_rows] if probes and probes.group_of(index).start == index else None
        moments = Moments(needs[index], dense.config.num_attention_heads)
        if is_streaming:
            # The states behind the last layer are those of the dense model, which variants are compared with.
            advance = not last or probes is not None
            calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=advance)
        combine(moments, processes)
        check_finite(moments, index, dense.model.dtype)
        seen = as_seen(layer, dense.config, moments, {})
        tasks = [partial(survey, seen, shape)] + (probes.tasks(index, layer, seen) if probes else [])
        with solvable(index, "a projection"):
            findings, *variants = processes.share_out(tasks)
        found.append(findings)
        del moments, seen, tasks  # the sums, which the next layer's would lie beside
        if probes:
            probes.advance(index, layer, calls[index], variants, entering)
        del variants  # as large as a layer
        if not last or probes:
            states = hidden if is_streaming else None
            keep_survey(work, progress, Surveyed(found, states, probes.states if probes else {}))
    if probes:
        found = probes.complete(found, hidden)
    progress.finish(found)
    return found


class Probes:
    """Variants of the layers, whose outputs travel through the dense layers that follow.

    Args:
        survey: says which.
        work: with the samples that the survey reads.
        samples: n, how many of these the variants see.

    Attributes:
        shares: for every process the samples that its variants see.
        own_rows: (n,) of these the process's own, among its samples.
        states: (n, T, D) of every variant, by the index of the first layer of its group and its number.
    """

    def __init__(self, survey: TravellingSurvey, work: Work, samples: int):
        self.states: dict[tuple[int, int], Tensor] = {}
        self._survey, self._dense, self._options = survey, work.dense, work.options
        self._groups = survey.groups(work.dense.config.num_hidden_layers)
        processes = work.options.processes
        self.shares = probe_rows(work, samples)
        first = processes.rows_of(processes.index, len(work.calibration_ids)).start
        self.own_rows = torch.tensor(self.shares[processes.index], dtype=torch.long) - first
        self._tokens = work.calibration_ids.shape[1]
        self._shapes = [shape for shape, _ in survey.variants(Sizes.of(work.dense.config))]

    def take_up(self, states: dict[tuple[int, int], Tensor]) -> None:
        """Go on with the states of an earlier run."""
        self.states = {key: state.to(self._options.cache_device) for key, state in states.items()}

    def group_of(self, index: int) -> range:
        """The group that the layer `index` is in."""
        return next(group for group in self._groups if index in group)

    def tasks(self, index: int, layer: nn.Module, seen: Layer) -> list[Callable[[], Weights]]:
        """What computes the weights of the variants of a layer."""

        def compute(shape: LayerShape, cut: Cut) -> Weights:
            return cast_weights(cut(seen, shape), index, next(layer.parameters()))

        return [partial(compute, *variant) for variant in self._survey.variants(seen.sizes)]

    def advance(
        self, index: int, layer: nn.Module, call: dict, variants: list[Weights], entering: Tensor | None
    ) -> None:
        """Send the variants of other groups through the dense layer `index`, and those of its own through its variants.

        `entering` (n, T, D) are the states that enter the first layer of a group.
        """
        config, batch_size, first = self._dense.config, self._options.batch_size, self.group_of(index).start
        for (other, _), state in self.states.items():
            if other != first:
                propagate(layer, state, call, batch_size)
        shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
        for number, (shape, weights) in enumerate(zip(self._shapes, variants, strict=True)):
            variant = copy.deepcopy(layer, dict(shared))  # its modules are its own, but for what is replaced no weight
            put(variant, config, shape, weights)
            if index == first:
                self.states[first, number] = entering.clone()
            propagate(variant, self.states[first, number], call, batch_size)

    def complete(self, found: list[Findings], hidden: Tensor) -> list[Findings]:
        """The findings, completed by how far the logits of all variants are from those of the dense model."""
        survey, tokens, processes = self._survey, self._tokens, self._options.processes
        for (first, _), state in self.states.items():
            check_trial(state, self.group_of(first))
        positions = torch.arange(min(survey.stride, tokens) - 1, tokens, survey.stride)
        compared: list[dict[tuple[int, int], float]] = []  # of every sample
        with reading_logits(self._dense, positions, self._options.device) as logits:

            def sound(states: Tensor) -> Tensor:
                check_logits(found := logits(states))
                return found

            keys, together = list(self.states), survey.compared_together
            for number, row in enumerate(self.own_rows.tolist()):
                (dense,), distances = sound(hidden[row : row + 1]), []
                for start in range(0, len(keys), together):
                    changed = torch.stack([self.states[key][number] for key in keys[start : start + together]])
                    distances += survey.compare(dense, sound(changed))
                compared.append(dict(zip(keys, distances, strict=True)))
        everywhere = [distances for own in processes.all_of(compared) for distances in own]
        means = dict.fromkeys(self.states, 0.0)
        for distances in everywhere:
            for key, distance in distances.items():
                means[key] += distance / len(everywhere)
        return processes.on_main(lambda: survey.complete(found, means))
