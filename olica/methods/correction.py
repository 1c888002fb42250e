"""Which MLPs to calibrate, and the low-rank linear correction of a pruned MLP.

n tokens, D hidden size, F intermediate channels, P pruned channels, r rank
"""

import torch
from torch import Tensor

from ..model.modeling_olica import Projections
from .linalg import DOUBLE_BLOCK, RegressionSums, multiple_correlation, principal_components, ridge_regression
from .moments import Moments, cross, diagonal, full, needs, total

# Steepness with which the released code turns correlations into weights of the correction's outputs (D11).
RELEASED_TEMPERATURE = 0.05
# The released code divides its ridge by (samples / 128)(tokens / 128), whatever the sums are taken over (D10).
RELEASED_RIDGE_SAMPLES = 128
RELEASED_RIDGE_SEQLEN = 128


def released_ridge(percdamp: float, mean_diagonal: float, samples: int, seqlen: int) -> float:
    """Ridge of the released code: `percdamp` times the mean diagonal of X^T X, per 128 samples of 128 tokens."""
    return percdamp * mean_diagonal / ((samples / RELEASED_RIDGE_SAMPLES) * (seqlen / RELEASED_RIDGE_SEQLEN))


def paper_ridge(percdamp: float, mean_diagonal: float, samples: int, seqlen: int) -> float:
    """Ridge of the paper's Appendix A: `percdamp` times the mean diagonal of X^T X."""
    return percdamp * mean_diagonal


@needs(
    total("mlp_input"),
    full("mlp_input"),
    total("mlp_output"),
    diagonal("mlp_output"),
    cross("mlp_input", "mlp_output"),
)
def dense_output_sums(layer: Projections, moments: Moments) -> RegressionSums:
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
def residual_sums(layer: Projections, moments: Moments, kept: Tensor) -> RegressionSums:
    """Regression of what pruning removes on the MLP's input, without ever running the pruned MLP.

    With the channels P gone the residual is E = H_P W_P^T, H the intermediate activations and W the down projection,
    so X^T E, its sums and its squares follow from the moments of (X, H).

    Args:
        layer: dense projections.
        moments: of the statistics above.
        kept: indices of the channels that stay.
    """
    staying = torch.zeros(layer.down_proj.in_features, dtype=torch.bool, device=kept.device)
    staying[kept] = True
    gone = (~staying).nonzero().flatten()
    weight = layer.down_proj.weight[:, gone].double()  # (D, P)
    crossed = moments.about_centre(cross("mlp_input", "intermediate"))
    squared = moments.about_centre(full("intermediate"))
    xy = weight.new_zeros(len(crossed), len(weight))
    yy = weight.new_zeros(len(weight))
    # In double precision a block of channels at a time: of a large model, all of them would take gigabytes.
    for channels, columns in zip(gone.split(DOUBLE_BLOCK), weight.split(DOUBLE_BLOCK, dim=1), strict=True):
        xy.addmm_(crossed[:, channels].double(), columns.T)
        yy += ((weight @ squared[:, channels][gone].double()) * columns).sum(1)
    return RegressionSums(
        count=moments.count,
        x=moments.about_centre(total("mlp_input")),
        y=weight @ moments.about_centre(total("intermediate"))[gone],
        xx=moments.about_centre(full("mlp_input")),
        xy=xy,
        yy=yy,
        x_centre=moments.centre("mlp_input"),
        y_centre=weight @ moments.centre("intermediate")[gone],
    )


def best_explained(correlations: list[float | None], number: int) -> list[int]:
    """Indices, ascending, of the `number` layers with the highest correlation; None: not to be calibrated."""
    eligible = [index for index, correlation in enumerate(correlations) if correlation is not None]
    return sorted(sorted(eligible, key=lambda i: correlations[i], reverse=True)[:number])


def released_output_weights(sums: RegressionSums, solution: Tensor) -> Tensor:
    """Weights (D,) of the correction's outputs: well-explained outputs count, the others fade (D11).

    The released correlation divides a biased covariance by unbiased deviations, hence the factor (n - 1)/n (D7).
    """
    correlation = multiple_correlation(sums, solution) * (sums.count - 1) / sums.count
    return torch.sigmoid((correlation - correlation.mean()) / RELEASED_TEMPERATURE)


def equal_output_weights(sums: RegressionSums, solution: Tensor) -> Tensor:
    """The paper's plain SVD: every output counts alike."""
    return torch.ones_like(solution[0])


def low_rank_correction(sums: RegressionSums, ridge: float, rank: int, output_weights) -> dict[str, Tensor]:
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
