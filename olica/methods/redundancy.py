"""Redundancy of units that add up to an output: how well the others stand for all, by Pearson's correlation.

A map W (D, f) reads K units of equal width side by side. With O_g what unit g adds to the outputs and T their sum, a
set of units is as good as the sum over the outputs of |Pearson(T_i, sum of its O_gi)|. All variances and covariances
follow from those of the units in pairs, Cov(O_gi, O_hi) = w_ig C_gh w_ih^T, C the covariance of what W reads.

    D outputs, K units, k of them kept, p = K - k gone
"""

import torch
from torch import Tensor

from .thinning import others

# A swap has to improve by this share at least: less may be rounding, for which the search would never end.
LEAST_GAIN = 1e-9


def block_covariances(weight: Tensor, covariance: Tensor, units: int) -> Tensor:
    """Cov(O_gi, O_hi) (D, K, K) of all outputs i and pairs of units, float64.

    Args:
        weight: W (D, f).
        covariance: C (f, f) up to a common factor, which the result has too.
        units: K.
    """
    weight = weight.double()
    found = [
        ((part @ rows) * weight).unflatten(1, (units, -1)).sum(2)
        for part, rows in zip(weight.chunk(units, dim=1), covariance.double().chunk(units), strict=True)
    ]
    return torch.stack(found, dim=1)


def _correlation(shared: Tensor, own: Tensor, whole: Tensor) -> Tensor:
    """Sums (...) over the outputs of |Pearson(T, S)|, 0 where one is constant; Cov(T, S), Var(S), Var(T): (D, ...)."""
    scale = (own.clamp(min=0) * whole.clamp(min=0)).sqrt()
    return torch.where(scale > 0, shared / scale, 0.0).abs().clamp(max=1).sum(0)


def redundancy(covariances: Tensor) -> Tensor:
    """Sums (K,) over the outputs of |Pearson(T_i, T_i - O_gi)|, of the covariances (D, K, K) of pairs of units."""
    with_whole = covariances.sum(2)  # Cov(O_g, T) (D, K)
    whole = with_whole.sum(1, keepdim=True)
    own = covariances.diagonal(dim1=1, dim2=2)
    return _correlation(whole - with_whole, whole - 2 * with_whole + own, whole)


def best_by_swaps(covariances: Tensor, kept: Tensor) -> Tensor:
    """The units that stay after a greedy search: the best swap of one kept and one gone unit, until none improves.

    Args:
        covariances: (D, K, K) of pairs of units.
        kept: (k,) indices of the units that it begins with.

    Returns:
        (k,) indices, ascending.
    """
    with_whole, own = covariances.sum(2), covariances.diagonal(dim1=1, dim2=2)  # (D, K)
    whole = with_whole.sum(1)
    while True:
        gone = others(kept, covariances.shape[-1])
        with_kept = covariances[:, :, kept].sum(2)
        shared, variance = with_whole[:, kept].sum(1), with_kept[:, kept].sum(1)
        leaving = (own - 2 * with_kept)[:, kept, None]
        coming = (own + 2 * with_kept)[:, None, gone] - 2 * covariances[:, kept[:, None], gone]
        swapped = _correlation(
            shared[:, None, None] - with_whole[:, kept, None] + with_whole[:, None, gone],
            variance[:, None, None] + leaving + coming,
            whole[:, None, None],
        )  # (k, p)
        if not swapped.numel() or swapped.max() <= (1 + LEAST_GAIN) * _correlation(shared, variance, whole):
            return kept.sort().values
        out, into = divmod(int(swapped.argmax()), len(gone))
        kept = torch.cat([kept[:out], kept[out + 1 :], gone[into : into + 1]])
