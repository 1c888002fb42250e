"""Refits of a thinned map, and the error that they leave.

A map W (O, f) of an input x with second moment C = E[x x^T] keeps the columns K and loses the columns P. Least squares
finds the best columns for what stays; one Cholesky factor gives the error of that for every number of columns.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .linalg import SingularError
from .moments import DOUBLE


class Refit(Protocol):
    """What the columns of a map that stay become when the others go."""

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """Bytes that a call takes beside its arguments."""

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """W' (O, k) for W (O, f), the indices (k,) of what stays and the second moment C (f, f) of the input."""


def with_ridge(moment: Tensor, ridge: float) -> Tensor:
    """C + ridge c I (..., f, f), float64, c the mean diagonal of C: positive definite, even where C is zero."""
    regular = moment.to(torch.float64, copy=True)
    diagonal = regular.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal += ridge * torch.where(mean > 0, mean, 1.0)
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


@dataclass(frozen=True)
class LeastSquares:
    """Refit: W' minimises E||W x - W' x_K||^2 + ridge c ||W' - W_K||^2, c the mean diagonal of C_KK.

    The ridge draws towards the columns as they were: W' = W_K + W_P C_PK (C_KK + ridge c I)^-1.

    Attributes:
        ridge: its strength, above 0.
    """

    ridge: float

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """See `Refit`: C_KK and its factor; W_P, its product with C, and what is kept of that."""
        return DOUBLE * (2 * kept**2 + 3 * outputs * features)

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """See `Refit`; float64.

        Raises:
            SingularError: the ridge is too small.
        """
        gone = dense.double().index_fill(1, kept, 0.0)  # W_P, zeros in place of W_K
        explained = (gone @ moment.double())[:, kept]  # W_P C_PK
        del gone
        factor, fault = torch.linalg.cholesky_ex(with_ridge(moment[kept[:, None], kept], self.ridge))
        if fault:
            raise SingularError(
                f"--ridge {self.ridge:g} is too small for the calibration set", "the features that stay"
            )
        return dense[:, kept].double() + torch.cholesky_solve(explained.T, factor).T
