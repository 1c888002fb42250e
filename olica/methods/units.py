"""Units that go as wholes: a key/value head with its query heads, and a channel of an MLP.

D hidden size, K key/value heads, F intermediate channels
"""

from ..model.configuration_olica import LayerShape
from .rounding import rounded
from .sizes import Budget, Sizes


def group_parameters(layer: Sizes) -> int:
    """Weights that go with a key/value head and its query heads."""
    features = layer.head_dim * (1 + layer.groups)  # of its value, and of its query heads as the output reads them
    return layer.hidden_size * features * (1 if layer.norm_spans_heads else 2)


def channel_parameters(layer: Sizes) -> int:
    """Weights that go with a channel of an MLP."""
    return 3 * layer.hidden_size


def most_removable(layer: Sizes) -> int:
    """Weights that go where a layer keeps one key/value head and one channel."""
    of_heads = (layer.num_kv_heads - 1) * group_parameters(layer)
    return of_heads + (layer.intermediate_size - 1) * channel_parameters(layer)


def to_remove(sizes: list[Sizes], budget: Budget, biases: bool) -> float:
    """Parameters that units have to make up: those of the budget and, where what is thinned gets one, of biases (D)."""
    added = sum(2 * layer.hidden_size for layer in sizes) if biases else 0
    return budget.to_remove + (added if budget.sparsity else 0)


def thinned_shapes(
    sizes: list[Sizes], groups: list[int], channels: list[float], round_to: int, biases: bool
) -> list[LayerShape]:
    """Sizes of layers that lose so many groups of heads, and keep so many channels rounded to whole multiples.

    What rounding adds to a layer the next ones have less of.
    """
    shapes, owed = [], 0.0
    for layer, gone, kept in zip(sizes, groups, channels, strict=True):
        wanted = kept + owed
        whole = rounded(wanted, round_to, layer.intermediate_size)
        owed = wanted - whole
        shapes.append(_thinned_shape(layer, gone, whole, biases))
    return shapes


def _thinned_shape(layer: Sizes, groups: int, channels: int, biases: bool) -> LayerShape:
    return LayerShape(
        q_rank=0,
        k_rank=0,
        v_head_dim=layer.head_dim,
        intermediate_size=channels,
        kv_heads=layer.num_kv_heads - groups if groups else 0,
        o_bias=biases and groups > 0,
        down_bias=biases and channels < layer.intermediate_size,
    )
