"""Projections of a pruned decoder layer, and one model per family.

No forward of Hugging Face is overridden: a projection is replaced by a module that keeps the widths which the
attention code sees. Masks, caches, rotary embeddings and attention kernels stay the library's business.

    D hidden size, H query heads, K key/value heads, d head width, v kept width of a value head,
    F intermediate channels, r rank
"""

from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel

from .configuration_olica import LayerShape, OlicaLlamaConfig, head_dim


class LowRankLinear(nn.Module):
    """x -> expand(reduce(x)), a linear map of rank r with r (in + out) weights instead of in * out."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = False):
        super().__init__()
        self.reduce = nn.Linear(in_features, rank, bias=False)
        self.expand = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.expand(self.reduce(x))


class PaddedHeadsLinear(nn.Module):
    """A value projection of `heads` heads of width `kept`, each zero-padded to `width`.

    Attention mixes tokens, not features, so a zero column stays zero, and `CroppedHeadsLinear` drops it again: exact.
    The padding keeps values as wide as keys, which every fused attention kernel wants.
    """

    def __init__(self, in_features: int, heads: int, kept: int, width: int, bias: bool):
        super().__init__()
        self.heads, self.kept, self.width = heads, kept, width
        self.linear = nn.Linear(in_features, heads * kept, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K d)."""
        values = self.linear(x).unflatten(-1, (self.heads, self.kept))  # (..., K, v)
        return nn.functional.pad(values, (0, self.width - self.kept)).flatten(-2)  # (..., K d)


class CroppedHeadsLinear(nn.Module):
    """An output projection that reads the first `kept` of the `width` features of each of `heads` heads."""

    def __init__(self, heads: int, kept: int, width: int, out_features: int, bias: bool):
        super().__init__()
        self.heads, self.kept, self.width = heads, kept, width
        self.linear = nn.Linear(heads * kept, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H d) -> (..., D)."""
        heads = x.unflatten(-1, (self.heads, self.width))[..., : self.kept]  # (..., H, v)
        return self.linear(heads.flatten(-2))


class CalibratedMLP(nn.Module):
    """A pruned MLP plus the low-rank linear map that restores what pruning took from it (paper, eq. 11)."""

    def __init__(self, mlp: nn.Module, hidden_size: int, rank: int):
        super().__init__()
        self.mlp = mlp
        self.correction = LowRankLinear(hidden_size, hidden_size, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.mlp(x) + self.correction(x)


def _narrow_linear(linear: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=linear.bias is not None)


def shrink_layer(layer: nn.Module, config, shape: LayerShape) -> None:
    """Replace the projections of a dense decoder layer by new, unfilled ones of the sizes `shape`, in place.

    What keeps its size keeps its module and its weights.
    """
    attention, mlp = layer.self_attn, layer.mlp
    for name, rank in (("q_proj", shape.q_rank), ("k_proj", shape.k_rank)):
        if rank:
            dense = getattr(attention, name)
            factors = LowRankLinear(dense.in_features, dense.out_features, rank, dense.bias is not None)
            setattr(attention, name, factors)
    width, kept = head_dim(config), shape.v_head_dim
    if kept < width:
        v_proj, o_proj = attention.v_proj, attention.o_proj
        attention.v_proj = PaddedHeadsLinear(
            v_proj.in_features, config.num_key_value_heads, kept, width, v_proj.bias is not None
        )
        attention.o_proj = CroppedHeadsLinear(
            config.num_attention_heads, kept, width, o_proj.out_features, o_proj.bias is not None
        )
    channels = shape.intermediate_size
    if channels < config.intermediate_size:
        mlp.gate_proj = _narrow_linear(mlp.gate_proj, config.hidden_size, channels)
        mlp.up_proj = _narrow_linear(mlp.up_proj, config.hidden_size, channels)
        mlp.down_proj = _narrow_linear(mlp.down_proj, channels, config.hidden_size)
        mlp.intermediate_size = channels
    if shape.calibration_rank:
        layer.mlp = CalibratedMLP(mlp, config.hidden_size, shape.calibration_rank)


def shrink_layers(model: nn.Module) -> None:
    """Shrink every decoder layer of a base model to `model.config.layer_shapes`."""
    for layer, shape in zip(model.layers, model.config.layer_shapes or [], strict=False):
        shrink_layer(layer, model.config, LayerShape(**shape))


class OlicaLlamaModel(LlamaModel):
    """The base model of a pruned LLaMA."""

    config_class = OlicaLlamaConfig

    def __init__(self, config: OlicaLlamaConfig):
        super().__init__(config)
        shrink_layers(self)
        self.post_init()


class OlicaLlamaForCausalLM(LlamaForCausalLM):
    """A pruned LLaMA with its language-model head."""

    config_class = OlicaLlamaConfig

    def __init__(self, config: OlicaLlamaConfig):
        super().__init__(config)
        self.model = OlicaLlamaModel(config)
        self.post_init()


# model_type of the dense model -> the classes of its pruned form.
FAMILIES = {"llama": (OlicaLlamaConfig, OlicaLlamaModel, OlicaLlamaForCausalLM)}
