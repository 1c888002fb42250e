"""The linear algebra of the method: tensors in, tensors out, float64 throughout.

Everything is a function of weights and of sums over tokens, so no activation is ever needed here.

    n tokens, D input features, O output features, r rank
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the squares that they come from, variances below this are what rounding in float64 leaves of zero.
ROUNDING = 1e-13
# Rows, or products, of a wide matrix that are in double precision at a time.
DOUBLE_BLOCK = 1024


class SingularError(ArithmeticError):
    """A regression whose matrix is singular.

    Attributes:
        inputs: what it is a regression on, in words.
    """

    def __init__(self, message: str, inputs: str = "the MLP's input (that of gate_proj)"):
        """See above; the message says which flag is too small."""
        super().__init__(message)
        self.inputs = inputs


def by_rows(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """What `function` makes of every row of a matrix, in double precision; one block of rows at a time is that wide."""
    return torch.cat([function(rows.double()) for rows in matrix.split(DOUBLE_BLOCK)])


def squared_norms(matrix: Tensor) -> Tensor:
    """||w_i||^2 of the rows (n,) of a matrix (n, m)."""
    return by_rows(lambda rows: rows.square().sum(1), matrix)


def diagonal_blocks(matrix: Tensor, width: int) -> Tensor:
    """The blocks (n, width, width) on the diagonal of a matrix (n width, n width)."""
    blocks = matrix.unflatten(1, (-1, width)).unflatten(0, (-1, width))  # (n, width, n, width)
    return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)


def principal_components(gram: Tensor, rank: int | None = None) -> Tensor:
    """Eigenvectors (n, rank) of a symmetric positive semidefinite matrix (n, n), largest eigenvalue first."""
    vectors = torch.linalg.eigh(gram.double()).eigenvectors
    smallest = 0 if rank is None else vectors.shape[-1] - rank
    return vectors[..., smallest:].flip(-1)  # a copy, which does not hold the others


def low_rank_split(weight: Tensor, second_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of a projection, its error weighted by the second moment of its input (paper, eq. 12).

    The minimiser of ||(W - expand reduce) D||_F with D D^T = C is U_r U_r^T W, U_r the leading eigenvectors of
    W C W^T: the principal components of the projection's output. No norm is divided by, so a feature that is always
    zero does no harm.

    Args:
        weight: W (O, D).
        second_moment: diagonal (D,) of C or the whole of it (D, D), up to a common factor.
        rank: r, at most min(O, D).

    Returns:
        reduce (r, D) and expand (O, r).
    """
    weight, second_moment = weight.double(), second_moment.double()
    weighted = weight * second_moment if second_moment.ndim == 1 else weight @ second_moment
    output_moment = weighted @ weight.T
    del weighted  # large beside the eigenproblem
    expand = principal_components(output_moment, rank)
    return expand.T @ weight, expand


@dataclass
class RegressionSums:
    """What a linear regression of Y (n, O) on X (n, D) needs, as sums over the n tokens about any centre of each.

    Attributes:
        count: n.
        x: sum of the rows of X - a (D,).
        y: sum of the rows of Y - b (O,).
        xx: (X - a)^T (X - a) (D, D).
        xy: (X - a)^T (Y - b) (D, O).
        yy: diagonal of (Y - b)^T (Y - b) (O,).
        x_centre: a (D,).
        y_centre: b (O,).
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    x_centre: Tensor
    y_centre: Tensor


def about_zero(xy: Tensor, x: Tensor, y: Tensor, x_centre: Tensor, y_centre: Tensor, count: int) -> Tensor:
    """Sum of x y^T (f, g), in double precision, from sums about centres: `xy`, `x` (f,) and `y` (g,) over `count`."""
    return torch.outer(x_centre, y).addr_(x + count * x_centre, y_centre).add_(xy)


def ridge_regression(sums: RegressionSums, ridge: float) -> Tensor:
    """Solution B (D, O) of min ||Y - X B||^2 + ridge ||B||^2 (paper, eq. 7); no intercept.

    Raises:
        SingularError: X^T X + ridge I is not positive definite (a ridge of 0 and too few tokens).
    """
    x, y, a, b = (vector.double() for vector in (sums.x, sums.y, sums.x_centre, sums.y_centre))
    regularised = about_zero(sums.xx, x, x, a, a, sums.count)
    regularised.diagonal().add_(ridge)
    factor, fault = torch.linalg.cholesky_ex(regularised)
    if fault:
        raise SingularError("X^T X + ridge I is not positive definite")
    del regularised  # as large as what follows
    return torch.cholesky_solve(about_zero(sums.xy, x, y, a, b, sums.count), factor)


def multiple_correlation(sums: RegressionSums, solution: Tensor) -> Tensor:
    """Pearson correlation (O,) between each column of Y and its prediction X B (paper, eq. 10).

    A column that does not vary by more than rounding, or whose prediction does not, has correlation 0.
    """
    n, solution = sums.count, solution.double()
    x_mean, y_mean = sums.x.double() / n, sums.y.double() / n
    predicted_mean = x_mean @ solution
    # The means are those about the centres, so what is subtracted is small.
    predicted_variance = (solution * (sums.xx.double() @ solution)).sum(0) / n - predicted_mean.square()
    variance = sums.yy.double() / n - y_mean.square()
    covariance = (solution * sums.xy).sum(0) / n - predicted_mean * y_mean
    scale = (predicted_variance.clamp(min=0) * variance.clamp(min=0)).sqrt()
    return torch.where(scale > ROUNDING * sums.yy / n, covariance / scale, 0.0).clamp(-1, 1)
