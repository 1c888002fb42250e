"""Selection by the error that a least-squares refit leaves: units go, and come back, while the rest makes up for them.

A map W (O, f) reads f features. With H = C + lambda I, C the second moment of what it reads, the columns S that stay
become W' = argmin tr (W - W') H (W - W')^T, W' zero on the others: the Optimal Brain Surgeon of structures. That is
E||W x - W' x||^2 + lambda ||W' - W||^2, so W'_S = W_S + W_P C_PS (C_SS + lambda I)^-1: the equation of
`refit.LeastSquares` with lambda as its ridge. Its c is the mean diagonal of C_SS; that of H, of C: hence `of_all`.

    O output features, f input features, n units of u features each: f = n u
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .feed_forward import ThinnedMLP
from .heads import RemovedGroups
from .linalg import SingularError
from .moments import DOUBLE, Statistic, full, tap_width
from .recipe import Layer, Stage
from .refit import LeastSquares, with_ridge
from .sizes import Sizes
from .thinning import Selection

# Units of one feature that go at once: this share of those that are still to go, or a few.
GROUP_SHARE, SMALLEST_GROUP = 1 / 16, 8
# Relative to what an exchange costs, a gain of less may be rounding alone.
LEAST_GAIN = 1e-9


class LeastSquaresTable:
    """The least-squares problem of a map for the units S that stay, from which units go and to which they come.

    What is kept is the matrix [[-A, N, W'], [N^T, Q, R]] (f, f + O), rows and columns of S in front, where
    A = H_SS^-1, N = A H_SP, Q = H_PP - H_PS N, and R (p, O) are the rows P of H (W - W')^T. A unit that goes or comes
    is one pivot on its block, of O(f (f + O) u), in place.

    Attributes:
        staying: (n,) whether a unit is in S; all are at first.
    """

    def __init__(self, weight: Tensor, regular: Tensor, width: int):
        """The problem of W (O, f) and H (f, f), float64, whose units have `width` features.

        Raises:
            SingularError: H is not positive definite.
        """
        features = len(regular)
        inverse = torch.cholesky_inverse(_cholesky(regular))
        self._matrix = inverse.new_empty(features, features + len(weight))
        self._matrix[:, :features] = inverse.neg_()
        self._matrix[:, features:] = weight.T
        self._features = torch.arange(features, device=inverse.device).unflatten(0, (-1, width))  # (n, u)
        self.staying = torch.ones(len(self._features), dtype=torch.bool, device=inverse.device)

    def changes(self) -> Tensor:
        """By how much the error changes (n,) if a unit of S goes, or one of P comes: both not negative.

        tr w_G [H^-1_GG]^-1 w_G^T of what goes, w the columns as they are now; tr R_G^T Q_GG^-1 R_G of what comes.
        """
        blocks = self._matrix[self._features[:, :, None], self._features[:, None]]  # (n, u, u)
        rows = self._solution.unflatten(0, self._features.shape)  # (n, u, O)
        factors = _cholesky(torch.where(self.staying[:, None, None], -blocks, blocks))
        return torch.cholesky_solve(rows @ rows.mT, factors).diagonal(dim1=-2, dim2=-1).sum(-1)

    def pivot(self, units: Tensor) -> float:
        """Have `units` (m,), all of S or all of P, change sides; by how much the error changes, not negative.

        With M the matrix and G the features of the units, M becomes M - M_:G M_GG^-1 M_G:, and of the block itself
        M_G: becomes s M_GG^-1 M_G:, M_:G (of the left f columns) its transpose and M_GG -M_GG^-1, where s is -1 for
        units that go and 1 for those that come.
        """
        rows = self._features[units].flatten()
        sign = -1.0 if self.staying[units[0]] else 1.0
        columns = self._matrix[:, rows]
        factor = _cholesky(sign * columns[rows])
        solved = torch.cholesky_solve(sign * self._matrix[rows], factor)
        features = len(self._matrix)
        change = sign * (self._matrix[rows, features:] * solved[:, features:]).sum()
        self._matrix.addmm_(columns, solved, alpha=-1)
        solved *= sign
        self._matrix[rows] = solved
        self._matrix[:, rows] = solved[:, :features].T
        self._matrix[rows[:, None], rows] = -sign * torch.cholesky_inverse(factor)
        self.staying[units] = ~self.staying[units]
        return float(change)

    @property
    def weight(self) -> Tensor:
        """W' (O, k), the columns of the k features that stay."""
        return self._solution[self._features[self.staying].flatten()].T

    @property
    def _solution(self) -> Tensor:
        return self._matrix[:, len(self._matrix) :]


def _cholesky(matrices: Tensor) -> Tensor:
    factors, faults = torch.linalg.cholesky_ex(matrices)
    if faults.any():
        raise SingularError("H is not positive definite")
    return factors


def remove(table: LeastSquaresTable, kept: int, smallest: int, share: float = 0.0) -> float:
    """Remove the units that cost least until `kept` are left; the error that this adds.

    `share` of those still to go, or `smallest` units, go at once, and all others are updated before the next.
    """
    error = 0.0
    while left := int(table.staying.sum()) - kept:
        group = min(left, max(smallest, int(share * left)))
        costs = table.changes().masked_fill(~table.staying, torch.inf)
        error += table.pivot(costs.argsort(stable=True)[:group])
    return error


def exchange(table: LeastSquaresTable, rounds: int) -> float:
    """Local search: the units that cost least go, and as many that gain most come, while the error falls.

    A sixteenth of those that went are exchanged at a time, half as many once that does not help, one at last.

    Returns:
        by how much the error fell.
    """
    gone = int((~table.staying).sum())
    size = min(max(1, int(GROUP_SHARE * gone)), len(table.staying) - gone, gone)
    fell = 0.0
    while size and rounds:
        rounds -= 1
        costs = table.changes().masked_fill(~table.staying, torch.inf)
        out = costs.argsort(stable=True)[:size]
        cost = table.pivot(out)
        gains = table.changes().masked_fill(table.staying, -torch.inf)
        back = gains.argsort(stable=True, descending=True)[:size]
        gain = table.pivot(back)
        if gain > (1 + LEAST_GAIN) * cost:
            fell += gain - cost
        else:  # as it was
            table.pivot(back)
            table.pivot(out)
            size //= 2
    return fell


@dataclass(frozen=True)
class LeastError(Selection):
    """Selection: units whose removal a refit makes up for best go, one after the other; then units are exchanged.

    Attributes:
        projection: what reads them, "o_proj" (its units are key/value heads with their query heads) or "down_proj".
        tap: its input.
        damping: lambda in mean diagonals of C, above 0.
        rounds: the most exchanges; 0 for none.
    """

    projection: str
    tap: str
    damping: float
    rounds: int = 0

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        """See `Selection`."""
        return frozenset({full(self.tap)})

    @property
    def refit(self) -> LeastSquares:
        """The refit whose error is compared."""
        return LeastSquares(self.damping, of_all=True, flag="damping")

    def workspace(self, sizes: Sizes) -> int:
        """See `Selection`: H, its inverse and the table; the columns W' as products read them."""
        features = tap_width(self.tap, sizes)
        return DOUBLE * (3 * features**2 + 3 * features * sizes.hidden_size)

    def __call__(self, layer: Layer, kept: int) -> Tensor:
        """See `Selection`.

        Raises:
            SingularError: the damping is too small.
        """
        sizes = layer.sizes
        width = sizes.groups * sizes.head_dim if self.tap == "heads" else 1
        try:
            regular = with_ridge(layer.moments[full(self.tap)], self.damping)
            table = LeastSquaresTable(getattr(layer.weights, self.projection).weight, regular, width)
            del regular
            if width == 1:
                remove(table, kept, SMALLEST_GROUP, GROUP_SHARE)
            else:
                remove(table, kept, smallest=1)
            exchange(table, self.rounds)
        except SingularError as error:
            raise SingularError(
                f"--damping {self.damping:g} is too small for the calibration set", f"the input of {self.projection}"
            ) from error
        return table.staying.nonzero().flatten()


def passes(damping: float, rounds: int = 0) -> tuple[tuple[Stage, ...], ...]:
    """The heads, then the channels behind what is left of them, by `LeastError` and refitted."""
    heads = LeastError("o_proj", "heads", damping, rounds)
    channels = LeastError("down_proj", "intermediate", damping, rounds)
    return (RemovedGroups(heads, heads.refit),), (ThinnedMLP(channels, refit=channels.refit),)
