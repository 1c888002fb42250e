"""Ratios by transfer entropy, after "Let LLM Tell What to Prune and How Much to Prune" (Yang et al., ICML 2025).

Not a reproduction of it: its full text and its pruning code could not be had. Known is that every block has a ratio of
its own, and so has every type of module; that transfer entropy between blocks says how important they are; and that a
bias makes up for what is removed, b = W_P E[x_P]. The rest is ours (docs/methods.md): what the
transfer is between, its estimate, the map from entropies to ratios, and the score of heads and channels, FLAP's.

D hidden size, K key/value heads, F channels, L layers, p features of a window
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from ..checks import check_above_zero
from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP, mean_channels
from .flap import channel_fluctuation, group_fluctuation
from .heads import RemovedGroups, mean_heads
from .linalg import ROUNDING
from .moments import DOUBLE, SINGLE, Moments, Statistic, cross, diagonal, full, total
from .ratios import LayerRatios, Ratios
from .recipe import Findings, Layer, Method, Survey
from .sizes import Sizes
from .thinning import RemovedMean

# Name of the findings: transfer entropies (2,), from the attention and from the MLP.
TRANSFER_ENTROPY = "transfer_entropy"
PAST, PRESENT, SOURCES = "layer_input", "layer_output", ("attention_output", "mlp_output")
# The features of the stream are dealt at random, in every layer alike, into windows of at most so many.
WINDOW, SEED = 64, 0
# Variance of the noise that the target is read through, in variances of each feature; and the same of past and source,
# small beside it and large beside what single precision leaves of nothing.
NOISE, RIDGE = 0.01, 1e-4
# Ratios are clipped to these multiples of their mean; and no part of a layer loses more than this share.
LEAST_RATIO, MOST_RATIO, MOST_LOST = 0.25, 2.0, 0.9
# Nats; a mean transfer entropy below it is what rounding leaves of zero.
NO_TRANSFER = 1e-9


def windows(hidden_size: int) -> list[Tensor]:
    """The features of the stream, each in one window (p,)."""
    dealt = torch.randperm(hidden_size, generator=torch.Generator().manual_seed(SEED))
    return list(dealt.tensor_split(-(-hidden_size // WINDOW)))


def transfer_entropy(covariance: Tensor) -> Tensor:
    """I(y; x | h) = log(det Cov(y | h) / det Cov(y | h, x)) / 2 of jointly Gaussian x, h and y, in nats ().

    The last entries on the diagonal of a Cholesky factor are the deviations of what the features before leave open.

    Args:
        covariance: (3 p, 3 p) of the source x, the target's past h and the target y, one after the other.
    """
    width = len(covariance) // 3
    given_past, given_both = (
        torch.linalg.cholesky(joint.double()).diagonal()[-width:].log().sum()
        for joint in (covariance[width:, width:], covariance)
    )
    return given_past - given_both


def joint_correlations(moments: Moments, taps: tuple[str, ...]) -> Iterator[Tensor]:
    """For each window the correlations (t p, t p) of its features at t taps; zero of what varies by rounding alone.

    Products of two taps are those that are summed with the earlier one first.
    """
    count, means, scales = moments.count, {}, {}
    pairs = list(combinations_with_replacement(taps, 2))
    sums = {(x, y): moments.about_centre(full(x) if x == y else cross(x, y)) for x, y in pairs}
    for tap in taps:
        means[tap] = moments.about_centre(total(tap)) / count
        variance = sums[tap, tap].diagonal().double() / count - means[tap].square()
        varies = variance > ROUNDING * moments[diagonal(tap)] / count
        scales[tap] = torch.where(varies, variance.rsqrt(), 0.0)
    for features in windows(len(means[taps[0]])):
        blocks = {}
        for x, y in pairs:
            products = sums[x, y][features][:, features].double() / count
            covariance = products - torch.outer(means[x][features], means[y][features])
            blocks[x, y] = covariance * torch.outer(scales[x][features], scales[y][features])
            blocks[y, x] = blocks[x, y].T
        yield torch.cat([torch.cat([blocks[x, y] for y in taps], dim=1) for x in taps])


def transferred(moments: Moments, source: str) -> Tensor:
    """Transfer entropy () from a module's output to the stream behind its layer, in nats for each feature of it.

    The stream in front of the layer is the past that the target is conditioned on; all three are taken in the same
    window of features, and the windows are added up.
    """
    parts = []
    for joint in joint_correlations(moments, (source, PAST, PRESENT)):
        noise = torch.tensor([RIDGE, RIDGE, NOISE], dtype=joint.dtype, device=joint.device)
        noise = noise.repeat_interleave(len(joint) // 3)
        parts.append(transfer_entropy(joint + noise.diag()))
    return torch.stack(parts).sum() / len(moments.mean(PAST))


class TransferSurvey(Survey):
    """The transfer entropies of the two modules of every dense layer."""

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`; the temperature has no part in it."""
        return {}

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`."""
        squares = {full(tap) for tap in (*SOURCES, PAST, PRESENT)}
        with_stream = {cross(source, tap) for source in SOURCES for tap in (PAST, PRESENT)}
        return frozenset(squares | with_stream | {cross(PAST, PRESENT)})

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Survey`: a window's rows of a sum, its correlations, what is made of them, and vectors."""
        width = min(WINDOW, sizes.hidden_size)
        return DOUBLE * (5 * (3 * width) ** 2 + 12 * sizes.hidden_size) + SINGLE * width * sizes.hidden_size

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`."""
        return {TRANSFER_ENTROPY: torch.stack([transferred(layer.moments, source) for source in SOURCES]).cpu()}


def by_transfer(temperature: float) -> Ratios:
    """Ratios (L, 2) by a softmax of -TE / (temperature x mean TE) over all modules of all layers, clipped.

    They are multiples of what they would be were all modules alike; `LayerRatios` scales them to the budget.
    """

    def ratios(findings: list[Findings], _layers: int) -> Tensor:
        entropies = torch.stack([found[TRANSFER_ENTROPY] for found in findings])  # (L, 2)
        unit = temperature * entropies.mean().clamp(min=NO_TRANSFER)
        shares = (-entropies / unit).flatten().softmax(0).view_as(entropies)
        return (entropies.numel() * shares).clamp(LEAST_RATIO, MOST_RATIO)

    return ratios


@dataclass(frozen=True)
class TellParameters:
    """What is left open; the paper's value is not known."""

    te_temperature: float = field(
        default=1.0,
        metadata={"help": "above 0, in mean transfer entropies: the higher, the more alike are the layers' ratios"},
    )

    def __post_init__(self) -> None:
        check_above_zero("te_temperature", self.te_temperature)


def let_llm_tell(parameters: TellParameters) -> Method:
    """The method; scores and means of the MLP are taken behind the pruned attention, on the pruned stream."""
    heads = RemovedGroups(group_fluctuation, repairs=(RemovedMean("o_proj", mean_heads),))
    mlp = ThinnedMLP(channel_fluctuation, repairs=(RemovedMean("down_proj", mean_channels),))
    allocate = LayerRatios(by_transfer(parameters.te_temperature), reads_findings=True, biases=True, most=MOST_LOST)
    return Method("pruned", TransferSurvey(), allocate, ((heads,), (mlp,)))
