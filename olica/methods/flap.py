"""FLAP (An et al., AAAI 2024): what varies little can be replaced by its mean.

A feature's score is its fluctuation, Var(x_j) ||W_:,j||^2, standardised in every layer; one threshold over all layers
decides what goes, and the bias of what read it takes up its mean. D hidden size, K key/value heads, F channels
"""

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP, mean_channels
from .heads import RemovedGroups, by_group, mean_heads
from .linalg import ROUNDING, squared_norms
from .moments import Moments, Needing, Statistic, diagonal, needs, total
from .recipe import Findings, Layer, Method, NoParameters, Survey
from .thinning import RemovedMean
from .threshold import CHANNEL_SCORES, GROUP_SCORES, GlobalThreshold


def fluctuation(moments: Moments, tap: str, weight: Tensor) -> Tensor:
    """Var(x_j) ||W_:,j||^2 (f,) of the features at `tap`, which W (D, f) reads."""
    count = moments.count
    mean = moments.about_centre(total(tap)) / count  # about the centre, so that what is subtracted is small
    variance = moments.about_centre(diagonal(tap)) / count - mean.square()
    return variance.clamp(min=0) * squared_norms(weight.T)


@needs(total("heads"), diagonal("heads"))
def group_fluctuation(layer: Layer) -> Tensor:
    """Fluctuation (K,) of every key/value head: the sum over the features of its query heads."""
    return by_group(fluctuation(layer.moments, "heads", layer.weights.o_proj.weight), layer.sizes)


@needs(total("intermediate"), diagonal("intermediate"))
def channel_fluctuation(layer: Layer) -> Tensor:
    """Fluctuation (F,) of every channel."""
    return fluctuation(layer.moments, "intermediate", layer.weights.down_proj.weight)


class FlapSurvey(Survey):
    """The fluctuations of all layers of the dense model, and the means that biases take up."""

    serves_stages = True

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`."""
        return group_fluctuation.needs | channel_fluctuation.needs

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`."""
        return {
            GROUP_SCORES: group_fluctuation(layer).cpu(),
            CHANNEL_SCORES: channel_fluctuation(layer).cpu(),
            "heads": mean_heads(layer).cpu(),
            "intermediate": mean_channels(layer).cpu(),
        }


def scored(findings: Findings) -> tuple[Tensor, Tensor]:
    """Scores standardised within the layer: (s - mean) / deviation; zero where all are equal or there is but one."""
    return standardised(findings[GROUP_SCORES]), standardised(findings[CHANNEL_SCORES])


def standardised(scores: Tensor) -> Tensor:
    """Scores (n,) as (s - mean) / deviation, zeros where they differ by no more than rounding."""
    mean, deviation = scores.mean(), scores.std(correction=0)
    return torch.where(deviation > ROUNDING * mean.abs(), (scores - mean) / deviation, 0.0)


def found(name: str) -> Needing[[Layer], Tensor]:
    """What the survey found under a name: nothing is measured again."""
    return needs()(lambda layer: layer.findings[name].to(layer.weights.down_proj.weight.device))


def flap(_parameters: NoParameters) -> Method:
    """The method; means are those of the dense model, as the scores are."""
    mlp = ThinnedMLP(found(CHANNEL_SCORES), repairs=(RemovedMean("down_proj", found("intermediate")),))
    heads = RemovedGroups(found(GROUP_SCORES), repairs=(RemovedMean("o_proj", found("heads")),))
    return Method("dense", FlapSurvey(), GlobalThreshold(scored, biases=True), ((mlp, heads),))
