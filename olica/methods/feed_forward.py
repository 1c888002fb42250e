"""Importance and removal of the intermediate channels of an MLP.

D hidden size, F intermediate channels
"""

import torch
from torch import Tensor

from ..model.modeling_olica import Projections
from .linalg import by_rows
from .moments import Moments, diagonal, needs

# The released code keeps the hundredth of the channels with the *lowest* scores, as LoRAP did; the paper is silent.
RELEASED_PROTECTED_FRACTION = 0.01


@needs(diagonal("mlp_input"), diagonal("intermediate"))
def released_importance(layer: Projections, moments: Moments) -> Tensor:
    """Importance (F,) of the released code (D1): L2 norms of the Wanda-scaled gate row, up row and down column."""
    squared_input = moments[diagonal("mlp_input")].double()
    from_gate, from_up = (
        by_rows(lambda rows: rows.square() @ squared_input, projection.weight).sqrt()
        for projection in (layer.gate_proj, layer.up_proj)
    )
    squared_columns = by_rows(lambda columns: columns.square().sum(1), layer.down_proj.weight.T)
    return from_gate + from_up + (squared_columns * moments[diagonal("intermediate")].double()).sqrt()


@needs(diagonal("mlp_input"), diagonal("intermediate"))
def paper_importance(layer: Projections, moments: Moments) -> Tensor:
    """Importance (F,) of the paper's eq. 5: sum of the Wanda scores of the up row and the down column."""
    input_norms = moments[diagonal("mlp_input")].double().sqrt()
    from_up = by_rows(lambda rows: rows.abs() @ input_norms, layer.up_proj.weight)
    columns = by_rows(lambda columns: columns.abs().sum(1), layer.down_proj.weight.T)
    return from_up + columns * moments[diagonal("intermediate")].double().sqrt()


def kept_channels(importance: Tensor, kept: int, protected_fraction: float) -> Tensor:
    """Indices, ascending, of the channels that stay.

    Args:
        importance: (F,).
        kept: how many stay.
        protected_fraction: share of F, taken from the lowest scores, that stays whatever its score.

    Returns:
        (kept,) indices: the protected ones and the highest scores.
    """
    order = importance.argsort(stable=True)
    protected = min(int(protected_fraction * len(order)), kept)
    staying = torch.cat([order[:protected], order[len(order) - (kept - protected) :]])
    return staying.sort().values


def prune_feed_forward(layer: Projections, kept: Tensor) -> dict[str, Tensor]:
    """Weights and biases of `gate_proj`, `up_proj` and `down_proj` reduced to the channels `kept`."""
    pruned = {
        "gate_proj.weight": layer.gate_proj.weight[kept],
        "up_proj.weight": layer.up_proj.weight[kept],
        "down_proj.weight": layer.down_proj.weight[:, kept],
    }
    for name in ("gate_proj", "up_proj"):
        if getattr(layer, name).bias is not None:
            pruned[f"{name}.bias"] = getattr(layer, name).bias[kept]
    if layer.down_proj.bias is not None:
        pruned["down_proj.bias"] = layer.down_proj.bias
    return pruned
