"""Low-rank query and key projections.

Rotary embeddings stand between W_q and W_k, so each is factorised on its own (paper, Appendix A).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ..model.configuration_olica import LayerShape
from .linalg import low_rank_split
from .moments import DOUBLE, Statistic, diagonal
from .recipe import Layer, Weights
from .sizes import Sizes


@dataclass(frozen=True)
class LowRankQueryKey:
    """Stage: factors of `q_proj` and `k_proj`, weighted by the norms of their input's features (paper, eq. 12)."""

    about = "q_proj or k_proj"

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        return frozenset({diagonal("attention_input")})

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: the factors of q, then k's W, W C W^T, its eigenvectors and what finding them takes."""
        return DOUBLE * (2 * sizes.hidden_size * sizes.query_width + 4 * sizes.query_width**2)

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """`{q,k}_proj.{reduce,expand}.weight`, and the bias on `expand`, for each that the shape factorises."""
        factors: Weights = {}
        for name, rank in (("q_proj", shape.q_rank), ("k_proj", shape.k_rank)):
            if rank:
                moment = layer.moments[diagonal("attention_input")]
                factors |= low_rank_factors(name, getattr(layer.weights, name), moment, rank)
        return factors


def low_rank_factors(name: str, projection: nn.Linear, second_moment: Tensor, rank: int) -> Weights:
    """Weights of the rank-r pair that takes the place of a projection called `name`, and its bias.

    `second_moment` (in,) is the diagonal of the second moment of its input, up to a factor.
    """
    reduce, expand = low_rank_split(projection.weight, second_moment, rank)
    factors = {f"{name}.reduce.weight": reduce, f"{name}.expand.weight": expand}
    return factors if projection.bias is None else factors | {f"{name}.expand.bias": projection.bias}
