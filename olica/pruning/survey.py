"""Stream the calibration set through the dense model before anything is pruned: the findings that decide sizes.

N samples, T tokens, D hidden size, n samples that variants of a layer see, V entries in the vocabulary
"""

import copy

import torch
from torch import Tensor, nn

from ..methods.moments import Moments
from ..methods.recipe import Findings, TravellingSurvey
from ..model.configuration_olica import LayerShape
from .activations import calibrate, enter_layers, propagate, reading_logits
from .cutting import as_seen, put
from .options import Work
from .progress import Surveyed, SurveyProgress
from .soundness import cast_weights, check_finite, check_trial, solvable


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
    so_far = progress.surveyed()
    found, hidden = list(so_far.findings), so_far.hidden
    if progress.is_complete:
        return found
    needs = [survey.needs(index, layers) for index in range(layers)]
    probes = Probes(survey, work, so_far.travelling) if isinstance(survey, TravellingSurvey) else None
    is_streaming = any(needs) or probes is not None
    calls: list[dict] = [{}] * layers
    if is_streaming:
        hidden, calls = enter_layers(dense, work.calibration_ids, hidden, options.cache_device)
    for index, layer in dense.layers(options.device, "survey", first=len(found)):
        last, shape = index + 1 == layers, None if plan is None else plan[index]
        entering = hidden[probes.rows] if probes and probes.begins(index) else None
        moments = Moments(needs[index], dense.config.num_attention_heads)
        if is_streaming:
            # The states behind the last layer are those of the dense model, which variants are compared with.
            advance = not last or probes is not None
            calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=advance)
        check_finite(moments, index, dense.model.dtype)
        seen = as_seen(layer, dense.config, moments, {})
        with solvable(index, "a projection"):
            found.append(survey(seen, shape))
            variants = survey.variants(seen, shape) if probes else []
        if probes:
            probes.advance(index, layer, calls[index], variants, entering)
        del variants  # as large as a layer
        if not last or probes:
            progress.save(Surveyed(found, hidden if is_streaming else None, probes.states if probes else {}))
    if probes:
        found = probes.complete(found, hidden)
    progress.finish(found)
    return found


class Probes:
    """Variants of the layers, whose outputs travel through the dense layers that follow.

    Attributes:
        rows: (n,) of the samples that they see, spread over the calibration set: its texts come one after the other.
        states: (n, T, D) of every variant, by the index of the first layer of its group and its number.
    """

    def __init__(self, survey: TravellingSurvey, work: Work, states: dict[tuple[int, int], Tensor]):
        self.states = {key: state.to(work.options.cache_device) for key, state in states.items()}
        self._survey, self._dense, self._options = survey, work.dense, work.options
        self._group = survey.group_size(work.dense.config.num_hidden_layers)
        samples = len(work.calibration_ids)
        number = survey.samples(samples)
        self.rows = torch.arange(number) * samples // number
        self._ids = work.calibration_ids[self.rows]

    def begins(self, index: int) -> bool:
        """Whether the layer is the first of a group."""
        return index % self._group == 0

    def advance(self, index: int, layer: nn.Module, call: dict, variants: list, entering: Tensor | None) -> None:
        """Send the variants of other groups through the dense layer `index`, and those of its own through its variants.

        `entering` (n, T, D) are the states that enter the first layer of a group.
        """
        config, batch_size, first = self._dense.config, self._options.batch_size, index - index % self._group
        for (other, _), state in self.states.items():
            if other != first:
                propagate(layer, state, call, batch_size)
        shared = {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
        for number, (shape, weights) in enumerate(variants):
            variant = copy.deepcopy(layer, dict(shared))  # its modules are its own, but for what is replaced no weight
            put(variant, config, shape, cast_weights(weights, index, next(layer.parameters())))
            if index == first:
                self.states[first, number] = entering.clone()
            propagate(variant, self.states[first, number], call, batch_size)

    def complete(self, found: list[Findings], hidden: Tensor) -> list[Findings]:
        """The findings, completed by how far the logits of all variants are from those of the dense model."""
        survey, compared, tokens = self._survey, dict.fromkeys(self.states, 0.0), self._ids.shape[1]
        for (first, _), state in self.states.items():
            check_trial(state, range(len(found))[first : first + self._group])
        positions = torch.arange(min(survey.stride, tokens) - 1, tokens, survey.stride)
        with reading_logits(self._dense, positions, self._options.device) as logits:
            for number, row in enumerate(self.rows.tolist()):
                dense = survey.read(logits(hidden[row : row + 1]))
                for key, state in self.states.items():
                    changed = survey.read(logits(state[number : number + 1]))
                    compared[key] += survey.compare(dense, changed) / len(self.rows)
        return survey.complete(found, compared)
