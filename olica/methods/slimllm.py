"""SlimLLM (Guo et al., ICML 2025), arXiv:2505.22689: all of it from moments.

Layers that keep the direction of what they read lose most; heads go that the others stand for, and channels that add
little to the principal directions of the MLP's output; every output is then regressed on what is left of it.

    D hidden size, K key/value heads, H query heads, d head width, F channels
"""

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from ..errors import UsageError
from .feed_forward import ThinnedMLP, channel_norms, mean_channels
from .heads import RemovedGroups, mean_heads
from .linalg import by_rows
from .moments import DOUBLE, diagonal, full, needs
from .recipe import Layer, Method
from .redundancy import best_by_swaps, block_covariances, redundancy
from .refit import ScaledOutputs
from .similarity import BY_SPARSITY, CosineRatios, CosineSurvey
from .sizes import Sizes
from .thinning import RemovedMean, Selection, highest

# The hundredth of the channels with the lowest scores stays.
PROTECTED_FRACTION = 0.01


@dataclass(frozen=True)
class SlimParameters:
    """What SlimLLM leaves open; the initial ratio R of the paper follows from the budget."""

    pruned_layers: int = field(
        default=BY_SPARSITY,
        metadata={"help": "how many layers lose anything; -1: by the sparsity, 26 of 32 at 0.2, 30 at 0.5"},
    )
    alpha: float = field(
        default=float(BY_SPARSITY),
        metadata={"help": "how much more layers lose that change little, from 0; -1: by the sparsity, 10 at 0.2"},
    )

    def __post_init__(self) -> None:
        if self.pruned_layers != BY_SPARSITY and self.pruned_layers < 1:
            raise UsageError(f"--pruned_layers {self.pruned_layers}: give at least 1, or -1 for the paper's")
        if self.alpha != BY_SPARSITY and not 0 <= self.alpha < inf:
            raise UsageError(f"--alpha {self.alpha:g}: give a number from 0, or -1 for the paper's")


@dataclass(frozen=True)
class LeastRedundant(Selection):
    """Selection: the key/value heads that the others stand for least stay, some exchanged while that is better.

    The paper removes single query heads, of models whose heads are not grouped. Here those that read a key/value head
    go with it: nine query heads on three key/value heads are three units.
    """

    needs = frozenset({full("heads")})

    def workspace(self, sizes: Sizes) -> int:
        """See `Selection`; the moment, W, a product and its share of the covariances; these, and as much for swaps."""
        width, hidden = sizes.query_width, sizes.hidden_size
        return DOUBLE * (width**2 + 3 * width * hidden + 3 * hidden * sizes.num_kv_heads**2)

    def __call__(self, layer: Layer, kept: int) -> Tensor:
        """See `Selection`."""
        moment, weight = layer.moments.about_mean("heads"), layer.weights.o_proj.weight
        covariances = block_covariances(weight, moment, layer.sizes.num_kv_heads)
        return best_by_swaps(covariances, highest(-redundancy(covariances), kept))


# The covariance of the output, its eigenvectors, and what finding them takes.
@needs(
    diagonal("mlp_input"),
    diagonal("intermediate"),
    full("mlp_output"),
    workspace=lambda sizes: DOUBLE * 6 * sizes.hidden_size**2,
)
def principal_importance(layer: Layer) -> Tensor:
    """Importance (F,): Wanda's norms of gate row and up row, and of the down column in a metric of the MLP's output.

    The metric weights the eigenvectors v of the output's covariance by sigmoid(l / mean l), l the eigenvalues.
    """
    values, vectors = torch.linalg.eigh(layer.moments.about_mean("mlp_output"))
    mean = values.mean()
    weighted = vectors * torch.where(mean > 0, values / mean, 0.0).sigmoid()  # (D, D), a direction per column
    down = layer.weights.down_proj.weight
    from_gate, from_up, from_down = channel_norms(
        layer, by_rows(lambda columns: (columns @ weighted).square().sum(1), down.T)
    )
    return from_gate + from_up + from_down


def slimllm(parameters: SlimParameters) -> Method:
    """The method; the MLP is measured behind the pruned attention."""
    heads = RemovedGroups(LeastRedundant(), ScaledOutputs(), (RemovedMean("o_proj", mean_heads),))
    mlp = ThinnedMLP(
        principal_importance, PROTECTED_FRACTION, ScaledOutputs(), (RemovedMean("down_proj", mean_channels),)
    )
    return Method(
        "pruned",
        CosineSurvey(),
        CosineRatios(parameters.pruned_layers, parameters.alpha, biases=True),
        ((heads,), (mlp,)),
    )
