"""Low-rank query and key projections.

Rotary embeddings stand between W_q and W_k, so each is factorised on its own (paper, Appendix A).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..model.configuration_olica import LayerShape
from .linalg import low_rank_split
from .moments import DOUBLE, Statistic, diagonal, full
from .recipe import Layer, Weights
from .refit import Refit
from .sizes import Sizes


@dataclass(frozen=True)
class LowRankQueryKey:
    """Stage: factors of `q_proj` and `k_proj`, their error weighted by their input.

    Attributes:
        moment: of the input, `diagonal` for the norms of its features (paper, eq. 12) or `full`.
    """

    moment: Callable[[str], Statistic] = diagonal

    about = "q_proj or k_proj"
    makes = "factors of q, k"
    own_form = makes

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        return frozenset({self.moment("attention_input")})

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`: the factors of q, then k's W, W C W^T, its eigenvectors and what finding them takes."""
        whole = sizes.hidden_size**2 if self.moment is full else 0
        return DOUBLE * (whole + 2 * sizes.hidden_size * sizes.query_width + 4 * sizes.query_width**2)

    def refitted(self, refit: Refit | None) -> "LowRankQueryKey":
        """See `Stage`; the factors are what is chosen."""
        return self

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """`{q,k}_proj.{reduce,expand}.weight`, and the bias on `expand`, for each that the shape factorises."""
        factors: Weights = {}
        for name, rank in (("q_proj", shape.q_rank), ("k_proj", shape.k_rank)):
            if rank:
                moment = layer.moments[self.moment("attention_input")]
                factors |= low_rank_factors(name, getattr(layer.weights, name), moment, rank)
        return factors


def low_rank_factors(name: str, projection: nn.Linear, second_moment: Tensor, rank: int) -> Weights:
    """Weights of the rank-r pair that takes the place of a projection called `name`, and its bias.

    `second_moment` is that of its input, up to a factor: its diagonal (in,) or the whole of it (in, in).
    """
    reduce, expand = low_rank_split(projection.weight, second_moment, rank)
    factors = {f"{name}.reduce.weight": reduce, f"{name}.expand.weight": expand}
    return factors if projection.bias is None else factors | {f"{name}.expand.bias": projection.bias}
