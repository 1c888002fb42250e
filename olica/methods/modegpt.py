"""MoDeGPT (Lin et al., ICLR 2025): matrices that follow each other are decomposed together.

An MLP keeps the channels with the highest ridge leverage scores, and `down_proj` becomes the Nystrom approximation;
value and output projections become the SVD of their product, weighted by the input. Layers that change their input
little lose more. Queries and keys stay dense: the paper selects their rotary pairs, for which a checkpoint has no
sizes. D hidden size, H query heads, K key/value heads, d head width, F intermediate channels, L layers
"""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from ..checks import check_above_zero
from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from .feed_forward import ThinnedMLP
from .linalg import principal_components
from .moments import DOUBLE, Needing, full, needs
from .ratios import scaled
from .recipe import Allocate, Findings, Layer, Method
from .refit import factor_of, mean_diagonal, solve_workspace, with_ridge
from .rounding import rounded
from .similarity import CosineSurvey, cosines_of, softmax_ratios
from .sizes import Budget, Sizes
from .units import channel_parameters
from .value_output import Directions, NarrowedHeads, in_order, singular_directions


@dataclass(frozen=True)
class ModegptParameters:
    """What MoDeGPT leaves open."""

    epsilon: float = field(default=0.1, metadata={"help": "the larger, the more alike are the layers' ratios, above 0"})
    leverage_ridge: float = field(
        default=0.01, metadata={"help": "ridge of the leverage scores, in mean diagonals of H^T H, above 0"}
    )
    nystrom_ridge: float = field(
        default=1e-4, metadata={"help": "ridge of the Nystrom approximation, in mean diagonals, at least 0"}
    )

    def __post_init__(self) -> None:
        for name in ("epsilon", "leverage_ridge"):
            check_above_zero(name, getattr(self, name))
        if not 0 <= self.nystrom_ridge < inf:
            raise UsageError(f"--nystrom_ridge {self.nystrom_ridge:g} must be a number, at least 0")


def ridge_leverage(ridge: float) -> Needing[[Layer], Tensor]:
    """Scores (F,) of the channels: the diagonal of C (C + r I)^-1, C = H^T H, r = ridge x the mean diagonal of C."""

    # C, C with the ridge and its factor; then the factor and the inverse.
    @needs(full("intermediate"), workspace=lambda sizes: DOUBLE * 3 * sizes.intermediate_size**2)
    def scores(layer: Layer) -> Tensor:
        moment = layer.moments[full("intermediate")]
        scale, regular = mean_diagonal(moment), with_ridge(moment, ridge)
        del moment  # as large as what follows
        factor = factor_of(regular, ridge, "leverage_ridge", "all channels")
        del regular
        # C (C + r I)^-1 = I - r (C + r I)^-1
        return 1 - ridge * scale * torch.cholesky_inverse(factor).diagonal()

    return scores


@dataclass(frozen=True)
class Nystrom:
    """Refit: W' = W C S (S^T C S + r I)^-1, S the selection of what stays, r = ridge x the mean diagonal of S^T C S.

    Without a ridge that is least squares. The ridge draws towards zero, not towards the columns as they were.
    """

    ridge: float

    is_centred = False

    def workspace(self, outputs: int, features: int, kept: int) -> int:
        """See `Refit`."""
        return solve_workspace(outputs, features, kept)

    def __call__(self, dense: Tensor, kept: Tensor, moment: Tensor) -> Tensor:
        """See `Refit`; float64.

        Raises:
            SingularError: the ridge is too small.
        """
        explained = (dense.double() @ moment.double())[:, kept]
        regular = with_ridge(moment[kept[:, None], kept], self.ridge)
        factor = factor_of(regular, self.ridge, "nystrom_ridge", "the channels that stay")
        return torch.cholesky_solve(explained.T, factor).T


@needs(full("attention_input"))
def input_directions(layer: Layer) -> Directions:
    """Singular vectors of C^1/2 W_v W_o (D, G D) in the paper's orientation, C = X^T X of the attention's input.

    In ours the product is W_o W_v C^1/2, and U are the eigenvectors of R W_v C W_v^T R^T (d, d): neither a root nor an
    inverse of C is needed.
    """
    moment = layer.moments[full("attention_input")].double()

    def left_vectors(factor: Tensor, value: Tensor) -> Tensor:
        return principal_components(factor @ (value @ moment @ value.mT) @ factor.mT)

    return singular_directions(layer, left_vectors)


@dataclass(frozen=True)
class SoftmaxRatios(Allocate):
    """An allocation by one ratio for every layer, which its value heads and its MLP lose alike.

    The ratios are scaled until they meet the budget; of a value head at least one direction stays, of an MLP one
    channel. The channels take up what rounding a head's width moves, and what the layers before owe.

    Attributes:
        epsilon: how far ratios differ.
    """

    epsilon: float

    def before_survey(self, sizes: list[Sizes], budget: Budget) -> None:
        """See `Allocate`."""
        costs = torch.tensor([_prunable(layer) for layer in sizes], dtype=torch.float64)
        if budget.to_remove > (self._caps(sizes, budget) * costs).sum():
            raise ValueError(
                "the value and output projections and the MLPs have too few parameters for it: queries and keys stay"
            )

    def __call__(self, sizes: list[Sizes], budget: Budget, findings: list[Findings]) -> list[LayerShape]:
        """See `Allocate`."""
        costs = torch.tensor([_prunable(layer) for layer in sizes], dtype=torch.float64)
        # BI = 1 - c, the block influence: softmax(-BI / epsilon) = softmax(c / epsilon).
        relative = softmax_ratios(cosines_of(findings), len(sizes), 1 / self.epsilon)
        ratios = scaled(relative, costs, self._caps(sizes, budget), budget.to_remove)
        shapes, owed = [], 0.0
        for layer, ratio in zip(sizes, ratios.tolist(), strict=True):
            width = rounded((1 - ratio) * layer.head_dim, budget.round_to, layer.head_dim)
            wanted = (1 - ratio) * _prunable(layer) + owed - width * _direction_parameters(layer)
            channels = rounded(wanted / channel_parameters(layer), budget.round_to, layer.intermediate_size)
            owed = wanted - channels * channel_parameters(layer)
            shapes.append(LayerShape(0, 0, width, channels))
        return shapes

    @staticmethod
    def _caps(sizes: list[Sizes], budget: Budget) -> Tensor:
        """The largest ratios (L,)."""
        left = [
            min(budget.round_to, layer.head_dim) * _direction_parameters(layer)
            + min(budget.round_to, layer.intermediate_size) * channel_parameters(layer)
            for layer in sizes
        ]
        return torch.tensor(
            [1 - least / _prunable(layer) for layer, least in zip(sizes, left, strict=True)], dtype=torch.float64
        )


def _prunable(layer: Sizes) -> int:
    """Weights of a layer's value and output projections and of its MLP."""
    return layer.value_output + layer.feed_forward


def _direction_parameters(layer: Sizes) -> int:
    """Weights that go with a direction of all value heads."""
    return layer.hidden_size * (layer.num_heads + layer.num_kv_heads)


def modegpt(parameters: ModegptParameters) -> Method:
    """The method; the MLP is measured behind the pruned attention."""
    heads = NarrowedHeads(input_directions, in_order, rotates_whole=False)
    mlp = ThinnedMLP(ridge_leverage(parameters.leverage_ridge), refit=Nystrom(parameters.nystrom_ridge))
    return Method("pruned", CosineSurvey(), SoftmaxRatios(parameters.epsilon), ((heads,), (mlp,)))
