"""Projections of a pruned decoder layer, and one model per family.

No forward of Hugging Face is overridden: a projection is replaced by a module that keeps the widths which the
attention code sees. Masks, caches, rotary embeddings and attention kernels stay the library's business.

    D hidden size, H query heads, K key/value heads, d head width, v kept width of a value head,
    F intermediate channels, r rank
"""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
)

from .configuration_olica import (
    FAMILY_NAMES,
    LayerShape,
    attends_with_all_heads,
    config_class,
    head_dim,
    norm_spans_heads,
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
    """A value projection whose heads of width `kept` are zero-padded to `width`, and zero heads added up to `heads`.

    Attention mixes tokens, not features, so a zero column stays zero, and `CroppedHeadsLinear` drops it again: exact.
    The padding keeps values as wide as keys, which every fused attention kernel wants.
    """

    def __init__(self, linear: nn.Module, kept: int, width: int, heads: int):
        super().__init__()
        self.linear = linear
        self.kept, self.width, self.heads = kept, width, heads

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., K d)."""
        values = self.linear(x).unflatten(-1, (-1, self.kept))  # (..., k, v)
        return nn.functional.pad(values, (0, self.width - self.kept, 0, self.heads - values.shape[-2])).flatten(-2)


class CroppedHeadsLinear(nn.Module):
    """An output projection that reads the first `kept` of the `width` features of each of the first `heads` heads."""

    def __init__(self, linear: nn.Module, kept: int, width: int, heads: int):
        super().__init__()
        self.linear = linear
        self.kept, self.width, self.heads = kept, width, heads

    def forward(self, x: Tensor) -> Tensor:
        """(..., H d) -> (..., D)."""
        heads = x.unflatten(-1, (-1, self.width))[..., : self.heads, : self.kept]  # (..., h, v)
        return self.linear(heads.flatten(-2))


class CorrectedMLP(nn.Module):
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


# What of a decoder layer is pruned or added.
MODULES = (*Projections._fields, "correction")
# Where some families fuse projections, and what a fused one holds, in the order in which its output is cut.
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}


def module_paths(layer: nn.Module) -> dict[str, str]:
    """Where a decoder layer, dense or shrunk, has its projections and, if it has one, the correction of its MLP."""
    return {name: path for path, _ in layer.named_modules() if (name := path.rpartition(".")[2]) in MODULES}


def projections_of(layer: nn.Module) -> Projections:
    """The projections of a decoder layer, dense or shrunk; fused ones have to be separate already."""
    paths = module_paths(layer)
    return Projections(*(cast(nn.Linear, layer.get_submodule(paths[name])) for name in Projections._fields))


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
        out_features, in_features = weight.shape
        projections[name] = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        # Copies: rows that went on sharing the fused matrix would keep it in memory.
        projections[name].weight = nn.Parameter(weight.clone())
        if bias is not None:
            projections[name].bias = nn.Parameter(bias.clone())
    return SideBySide(**projections)


def _resized(dense: nn.Linear, in_features: int, out_features: int, rank: int = 0, bias: bool = False) -> nn.Module:
    """An unfilled linear map in place of `dense`; `dense` itself, with its weights, where at most a bias is new."""
    bias = bias or dense.bias is not None
    if rank:
        return LowRankLinear(in_features, out_features, rank, bias)
    if (in_features, out_features) != (dense.in_features, dense.out_features):
        return nn.Linear(in_features, out_features, bias)
    if bias and dense.bias is None:
        dense.bias = nn.Parameter(torch.zeros(out_features, dtype=dense.weight.dtype))
    return dense


def _shrunk_attention(name: str, dense: nn.Linear, config, shape: LayerShape) -> nn.Module:
    width, kv_heads = head_dim(config), config.num_key_value_heads
    all_heads = kv_heads if name in ("k_proj", "v_proj") else config.num_attention_heads
    heads = all_heads // kv_heads * (shape.kv_heads or kv_heads)
    kept = shape.v_head_dim if name in ("v_proj", "o_proj") else width
    if name in ("q_proj", "k_proj") and norm_spans_heads(config):
        heads = all_heads
    rank = getattr(shape, f"{name[0]}_rank")
    attended = all_heads if attends_with_all_heads(config) else heads
    if name == "o_proj":
        linear = _resized(dense, heads * kept, dense.out_features, rank, shape.o_bias)
        return linear if (heads, kept) == (attended, width) else CroppedHeadsLinear(linear, kept, width, heads)
    linear = _resized(dense, dense.in_features, heads * kept, rank)
    return linear if (heads, kept) == (attended, width) else PaddedHeadsLinear(linear, kept, width, attended)


def _shrunk_mlp(name: str, dense: nn.Linear, shape: LayerShape) -> nn.Module:
    if name == "down_proj":
        return _resized(dense, shape.intermediate_size, dense.out_features, bias=shape.down_bias)
    return _resized(dense, dense.in_features, shape.intermediate_size)


class AttentionOfKinds:
    """Makes an attention class another one for each list of kinds of its projections, `kinds`.

    vLLM and SGLang look at the first module of a class, and take all others of it to have projections of its kinds.
    """

    def __reduce_ex__(self, protocol):
        """Have pickle make the class anew, for it is no name of a module."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _empty_attention, (type(self).__bases__[1], type(self).kinds), *state


@cache
def attention_class(base: type, kinds: tuple[type, ...]) -> type:
    """The subclass of an attention class for projections of some kinds."""
    name = base.__name__ + "".join(kind.__name__.removesuffix("Linear") or "Whole" for kind in kinds)
    doc = f"{base.__name__} whose projections are of the kinds {', '.join(kind.__name__ for kind in kinds)}."
    return type(name, (AttentionOfKinds, base), {"__module__": __name__, "__doc__": doc, "kinds": kinds})


def _empty_attention(base: type, kinds: tuple[type, ...]) -> nn.Module:
    return cast(nn.Module, object.__new__(attention_class(base, kinds)))


def _give_own_class(attention: nn.Module) -> None:
    """Make the class of an attention module that of its projections' kinds, in place."""
    kinds = tuple(type(module) for name, module in attention.named_children() if name in MODULES)
    base = next(kind for kind in type(attention).__mro__ if kind.__module__ != __name__)
    if set(kinds) != {nn.Linear}:
        attention.__class__ = attention_class(base, kinds)


def shrink_layer(layer: nn.Module, config, shape: LayerShape, only: Collection[str] | None = None) -> None:
    """Replace the projections of a dense decoder layer by new, unfilled ones of the sizes `shape`, in place.

    What keeps its size keeps its module and its weights; a bias that is new is zero. Of removed heads it is the last
    ones that have no place: whoever fills the layer puts the kept key/value heads, and their query heads, first.
    Where `norm_spans_heads`, q_proj and k_proj stay whole; the weights of the norms go in the order of their rows.

    Args:
        layer: dense in every part that is to be shrunk.
        config: the dense or pruned configuration.
        shape: the sizes of the whole layer.
        only: names of `Projections`, and "correction", that are to be replaced now; None: all of them. A layer that is
            pruned in several passes is shrunk by several calls with names that complement one another.
    """
    separate_projections(layer, config)
    names = MODULES if only is None else only
    paths = module_paths(layer)
    for name in Projections._fields:
        if name in names:
            dense = cast(nn.Linear, layer.get_submodule(paths[name]))
            is_mlp = name in ("gate_proj", "up_proj", "down_proj")
            new = _shrunk_mlp(name, dense, shape) if is_mlp else _shrunk_attention(name, dense, config, shape)
            layer.set_submodule(paths[name], new)
    _give_own_class(cast(nn.Module, layer.self_attn))
    if shape.correction_rank and "correction" in names:
        layer.mlp = CorrectedMLP(cast(nn.Module, layer.mlp), config.hidden_size, shape.correction_rank)


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
        if type(self.model) is not self.base_class:  # old releases name the dense model's class
            self.model = self.base_class(config)
            self.post_init()


# What the name of a model's class ends with -> the library's models of that kind, and what makes them pruned ones.
KINDS = {
    "Model": (MODEL_MAPPING, PrunedModel),
    "ForCausalLM": (MODEL_FOR_CAUSAL_LM_MAPPING, PrunedForCausalLM),
    "ForSequenceClassification": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, PrunedClassifier),
    "ForTokenClassification": (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, PrunedClassifier),
}


@cache
def model_class(model_type: str, kind: str) -> type:
    """The class `Olica...` of a family's pruned models of one of KINDS, made when it is first asked for.

    Raises:
        ImportError: the installed transformers lacks the family.
        KeyError: the library has no such model of this family.
    """
    library, pruned = KINDS[kind]
    config, name = config_class(model_type), f"Olica{FAMILY_NAMES[model_type]}{kind}"
    dense = cast(type, library[CONFIG_MAPPING[model_type]])
    doc = f"The pruned form of {dense.__name__}."
    members = dict(__module__=__name__, __qualname__=name, __doc__=doc, config_class=config)
    # So that saving copies this file: old releases do not set it when they load by an Auto class.
    members["_auto_class"] = "AutoModel" if kind == "Model" else f"AutoModel{kind}"
    if kind != "Model":
        members["base_class"] = model_class(model_type, "Model")
    return type(name, (pruned, dense), members)


def __getattr__(name: str) -> type:
    """The model classes by their names, for importing and unpickling them."""
    for model_type, family in FAMILY_NAMES.items():
        if name.removeprefix(f"Olica{family}") in KINDS:
            return model_class(model_type, name.removeprefix(f"Olica{family}"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
