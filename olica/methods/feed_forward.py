"""Importance and removal of the intermediate channels of an MLP.

D hidden size, F intermediate channels
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .linalg import by_rows, squared_norms
from .moments import DOUBLE, Statistic, diagonal, full, needs, total
from .recipe import Layer, Weights, needs_of, own_forms, together, workspace_of
from .refit import Refit, with_moment
from .sizes import Sizes
from .thinning import Choice, Repair, chosen, thin

# The released code keeps the hundredth of the channels with the *lowest* scores, as LoRAP did; the paper is silent.
RELEASED_PROTECTED_FRACTION = 0.01


def channel_norms(layer: Layer, squared_columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L2 norms, each (F,), of the Wanda-scaled (paper, eq. 4) gate row, up row and down column of every channel.

    Args:
        layer: whose moments have the diagonals of `mlp_input` and `intermediate`.
        squared_columns: ||w_j||^2 (F,) of the columns of down_proj, float64, in whatever metric of the outputs.
    """
    weights, moments = layer.weights, layer.moments
    squared_input = moments[diagonal("mlp_input")].double()
    from_gate, from_up = (
        by_rows(lambda rows: rows.square() @ squared_input, projection.weight).sqrt()
        for projection in (weights.gate_proj, weights.up_proj)
    )
    return from_gate, from_up, (squared_columns * moments[diagonal("intermediate")].double()).sqrt()


def _norms(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    return channel_norms(layer, squared_norms(layer.weights.down_proj.weight.T))


@needs(diagonal("mlp_input"), diagonal("intermediate"))
def released_importance(layer: Layer) -> Tensor:
    """Importance (F,) of the released code (D1): L2 norms of the Wanda-scaled gate row, up row and down column."""
    gate, up, down = _norms(layer)
    return gate + up + down


@needs(diagonal("mlp_input"), diagonal("intermediate"))
def balanced_importance(layer: Layer) -> Tensor:
    """Importance (F,) of ours: the same three norms, each as a multiple of its mean over the channels of the layer.

    Added as they are, the norms of gate and up, which say how strongly a channel is driven, can drown that of down,
    which says what it adds to the output: channels that matter most may then have the lowest scores.
    """
    return torch.stack([norms / norms.mean() if norms.any() else norms for norms in _norms(layer)]).sum(0)


@needs(diagonal("mlp_input"), diagonal("intermediate"))
def paper_importance(layer: Layer) -> Tensor:
    """Importance (F,) of the paper's eq. 5: sum of the Wanda scores of the up row and the down column."""
    weights, moments = layer.weights, layer.moments
    input_norms = moments[diagonal("mlp_input")].double().sqrt()
    from_up = by_rows(lambda rows: rows.abs() @ input_norms, weights.up_proj.weight)
    columns = by_rows(lambda columns: columns.abs().sum(1), weights.down_proj.weight.T)
    return from_up + columns * moments[diagonal("intermediate")].double().sqrt()


@needs(total("intermediate"))
def mean_channels(layer: Layer) -> Tensor:
    """E[h] (F,) of the channels."""
    return layer.moments.mean("intermediate")


@dataclass(frozen=True)
class ThinnedMLP:
    """Stage: the MLP keeps its most important channels.

    Attributes:
        importance: layer -> scores (F,); or what selects the channels.
        protected_fraction: share of the channels, those with the lowest scores, that stay nevertheless.
        refit: of `down_proj`; None leaves the columns that stay as they are.
        repairs: what makes up for the channels that are gone.
    """

    importance: Choice
    protected_fraction: float = 0.0
    refit: Refit | None = None
    repairs: tuple[Repair, ...] = ()

    about = "the MLP"
    makes = "fewer channels"

    @property
    def own_form(self) -> str:
        """See `Stage`."""
        return own_forms(self.repairs)

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        refit = {full("intermediate")} if self.refit else set()
        return self.importance.needs | refit | needs_of(self.repairs, shape)

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`."""
        hidden, features, kept = sizes.hidden_size, sizes.intermediate_size, shape.intermediate_size
        refit = DOUBLE * features**2 + self.refit.workspace(hidden, features, kept) if self.refit else 0
        return max(self.importance.workspace(sizes), refit, workspace_of(self.repairs, sizes, shape))

    def refitted(self, refit: Refit | None) -> "ThinnedMLP":
        """See `Stage`."""
        return replace(self, refit=refit, repairs=())

    def kept(self, layer: Layer, shape: LayerShape) -> Tensor:
        """Indices (k,), ascending, of the channels that stay."""
        return chosen(self.importance, layer, shape.intermediate_size, self.protected_fraction)

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Weights and biases of the three projections, and what the repairs add to them."""
        gate, up, down = layer.weights.gate_proj, layer.weights.up_proj, layer.weights.down_proj
        if shape.intermediate_size == down.in_features:
            return {}
        kept = self.kept(layer, shape)
        refit = with_moment(self.refit, layer.moments, "intermediate")
        thinned = thin(down.weight, kept, refit)
        del refit  # the moment, which is large
        weights = {
            "gate_proj.weight": gate.weight[kept],
            "up_proj.weight": up.weight[kept],
            "down_proj.weight": thinned.weight,
        }
        weights |= {
            f"{name}.bias": linear.bias[kept]
            for name, linear in (("gate_proj", gate), ("up_proj", up))
            if linear.bias is not None
        }
        weights |= together(repair(thinned, layer, shape) for repair in self.repairs)
        if down.bias is not None:
            weights.setdefault("down_proj.bias", down.bias)
        return weights
