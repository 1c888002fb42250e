"""Projections of a pruned decoder layer, and one model per family.

No forward of Hugging Face is overridden: a projection is replaced by a module that keeps the widths which the
attention code sees. Masks, caches, rotary embeddings and attention kernels stay the library's business.

    D hidden size, H query heads, K key/value heads, d head width, v kept width of a value head,
    F intermediate channels, r rank
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GraniteForCausalLM,
    GraniteModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralForCausalLM,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    Olmo2ForCausalLM,
    Olmo2ForSequenceClassification,
    Olmo2Model,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
    Phi3ForTokenClassification,
    Phi3Model,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    SmolLM3ForCausalLM,
    SmolLM3ForSequenceClassification,
    SmolLM3ForTokenClassification,
    SmolLM3Model,
)

from .configuration_olica import (
    LayerShape,
    OlicaGemma2Config,
    OlicaGemma3TextConfig,
    OlicaGraniteConfig,
    OlicaLlamaConfig,
    OlicaMistralConfig,
    OlicaOlmo2Config,
    OlicaPhi3Config,
    OlicaQwen2Config,
    OlicaQwen3Config,
    OlicaSmolLM3Config,
    head_dim,
)


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


class SideBySide(nn.Module):
    """Projections of one input, their outputs side by side in the order given, as a fused projection's are read."""

    def __init__(self, **projections: nn.Module):
        super().__init__()
        for name, projection in projections.items():
            self.add_module(name, projection)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., sum of the output widths)."""
        return torch.cat([projection(x) for projection in self.children()], dim=-1)


class Projections(NamedTuple):
    """The seven projections of a decoder layer, wherever its family keeps them."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


# Where some families fuse projections, and what a fused one holds, in the order in which its output is cut.
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def module_paths(layer: nn.Module) -> dict[str, str]:
    """Where a decoder layer, dense or shrunk, has its projections and, if it has one, the correction of its MLP."""
    names = (*Projections._fields, "correction")
    return {name: path for path, _ in layer.named_modules() if (name := path.rpartition(".")[2]) in names}


def projections_of(layer: nn.Module) -> Projections:
    """The projections of a decoder layer, dense or shrunk; fused ones have to be separate already."""
    paths = module_paths(layer)
    return Projections(*(layer.get_submodule(paths[name]) for name in Projections._fields))


def separate_projections(layer: nn.Module, config) -> None:
    """Replace fused projections of a decoder layer by the separate ones that they hold, in place."""
    width = head_dim(config)
    query, key = config.num_attention_heads * width, config.num_key_value_heads * width
    channels = config.intermediate_size
    sizes = {"q_proj": query, "k_proj": key, "v_proj": key, "gate_proj": channels, "up_proj": channels}
    modules = dict(layer.named_modules())
    for path, names in FUSED.items():
        if isinstance(modules.get(path), nn.Linear):
            layer.set_submodule(path, _separated(modules[path], {name: sizes[name] for name in names}))


def _separated(fused: nn.Linear, sizes: dict[str, int]) -> SideBySide:
    """`fused` as one projection for each of `sizes`, the rows of its weight in that order."""
    weights = fused.weight.split(list(sizes.values()))
    biases = [None] * len(sizes) if fused.bias is None else fused.bias.split(list(sizes.values()))
    projections = {}
    for name, weight, bias in zip(sizes, weights, biases, strict=True):
        projections[name] = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
        # Copies: rows that went on sharing the fused matrix would keep it in memory.
        projections[name].weight = nn.Parameter(weight.clone())
        projections[name].bias = None if bias is None else nn.Parameter(bias.clone())
    return SideBySide(**projections)


def _resized(linear: nn.Linear, in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=linear.bias is not None)


def shrink_layer(layer: nn.Module, config, shape: LayerShape) -> None:
    """Replace the projections of a dense decoder layer by new, unfilled ones of the sizes `shape`, in place.

    What keeps its size keeps its module and its weights.
    """
    separate_projections(layer, config)
    dense, new = projections_of(layer), {}
    ranks = {"q_proj": shape.q_rank, "k_proj": shape.k_rank, "v_proj": shape.v_rank, "o_proj": shape.o_rank}
    for name, rank in ranks.items():
        if rank:
            linear = getattr(dense, name)
            new[name] = LowRankLinear(linear.in_features, linear.out_features, rank, linear.bias is not None)
    width, kept = head_dim(config), shape.v_head_dim
    if kept < width:
        v_proj, o_proj = dense.v_proj, dense.o_proj
        groups, heads = config.num_key_value_heads, config.num_attention_heads
        new["v_proj"] = PaddedHeadsLinear(v_proj.in_features, groups, kept, width, v_proj.bias is not None)
        new["o_proj"] = CroppedHeadsLinear(heads, kept, width, o_proj.out_features, o_proj.bias is not None)
    channels = shape.intermediate_size
    if channels < config.intermediate_size:
        new["gate_proj"] = _resized(dense.gate_proj, config.hidden_size, channels)
        new["up_proj"] = _resized(dense.up_proj, config.hidden_size, channels)
        new["down_proj"] = _resized(dense.down_proj, channels, config.hidden_size)
    paths = module_paths(layer)
    for name, module in new.items():
        layer.set_submodule(paths[name], module)
    if shape.calibration_rank:
        layer.mlp = CalibratedMLP(layer.mlp, config.hidden_size, shape.calibration_rank)


class PrunedModel:
    """Makes a family's base model its pruned form: the library builds the dense layers, which are shrunk then."""

    def __init__(self, config):
        super().__init__(config)
        for layer, shape in zip(self.layers, config.layer_shapes or [], strict=False):
            shrink_layer(layer, config, LayerShape(**shape))
        self.post_init()


class PrunedForCausalLM:
    """Makes a family's causal language model its pruned form; `base_class` is the pruned base model."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base_class(config)
        self.post_init()


class PrunedClassifier:
    """Makes a family's classifier, whose base model comes from AutoModel, its pruned form; `base_class` is that one."""

    def __init__(self, config):
        # Without the package a configuration's class is another for every file that defines it: none is known yet.
        AutoModel.register(type(config), self.base_class, exist_ok=True)
        super().__init__(config)


class OlicaLlamaModel(PrunedModel, LlamaModel):
    """The base model of a pruned LLaMA."""

    config_class = OlicaLlamaConfig


class OlicaLlamaForCausalLM(PrunedForCausalLM, LlamaForCausalLM):
    """A pruned LLaMA with its language-model head."""

    config_class, base_class = OlicaLlamaConfig, OlicaLlamaModel


class OlicaLlamaForSequenceClassification(PrunedClassifier, LlamaForSequenceClassification):
    """A pruned LLaMA that classifies sequences."""

    config_class, base_class = OlicaLlamaConfig, OlicaLlamaModel


class OlicaLlamaForTokenClassification(PrunedClassifier, LlamaForTokenClassification):
    """A pruned LLaMA that classifies tokens."""

    config_class, base_class = OlicaLlamaConfig, OlicaLlamaModel


class OlicaMistralModel(PrunedModel, MistralModel):
    """The base model of a pruned Mistral."""

    config_class = OlicaMistralConfig


class OlicaMistralForCausalLM(PrunedForCausalLM, MistralForCausalLM):
    """A pruned Mistral with its language-model head."""

    config_class, base_class = OlicaMistralConfig, OlicaMistralModel


class OlicaMistralForSequenceClassification(PrunedClassifier, MistralForSequenceClassification):
    """A pruned Mistral that classifies sequences."""

    config_class, base_class = OlicaMistralConfig, OlicaMistralModel


class OlicaMistralForTokenClassification(PrunedClassifier, MistralForTokenClassification):
    """A pruned Mistral that classifies tokens."""

    config_class, base_class = OlicaMistralConfig, OlicaMistralModel


class OlicaQwen2Model(PrunedModel, Qwen2Model):
    """The base model of a pruned Qwen2."""

    config_class = OlicaQwen2Config


class OlicaQwen2ForCausalLM(PrunedForCausalLM, Qwen2ForCausalLM):
    """A pruned Qwen2 with its language-model head."""

    config_class, base_class = OlicaQwen2Config, OlicaQwen2Model


class OlicaQwen2ForSequenceClassification(PrunedClassifier, Qwen2ForSequenceClassification):
    """A pruned Qwen2 that classifies sequences."""

    config_class, base_class = OlicaQwen2Config, OlicaQwen2Model


class OlicaQwen2ForTokenClassification(PrunedClassifier, Qwen2ForTokenClassification):
    """A pruned Qwen2 that classifies tokens."""

    config_class, base_class = OlicaQwen2Config, OlicaQwen2Model


class OlicaQwen3Model(PrunedModel, Qwen3Model):
    """The base model of a pruned Qwen3."""

    config_class = OlicaQwen3Config


class OlicaQwen3ForCausalLM(PrunedForCausalLM, Qwen3ForCausalLM):
    """A pruned Qwen3 with its language-model head."""

    config_class, base_class = OlicaQwen3Config, OlicaQwen3Model


class OlicaQwen3ForSequenceClassification(PrunedClassifier, Qwen3ForSequenceClassification):
    """A pruned Qwen3 that classifies sequences."""

    config_class, base_class = OlicaQwen3Config, OlicaQwen3Model


class OlicaQwen3ForTokenClassification(PrunedClassifier, Qwen3ForTokenClassification):
    """A pruned Qwen3 that classifies tokens."""

    config_class, base_class = OlicaQwen3Config, OlicaQwen3Model


class OlicaSmolLM3Model(PrunedModel, SmolLM3Model):
    """The base model of a pruned SmolLM3."""

    config_class = OlicaSmolLM3Config


class OlicaSmolLM3ForCausalLM(PrunedForCausalLM, SmolLM3ForCausalLM):
    """A pruned SmolLM3 with its language-model head."""

    config_class, base_class = OlicaSmolLM3Config, OlicaSmolLM3Model


class OlicaSmolLM3ForSequenceClassification(PrunedClassifier, SmolLM3ForSequenceClassification):
    """A pruned SmolLM3 that classifies sequences."""

    config_class, base_class = OlicaSmolLM3Config, OlicaSmolLM3Model


class OlicaSmolLM3ForTokenClassification(PrunedClassifier, SmolLM3ForTokenClassification):
    """A pruned SmolLM3 that classifies tokens."""

    config_class, base_class = OlicaSmolLM3Config, OlicaSmolLM3Model


class OlicaGraniteModel(PrunedModel, GraniteModel):
    """The base model of a pruned Granite."""

    config_class = OlicaGraniteConfig


class OlicaGraniteForCausalLM(PrunedForCausalLM, GraniteForCausalLM):
    """A pruned Granite with its language-model head."""

    config_class, base_class = OlicaGraniteConfig, OlicaGraniteModel


class OlicaOlmo2Model(PrunedModel, Olmo2Model):
    """The base model of a pruned OLMo 2."""

    config_class = OlicaOlmo2Config


class OlicaOlmo2ForCausalLM(PrunedForCausalLM, Olmo2ForCausalLM):
    """A pruned OLMo 2 with its language-model head."""

    config_class, base_class = OlicaOlmo2Config, OlicaOlmo2Model


class OlicaOlmo2ForSequenceClassification(PrunedClassifier, Olmo2ForSequenceClassification):
    """A pruned OLMo 2 that classifies sequences."""

    config_class, base_class = OlicaOlmo2Config, OlicaOlmo2Model


class OlicaGemma2Model(PrunedModel, Gemma2Model):
    """The base model of a pruned Gemma 2."""

    config_class = OlicaGemma2Config


class OlicaGemma2ForCausalLM(PrunedForCausalLM, Gemma2ForCausalLM):
    """A pruned Gemma 2 with its language-model head."""

    config_class, base_class = OlicaGemma2Config, OlicaGemma2Model


class OlicaGemma2ForSequenceClassification(PrunedClassifier, Gemma2ForSequenceClassification):
    """A pruned Gemma 2 that classifies sequences."""

    config_class, base_class = OlicaGemma2Config, OlicaGemma2Model


class OlicaGemma2ForTokenClassification(PrunedClassifier, Gemma2ForTokenClassification):
    """A pruned Gemma 2 that classifies tokens."""

    config_class, base_class = OlicaGemma2Config, OlicaGemma2Model


class OlicaGemma3TextModel(PrunedModel, Gemma3TextModel):
    """The base model of a pruned Gemma 3 (text)."""

    config_class = OlicaGemma3TextConfig


class OlicaGemma3TextForCausalLM(PrunedForCausalLM, Gemma3ForCausalLM):
    """A pruned Gemma 3 (text) with its language-model head."""

    config_class, base_class = OlicaGemma3TextConfig, OlicaGemma3TextModel


class OlicaGemma3TextForSequenceClassification(PrunedClassifier, Gemma3TextForSequenceClassification):
    """A pruned Gemma 3 (text) that classifies sequences."""

    config_class, base_class = OlicaGemma3TextConfig, OlicaGemma3TextModel


class OlicaPhi3Model(PrunedModel, Phi3Model):
    """The base model of a pruned Phi-3."""

    config_class = OlicaPhi3Config


class OlicaPhi3ForCausalLM(PrunedForCausalLM, Phi3ForCausalLM):
    """A pruned Phi-3 with its language-model head."""

    config_class, base_class = OlicaPhi3Config, OlicaPhi3Model


class OlicaPhi3ForSequenceClassification(PrunedClassifier, Phi3ForSequenceClassification):
    """A pruned Phi-3 that classifies sequences."""

    config_class, base_class = OlicaPhi3Config, OlicaPhi3Model


class OlicaPhi3ForTokenClassification(PrunedClassifier, Phi3ForTokenClassification):
    """A pruned Phi-3 that classifies tokens."""

    config_class, base_class = OlicaPhi3Config, OlicaPhi3Model


# model_type of the dense model -> its pruned form.
FAMILIES = {
    "llama": OlicaLlamaForCausalLM,
    "mistral": OlicaMistralForCausalLM,
    "qwen2": OlicaQwen2ForCausalLM,
    "qwen3": OlicaQwen3ForCausalLM,
    "smollm3": OlicaSmolLM3ForCausalLM,
    "granite": OlicaGraniteForCausalLM,
    "olmo2": OlicaOlmo2ForCausalLM,
    "gemma2": OlicaGemma2ForCausalLM,
    "gemma3_text": OlicaGemma3TextForCausalLM,
    "phi3": OlicaPhi3ForCausalLM,
}
# Those of the families that have such a model in the library.
SEQUENCE_CLASSIFIERS = {
    "llama": OlicaLlamaForSequenceClassification,
    "mistral": OlicaMistralForSequenceClassification,
    "qwen2": OlicaQwen2ForSequenceClassification,
    "qwen3": OlicaQwen3ForSequenceClassification,
    "smollm3": OlicaSmolLM3ForSequenceClassification,
    "olmo2": OlicaOlmo2ForSequenceClassification,
    "gemma2": OlicaGemma2ForSequenceClassification,
    "gemma3_text": OlicaGemma3TextForSequenceClassification,
    "phi3": OlicaPhi3ForSequenceClassification,
}
TOKEN_CLASSIFIERS = {
    "llama": OlicaLlamaForTokenClassification,
    "mistral": OlicaMistralForTokenClassification,
    "qwen2": OlicaQwen2ForTokenClassification,
    "qwen3": OlicaQwen3ForTokenClassification,
    "smollm3": OlicaSmolLM3ForTokenClassification,
    "gemma2": OlicaGemma2ForTokenClassification,
    "phi3": OlicaPhi3ForTokenClassification,
}
