"""Sizes of the dense decoder layers, the budget that a method has to keep, and plans in words.

D hidden size, H query heads, K key/value heads, G = H/K, d head width, F intermediate channels
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedConfig

from ..model.configuration_olica import LayerShape, head_dim, norm_spans_heads


@dataclass(frozen=True)
class Sizes:
    """Sizes of one dense decoder layer.

    Attributes:
        hidden_size: D.
        num_heads: H.
        num_kv_heads: K.
        head_dim: d.
        intermediate_size: F.
        norm_spans_heads: whether queries and keys are normalised over all heads at once, so that none can be removed.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_spans_heads: bool = False

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Sizes":
        """Of every layer of the model of `config`."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim(config),
            config.intermediate_size,
            norm_spans_heads(config),
        )

    @classmethod
    def of_all(cls, config: PreTrainedConfig) -> "list[Sizes]":
        """Of each layer of the model of `config`."""
        return [cls.of(config)] * config.num_hidden_layers

    @property
    def dense_shape(self) -> LayerShape:
        """Of a layer that loses nothing."""
        return LayerShape(0, 0, self.head_dim, self.intermediate_size)

    @property
    def groups(self) -> int:
        """Query heads that read one key/value head: G."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_width(self) -> int:
        """Features of all query heads: H d."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Features of all key heads, or of all value heads: K d."""
        return self.num_kv_heads * self.head_dim

    @property
    def query(self) -> int:
        """Weights of q_proj, as many as those of o_proj."""
        return self.hidden_size * self.query_width

    @property
    def key(self) -> int:
        """Weights of k_proj, as many as those of v_proj."""
        return self.hidden_size * self.key_width

    @property
    def value_output(self) -> int:
        """Weights of v_proj and o_proj."""
        return self.query + self.key

    @property
    def feed_forward(self) -> int:
        """Weights of the three projections of the MLP."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def layer(self) -> int:
        """Weights of the layer, norms and biases left out."""
        return self.query + self.key + self.value_output + self.feed_forward


@dataclass(frozen=True)
class Budget:
    """How much is to go.

    Attributes:
        whole: the parameters that the sparsity is a share of: all of the model's, tied ones once, or its layers'.
        sparsity: share of `whole` to remove, in [0, 1).
        round_to: sizes become multiples of it; 1 leaves them as they come.
    """

    whole: int
    sparsity: float
    round_to: int = 1

    @property
    def to_remove(self) -> float:
        """Parameters that are to go."""
        return self.sparsity * self.whole


def describe_plan(plan: list[LayerShape], without: Collection[str] = ()) -> str:
    """A table of the sizes that any layer has, one line for each run of equal layers; some may be left out."""
    left_out: dict[str, Any] = dict.fromkeys(without, 0)
    plan = [replace(shape, **left_out) for shape in plan]
    names = [name for name in plan[0].to_dict() if any(shape.to_dict()[name] for shape in plan)]
    lines = [f"{'layers':>9}  " + "  ".join(f"{name:>17}" for name in names)]
    start = 0
    for shape, run in groupby(plan):
        stop = start + len(list(run))
        label = f"{start}-{stop - 1}" if stop - start > 1 else f"{start}"
        lines.append(f"{label:>9}  " + "  ".join(f"{shape.to_dict()[name] or '-':>17}" for name in names))
        start = stop
    return "\n".join(lines)
