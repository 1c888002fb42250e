"""Low-rank query and key projections.

Rotary embeddings stand between W_q and W_k, so each is factorised on its own (paper, Appendix A).
"""

from torch import Tensor, nn

from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import Projections
from .linalg import low_rank_split
from .moments import Moments, diagonal, needs


@needs(diagonal("attention_input"))
def low_rank_query_key(layer: Projections, moments: Moments, shape: LayerShape) -> dict[str, Tensor]:
    """Factors of `q_proj` and `k_proj`, weighted by the norms of their input's features (paper, eq. 12).

    Returns:
        `{q,k}_proj.{reduce,expand}.weight`, and the bias on `expand`, for each that the shape factorises.
    """
    factors = {}
    for name, rank in (("q_proj", shape.q_rank), ("k_proj", shape.k_rank)):
        if rank:
            factors |= low_rank_factors(name, getattr(layer, name), moments[diagonal("attention_input")], rank)
    return factors


def low_rank_factors(name: str, projection: nn.Linear, second_moment: Tensor, rank: int) -> dict[str, Tensor]:
    """Weights of the rank-r pair that takes the place of a projection called `name`, and its bias.

    `second_moment` (in,) is the diagonal of the second moment of its input, up to a factor.
    """
    reduce, expand = low_rank_split(projection.weight, second_moment, rank)
    factors = {f"{name}.reduce.weight": reduce, f"{name}.expand.weight": expand}
    return factors if projection.bias is None else factors | {f"{name}.expand.bias": projection.bias}
