"""LoRAP (Li et al., ICML 2024): low-rank factors for the attention's projections, thinned MLPs.

A projection becomes SVD_r(W D) D^-1, D the norms of its input's features; an MLP keeps the channels with the highest
L2 norms of Wanda's scores, and the hundredth with the lowest. Olica is built on it, and its stages are used here.
"""

from .feed_forward import RELEASED_PROTECTED_FRACTION, ThinnedMLP, released_importance
from .query_key import LowRankQueryKey
from .recipe import Method, NoParameters
from .shares import RELEASED_SPLIT, Corrections, FixedShares, Sparsities, kept_by_code, spend_rest
from .sizes import Budget, Sizes
from .value_output import FactorisedProjections

# How many times the share of value/output queries and keys lose, where both lose something.
RATIO = 3.0


def lorap_sparsities(sizes: list[Sizes], budget: Budget, k: float) -> Sparsities:
    """Shares with which attention loses the sparsity s, and the MLPs the rest.

    Queries and keys lose 2 s alone up to the limit; above it, where that would take nearly all of them, they lose k
    times what value and output lose.
    """
    sparsity = budget.sparsity
    value_output = 0.0 if sparsity <= RELEASED_SPLIT else 2 * sparsity / (1 + k)
    query_key = 2 * sparsity - value_output
    return spend_rest(sizes, budget, query_key, query_key, value_output)


def lorap(_parameters: NoParameters) -> Method:
    """The method; a layer is calibrated while all of it is intact."""
    mlp = ThinnedMLP(released_importance, RELEASED_PROTECTED_FRACTION)
    uncorrected = Corrections(0, 0.0, last_is_eligible=False)
    return Method(
        stream="pruned",
        survey=None,
        allocate=FixedShares(lorap_sparsities, kept_by_code, RATIO, is_factorised=True, corrections=uncorrected),
        passes=((mlp, LowRankQueryKey(), FactorisedProjections(by_input=True)),),
    )
