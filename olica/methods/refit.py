"""Refits of a thinned map, and the error that they leave.

A map W (O, f) of an input x with second moment C = E[x x^T], up to a common factor, keeps the columns K and loses the
columns P. Least squares finds the best columns for what stays; one Cholesky factor gives the error of that, up to the
same factor, for every number of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .linalg import DOUBLE_BLOCK, SingularError, by_rows
from .moments import DOUBLE, Moments, full

# The slope of an output that it takes to say that its prediction does not vary, see `ScaledOutputs`.
STEEPEST = 1e3


class Refit(Protocol):
    """What the columns of a map that stay become when the others go.

    Attributes:
        is_centred: whether it fits what varies, the means being left to a bias: then its moment is about the mean.
    """

    is_centred: bool

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """Bytes that a call takes beside its arguments."""

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """W' (O, k) for W (O, f), the indices (k,) of what stays and the second moment C (f, f) of the input."""


def with_moment(refit: Refit | None, moments: Moments, tap: str) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The refit of what reads `tap`, given the second moment about zero or about the mean, whichever it wants."""
    if refit is None:
        return None
    return partial(refit, moment=moments.about_mean(tap) if refit.is_centred else moments[full(tap)])


def mean_diagonal(moment: Tensor) -> Tensor:
    """Mean diagonal (..., 1) of C (..., f, f), float64; 1 where C is zero."""
    mean = moment.diagonal(dim1=-2, dim2=-1).double().mean(-1, keepdim=True)
    return torch.where(mean > 0, mean, 1.0)


def with_ridge(moment: Tensor, ridge: float, scale: Tensor | None = None) -> Tensor:
    """C + ridge c I (..., f, f), float64: positive definite, even where C is zero.

    `scale` is c (..., 1); left out, the mean diagonal of C.
    """
    regular = moment.to(torch.float64, copy=True)
    diagonal = regular.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * (mean_diagonal(moment) if scale is None else scale)
    return regular


def refit_errors(weight: Tensor, moment: Tensor) -> Tensor:
    """Error of W with a least-squares refit when its first k columns stay, for every k.

    With C = L L^T, what the columns from k on add to the output beyond all that the first k can express is that of
    inputs with the second moment L_PP L_PP^T: the error is sum_{j >= k} ||sum_{i >= j} L_ij w_i||^2, w_i the columns.

    Args:
        weight: W (..., O, f), its columns in the order in which they would stay.
        moment: C (..., f, f) in the same order, positive definite.

    Returns:
        (..., f + 1) errors E||W x - W' x_K||^2 for k = 0 to f, float64; the last is 0.
    """
    added = (weight.double() @ torch.linalg.cholesky(moment.double())).square().sum(-2)  # (..., f)
    return torch.cat([added.flip(-1).cumsum(-1).flip(-1), torch.zeros_like(added[..., :1])], dim=-1)


def factor_of(regular: Tensor, ridge: float, flag: str, inputs: str) -> Tensor:
    """Cholesky's factor of a second moment with the ridge that `flag` gives, of `inputs` in words.

    Raises:
        SingularError: the ridge is too small.
    """
    factor, fault = torch.linalg.cholesky_ex(regular)
    if fault:
        raise SingularError(f"--{flag} {ridge:g} is too small for the calibration set", inputs)
    return factor


def solve_workspace(outputs: int, features: int, kept: int) -> int:
    """Bytes of a fit of W (O, f) on k of its features: C_KK and its factor; W, W C, and what is kept of that."""
    return DOUBLE * (2 * kept**2 + 3 * outputs * features)


@dataclass(frozen=True)
class LeastSquares:
    """Refit: W' minimises E||W x - W' x_K||^2 + ridge c ||W' - W_K||^2, c the mean diagonal of C_KK.

    The ridge draws towards the columns as they were: W' = W_K + W_P C_PK (C_KK + ridge c I)^-1.

    Attributes:
        ridge: its strength, above 0.
        of_all: whether c is the mean diagonal of C instead, that of all features.
        flag: of the ridge, for messages.
    """

    ridge: float
    of_all: bool = False
    flag: str = "ridge"

    is_centred = False

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """See `Refit`."""
        return solve_workspace(outputs, features, kept)

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """See `Refit`; float64.

        Raises:
            SingularError: the ridge is too small.
        """
        gone = dense.double().index_fill(1, kept, 0.0)  # W_P, zeros in place of W_K
        explained = (gone @ moment.double())[:, kept]  # W_P C_PK
        del gone
        scale = mean_diagonal(moment) if self.of_all else None
        regular = with_ridge(moment[kept[:, None], kept], self.ridge, scale)
        factor = factor_of(regular, self.ridge, self.flag, "the features that stay")
        return dense[:, kept].double() + torch.cholesky_solve(explained.T, factor).T


@dataclass(frozen=True)
class ScaledOutputs:
    """Refit: every output is its own regression on what is left of it, y_i ~ a_i y'_i + b_i; row i of W_K is a_i w_i.

    The slope is a_i = Cov(y_i, y'_i) / Var(y'_i); the intercept b_i is what `RemovedMean` gives to a bias. A row whose
    y'_i does not vary stays as it is. Since a_i^2 Var(y'_i) is at most Var(y_i), a slope above 1000 says that what
    varies of y'_i is less than a millionth of y_i's variance, which sums in single precision do not tell from zero.
    """

    is_centred = True

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """See `Refit`: a block of W_K among zeros, its product with C and that with W; W' and W_K."""
        return DOUBLE * (4 * min(DOUBLE_BLOCK, outputs) * features + 2 * outputs * kept)

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """See `Refit`; float64."""
        stays = torch.zeros(dense.shape[1], dtype=torch.float64, device=dense.device).index_fill(0, kept, 1.0)

        def slopes(rows: Tensor) -> Tensor:
            left = rows * stays
            explained = left @ moment  # w'_i C
            covariance, variance = ((explained * other).sum(1) for other in (rows, left))
            return torch.where(STEEPEST * variance > covariance.abs(), covariance / variance, 1.0)

        return by_rows(slopes, dense)[:, None] * dense[:, kept].double()
