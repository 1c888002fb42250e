"""Removal of whole key/value heads, each with the query heads that read it.

D hidden size, H query heads, K key/value heads, G = H/K, d head width, kept k of the K
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model.configuration_olica import LayerShape
from .linalg import diagonal_blocks
from .moments import DOUBLE, Statistic, full, needs, total
from .recipe import Layer, Weights, needs_of, own_forms, together, workspace_of
from .refit import Refit, with_moment
from .sizes import Sizes
from .thinning import Choice, Repair, chosen, others, thin


def by_group(features: Tensor, sizes: Sizes) -> Tensor:
    """Sums (K,) over the features (H d,) of the query heads that read each key/value head."""
    return features.unflatten(0, (sizes.num_kv_heads, -1)).sum(1)


@needs(total("heads"))
def mean_heads(layer: Layer) -> Tensor:
    """E[z] (H d,) of what o_proj reads."""
    return layer.moments.mean("heads")


def rows_of(groups: Tensor, width: int) -> Tensor:
    """Indices of the features of some groups (k,), each of which has `width`."""
    return (groups[:, None] * width + torch.arange(width, device=groups.device)).flatten()


@needs(full("heads"))
def output_energy(layer: Layer) -> Tensor:
    """Scores (K,): sums over the tokens of the square of what a key/value head's query heads add to the output."""
    sizes, weight = layer.sizes, layer.weights.o_proj.weight.double()
    heads = weight.unflatten(1, (sizes.num_kv_heads, -1)).movedim(1, 0)  # (K, D, G d)
    width = heads.shape[-1]
    blocks = diagonal_blocks(layer.moments[full("heads")].double(), width)  # (K, G d, G d)
    return ((heads @ blocks) * heads).sum((1, 2))


@dataclass(frozen=True)
class RemovedGroups:
    """Stage: the key/value heads with the lowest scores go, with their query heads.

    Where a norm spans all heads, queries and keys stay, those of the heads that stay in front.

    Attributes:
        scores: layer -> (K,); or what selects the key/value heads.
        refit: of `o_proj`; None leaves the columns that stay as they are.
        repairs: what makes up for the heads that are gone.
    """

    scores: Choice
    refit: Refit | None = None
    repairs: tuple[Repair, ...] = ()

    about = "the attention heads"
    makes = "fewer heads"

    @property
    def own_form(self) -> str:
        """See `Stage`."""
        return own_forms(self.repairs)

    def needs(self, shape: LayerShape) -> frozenset[Statistic]:
        """See `Stage`."""
        refit = {full("heads")} if self.refit else set()
        return self.scores.needs | refit | needs_of(self.repairs, shape)

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Stage`."""
        width = sizes.query_width
        kept = width * (shape.kv_heads or sizes.num_kv_heads) // sizes.num_kv_heads
        refit = DOUBLE * width**2 + self.refit.workspace(sizes.hidden_size, width, kept) if self.refit else 0
        return max(self.scores.workspace(sizes), refit, workspace_of(self.repairs, sizes, shape))

    def kept(self, layer: Layer, shape: LayerShape) -> Tensor:
        """Indices (k,), ascending, of the key/value heads that stay."""
        return chosen(self.scores, layer, shape.kv_heads)

    def refitted(self, refit: Refit | None) -> "RemovedGroups":
        """See `Stage`."""
        return replace(self, refit=refit, repairs=())

    def __call__(self, layer: Layer, shape: LayerShape) -> Weights:
        """Weights and biases of the four projections of the heads that stay."""
        sizes, weights = layer.sizes, layer.weights
        if shape.kv_heads in (0, sizes.num_kv_heads):
            return {}
        kept = self.kept(layer, shape)
        query, key = sizes.groups * sizes.head_dim, sizes.head_dim
        new: Weights = {}
        order = kept
        if sizes.norm_spans_heads:
            order = torch.cat([kept, others(kept, sizes.num_kv_heads)])
            for name, width in (("q_norm", query), ("k_norm", key)):
                new[f"{name}.weight"] = layer.norms[name][rows_of(order, width)]
        for name, groups, width in (("q_proj", order, query), ("k_proj", order, key), ("v_proj", kept, key)):
            projection, rows = getattr(weights, name), rows_of(groups, width)
            new[f"{name}.weight"] = projection.weight[rows]
            if projection.bias is not None:
                new[f"{name}.bias"] = projection.bias[rows]
        refit = with_moment(self.refit, layer.moments, "heads")
        thinned = thin(weights.o_proj.weight, rows_of(kept, query), refit)
        del refit  # its moment is large beside what repairs take
        new["o_proj.weight"] = thinned.weight
        new |= together(repair(thinned, layer, shape) for repair in self.repairs)
        if weights.o_proj.bias is not None:
            new.setdefault("o_proj.bias", weights.o_proj.bias)
        return new
