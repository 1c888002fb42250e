"""Which MLPs get a correction, and the low-rank linear correction of a pruned MLP (the paper's linear calibration).

n tokens, D hidden size, F intermediate channels, P pruned channels, r rank
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .linalg import (
    DOUBLE_BLOCK,
    RegressionSums,
    SingularError,
    multiple_correlation,
    principal_components,
    ridge_regression,
)
from .moments import DOUBLE, SINGLE, Moments, Statistic, cross, diagonal, full, needs, total
from .recipe import Layer, Weights
from .sizes import Sizes
from .thinning import Thinned

# Steepness with which the released code turns correlations into weights of the correction's outputs (D11).
RELEASED_TEMPERATURE = 0.05
# The released code divides its ridge by (samples / 128)(tokens / 128), whatever the sums are taken over (D10).
RELEASED_RIDGE_TOKENS = 128 * 128

# (percdamp, mean diagonal of X^T X, n) -> ridge.
Ridge = Callable[[float, float, int], float]


def released_ridge(percdamp: float, mean_diagonal: float, tokens: int) -> float:
    """Ridge of the released code: `percdamp` times the mean diagonal of X^T X, per 128 samples of 128 tokens."""
    return percdamp * mean_diagonal / (tokens / RELEASED_RIDGE_TOKENS)


def paper_ridge(percdamp: float, mean_diagonal: float, _tokens: int) -> float:
    """Ridge of the paper's Appendix A: `percdamp` times the mean diagonal of X^T X."""
    return percdamp * mean_diagonal


def ridge_of(moments: Moments, rule: Ridge, percdamp: float) -> float:
    """Ridge of a regression on the MLP's input, whose `diagonal("mlp_input")` the moments have."""
    return rule(percdamp, moments[diagonal("mlp_input")].mean().item(), moments.count)


@needs(
    total("mlp_input"),
    full("mlp_input"),
    total("mlp_output"),
    diagonal("mlp_output"),
    cross("mlp_input", "mlp_output"),
)
def dense_output_sums(moments: Moments) -> RegressionSums:
    """Regression of the dense MLP's output on its input: the released code's question, "how linear is it?" (D6)."""
    return RegressionSums(
        count=moments.count,
        x=moments.about_centre(total("mlp_input")),
        y=moments.about_centre(total("mlp_output")),
        xx=moments.about_centre(full("mlp_input")),
        xy=moments.about_centre(cross("mlp_input", "mlp_output")),
        yy=moments.about_centre(diagonal("mlp_output")),
        x_centre=moments.centre("mlp_input"),
        y_centre=moments.centre("mlp_output"),
    )


@needs(
    total("mlp_input"),
    full("mlp_input"),
    total("intermediate"),
    full("intermediate"),
    cross("mlp_input", "intermediate"),
)
def residual_sums(moments: Moments, channels: Tensor, change: Tensor) -> RegressionSums:
    """Regression of what pruning takes from the MLP's output on the MLP's input, without ever running the pruned MLP.

    With the columns of the down projection changed by dW the residual is E = H dW^T, H the intermediate activations, so
    that X^T E = (X^T H) dW^T, E sums to dW sum(H), its squares to diag(dW H^T H dW^T): all from moments of (X, H).

    Args:
        moments: of the statistics above.
        channels: (p,) indices of the columns that change.
        change: dW (D, p), float64.
    """
    crossed = moments.about_centre(cross("mlp_input", "intermediate"))
    squared = moments.about_centre(full("intermediate"))
    xy = change.new_zeros(len(crossed), len(change))
    yy = change.new_zeros(len(change))
    # In double precision a block of channels at a time: of a large model, all of them would take gigabytes.
    for block, columns in zip(channels.split(DOUBLE_BLOCK), change.split(DOUBLE_BLOCK, dim=1), strict=True):
        xy.addmm_(crossed[:, block].double(), columns.T)
        yy += ((change @ squared[:, block][channels].double()) * columns).sum(1)
    return RegressionSums(
        count=moments.count,
        x=moments.about_centre(total("mlp_input")),
        y=change @ moments.about_centre(total("intermediate"))[channels],
        xx=moments.about_centre(full("mlp_input")),
        xy=xy,
        yy=yy,
        x_centre=moments.centre("mlp_input"),
        y_centre=change @ moments.centre("intermediate")[channels],
    )


def residual_workspace(sizes: Sizes, removed: int) -> int:
    """Bytes that `residual_sums` takes where so many channels are removed: dW, X^T E, and a block of both products."""
    hidden = sizes.hidden_size
    block = min(DOUBLE_BLOCK, removed) * (DOUBLE * (hidden + 2 * removed) + SINGLE * sizes.intermediate_size)
    return DOUBLE * (hidden**2 + 2 * hidden * removed) + block


def fit_workspace(sizes: Sizes) -> int:
    """Bytes of a ridge regression on the MLP's input: Cholesky's factor, both sides, the solution, its eigenvectors."""
    return DOUBLE * 6 * sizes.hidden_size**2


# (sums, solution B) -> how much each output counts in the low-rank step (D,).
OutputWeights = Callable[[RegressionSums, Tensor], Tensor]


@contextmanager
def naming(percdamp: float) -> Iterator[None]:
    """Have the error of a singular regression name the flag that decides the ridge."""
    try:
        yield
    except SingularError as error:
        raise SingularError(f"--percdamp {percdamp:g} is too small for the calibration set") from error


def released_output_weights(sums: RegressionSums, solution: Tensor) -> Tensor:
    """Weights (D,) of the correction's outputs: well-explained outputs count, the others fade (D11).

    The released correlation divides a biased covariance by unbiased deviations, hence the factor (n - 1)/n (D7).
    """
    correlation = multiple_correlation(sums, solution) * (sums.count - 1) / sums.count
    return torch.sigmoid((correlation - correlation.mean()) / RELEASED_TEMPERATURE)


def equal_output_weights(_sums: RegressionSums, solution: Tensor) -> Tensor:
    """The paper's plain SVD: every output counts alike."""
    return torch.ones_like(solution[0])


def low_rank_correction(
    sums: RegressionSums, ridge: float, rank: int, output_weights: OutputWeights
) -> dict[str, Tensor]:
    """Factors of the ridge solution B: the best rank-r approximation of B diag(w), with diag(1/w) put back.

    Args:
        sums: of the residual on the MLP's input.
        ridge: strength of eq. 7's penalty.
        rank: r.
        output_weights: gives w (D,) from the sums and B.

    Returns:
        `correction.reduce.weight` (r, D) and `correction.expand.weight` (D, r).
    """
    solution = ridge_regression(sums, ridge)  # (D_in, D_out)
    weights = output_weights(sums, solution)
    weighted = solution.mul_(weights)  # in place: large models have no room for both
    directions = principal_components(weighted.T @ weighted, rank)  # (D_out, r)
    return {
        "correction.reduce.weight": (weighted @ directions).T,
        "correction.expand.weight": directions / weights[:, None],
    }


@dataclass(frozen=True)
class LowRankCorrection:
    """Repair of a thinned MLP: a low-rank map of its input beside it, where the shape has one (paper, eq. 7 to 11).

    Attributes:
        ridge: rule of the ridge.
        percdamp: strength of the ridge.
        output_weights: (sums, solution) -> weight of every output in the low-rank step.
    """

    ridge: Ridge
    percdamp: float
    output_weights: OutputWeights

    own_form = "corrections"

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Repair`."""
        return residual_sums.needs if shape.correction_rank else frozenset()

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Repair`; the fit comes when the sums that the residual needed are dropped."""
        if not shape.correction_rank:
            return 0
        dropped = sum(statistic.bytes(sizes) for statistic in residual_sums.needs)
        fit = SINGLE * sizes.hidden_size**2 + fit_workspace(sizes)
        return max(residual_workspace(sizes, sizes.intermediate_size - shape.intermediate_size), fit - dropped)

    def __call__(self, thinned: Thinned, layer: Layer, shape: LayerShape) -> Weights:
        """`correction.reduce.weight` and `correction.expand.weight`; raises SingularError for too small a ridge."""
        if not shape.correction_rank:
            return {}
        ridge = ridge_of(layer.moments, self.ridge, self.percdamp)
        sums = residual_sums(layer.moments, *thinned.lost())
        layer.drop(residual_sums.needs)  # the fit needs their room
        with naming(self.percdamp):
            return low_rank_correction(sums, ridge, shape.correction_rank, self.output_weights)
