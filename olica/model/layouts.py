"""Layouts of checkpoints: what each can hold, and the configuration of one without code of ours.

A layout decides what may be pruned, so that methods are told of it beforehand.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

from transformers import PreTrainedConfig

from ..errors import UsageError
from .configuration_olica import LayerShape, attends_with_all_heads, head_dim
from .modeling_deci import DeciLMConfig


@dataclass(frozen=True)
class Layout:
    """What a checkpoint can hold.

    Attributes:
        name: value of the flag `--layout`.
        about: a sentence that says what it cannot hold, and what that costs.
        is_bare: whether projections are single matrices of whole heads, without biases that the family lacks and
            without corrections.
        is_alike: whether all layers have the same sizes.
        families: that it holds; none: all but those of FUSED_FAMILIES.
        round_to: sizes are multiples of it unless others are asked for.
        kv_heads: how many key/value heads a layer may keep, ascending, all of them last; of a family alone.
    """

    name: str
    about: str
    is_bare: bool = False
    is_alike: bool = False
    families: tuple[str, ...] = ()
    round_to: int = 1
    kv_heads: tuple[int, ...] = ()

    @property
    def is_stock(self) -> bool:
        """Whether a checkpoint is of the family's own architecture, which needs no code."""
        return self.is_bare and self.is_alike

    @property
    def has_code(self) -> bool:
        """Whether transformers needs the code in a checkpoint's folder, or this package."""
        return self.name in (OWN_LAYOUT, DECI)


OWN_LAYOUT, DECI, DENSE = "olica", "deci", "dense"
# Families whose own models have fused projections.
FUSED_FAMILIES = ("phi3",)
# Most engines know an MLP of DeciLM by a factor m, from which they take 2 m D / 3 channels, rounded up to this.
FFN_GRID = 256
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(OWN_LAYOUT, "all that a recipe can do; transformers reads it with the code in its folder"),
        Layout(
            "stock",
            "the family's own architecture, which any engine reads; it has no factors, narrower heads, biases or "
            "corrections, and the same sizes in every layer, so that one that can spare more does not",
            is_bare=True,
            is_alike=True,
            round_to=32,  # what Q8_0 of GGUF wants of the rows of a matrix
        ),
        Layout(
            DECI,
            "a LLaMA whose MLPs have widths of their own, which engines read as DeciLM, transformers with the code in "
            "its folder; it has no factors, narrower heads, biases or corrections, and all heads stay, so that MLPs "
            "lose all that goes. Engines but vLLM and llama.cpp want widths that are multiples of 256 (--round_to 256)",
            is_bare=True,
            families=("llama", "mistral"),
            round_to=32,
        ),
    )
}
# What a checkpoint of ours can be made into; those of LAYOUTS only where it was pruned to nothing else.
EXPORTS = {
    **{name: layout for name, layout in LAYOUTS.items() if layout.is_bare},
    DENSE: Layout(
        DENSE,
        "the dense model's own architecture, which any engine reads, of its size and as slow: factors are multiplied "
        "out, zeros are put where something was removed, and corrections go into removed channels where the family can "
        "have biases in its MLPs",
    ),
}


def for_family(layout: Layout, config: PreTrainedConfig) -> Layout:
    """The layout of a model of `config`, which knows how many key/value heads a layer may keep.

    Raises:
        UsageError: it holds no model of this family.
    """
    if not layout.is_bare:
        return layout
    family, heads = config.model_type, config.num_key_value_heads
    if family in FUSED_FAMILIES:
        raise UsageError(
            f"--layout {layout.name} is not written for {family}, whose projections are fused: prune to {OWN_LAYOUT}, "
            f"of which a checkpoint can be exported to {DENSE}"
        )
    if layout.families and family not in layout.families:
        raise UsageError(
            f"--layout {layout.name} holds models of {', '.join(layout.families)}, and this is one of {family}: give "
            "another --layout"
        )
    if not layout.is_alike:
        if getattr(config, "sliding_window", None) is not None:
            raise UsageError(
                f"--layout {layout.name} has no attention windows, and the model has one of {config.sliding_window} "
                "tokens: give another --layout"
            )
        return replace(layout, kv_heads=(heads,))
    counts = (*(count for count in range(1, heads) if can_keep(count, config)), heads)
    about = layout.about
    if len(counts) < heads:
        words = ", ".join(map(str, counts))
        about += f"; of {heads} key/value heads a layer keeps {words}, since {family} can have no other number"
    return replace(layout, about=about, kv_heads=counts)


def can_keep(kv_heads: int, config: PreTrainedConfig) -> bool:
    """Whether the family's own model can have so many key/value heads, fewer than that of `config`, of the same width.

    Not where attention computes all heads whatever is kept; where the configuration has no field for the width, which
    engines take for the hidden size over the heads then; and where the configuration refuses that many query heads, as
    some do that are no divisor of the hidden size.
    """
    if attends_with_all_heads(config) or "head_dim" not in (field.name for field in fields(config)):
        return False
    try:
        stock_config(config, LayerShape(0, 0, head_dim(config), config.intermediate_size, kv_heads=kv_heads))
    except Exception:  # the libraries share none
        return False
    return True


def check_fits(layout: Layout, plan: Collection[LayerShape], config: PreTrainedConfig) -> None:
    """Raise ValueError, with a sentence, unless a checkpoint of the layout, as `for_family` has it, holds a plan."""
    if not layout.is_bare:
        return
    added = {
        "factors": ("q_rank", "k_rank", "v_rank", "o_rank"),
        "corrections": ("correction_rank",),
        "biases": ("o_bias", "down_bias"),
    }
    found = [words for words, sizes in added.items() if any(getattr(shape, size) for shape in plan for size in sizes)]
    found += ["narrower value heads"] if any(shape.v_head_dim < head_dim(config) for shape in plan) else []
    counts = sorted({shape.kv_heads for shape in plan} - {0, *layout.kv_heads})
    found += [f"{count} key/value heads" for count in counts]
    found += ["layers of different sizes"] if layout.is_alike and len(set(plan)) > 1 else []
    if found:
        raise ValueError(f"the layout {layout.name} cannot hold {', '.join(found)}")


def deci_config(config: PreTrainedConfig, plan: Sequence[LayerShape]) -> DeciLMConfig:
    """The configuration of a DeciLM whose layers have the widths of a plan that fits the layout."""
    whole = {"no_op": False, "replace_with_linear": False}
    attention = {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads} | whole
    widths = [shape.intermediate_size for shape in plan]
    blocks = [{"attention": attention, "ffn": {"intermediate_size": width} | whole} for width in widths]
    if not any(width % FFN_GRID for width in widths):
        for block, width in zip(blocks, widths, strict=True):
            block["ffn"]["ffn_mult"] = 3 * width / (2 * config.hidden_size)
    own = ("model_type", "architectures", "transformers_version")
    settings = {name: value for name, value in config.to_dict().items() if name not in own}
    settings |= {"intermediate_size": max(widths), "block_configs": blocks}
    return DeciLMConfig(**settings)


def stock_config(config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
    """The configuration of the family's own model whose layers all have the sizes `shape`, which fits the layout."""
    settings = config.to_dict() | {"intermediate_size": shape.intermediate_size}
    if shape.kv_heads:
        groups = config.num_attention_heads // config.num_key_value_heads
        settings |= {"num_key_value_heads": shape.kv_heads, "num_attention_heads": groups * shape.kv_heads}
        settings["head_dim"] = head_dim(config)  # no longer the hidden size over the heads
    return type(config).from_dict(settings)
