"""Layouts of checkpoints: what each can hold, and the configuration of one without code of ours.

A layout decides what may be pruned, so that methods are told of it beforehand.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace

from transformers import PreTrainedConfig

from ..errors import UsageError
from .configuration_olica import LayerShape, attends_with_all_heads, head_dim


@dataclass(frozen=True)
class Layout:
    """What a checkpoint can hold.

    Attributes:
        name: value of the flag `--layout`.
        about: a sentence that says what it cannot hold, and what that costs.
        is_stock: whether a checkpoint is of the family's own architecture: all layers have the same sizes, projections
            are single matrices of whole heads, there are no biases that the family lacks and no corrections.
        round_to: sizes are multiples of it unless others are asked for.
        kv_heads: how many key/value heads a layer may keep, ascending, all of them last; of a family alone.
    """

    name: str
    about: str
    is_stock: bool = False
    round_to: int = 1
    kv_heads: tuple[int, ...] = ()


OWN_LAYOUT = "olica"
# Families whose own models have fused projections.
FUSED_FAMILIES = ("phi3",)
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(OWN_LAYOUT, "all that a recipe can do; transformers reads it with the code in its folder"),
        Layout(
            "stock",
            "the family's own architecture, which any engine reads; it has no factors, narrower heads, biases or "
            "corrections, and the same sizes in every layer, so that one that can spare more does not",
            is_stock=True,
            round_to=32,  # what Q8_0 of GGUF wants of the rows of a matrix
        ),
    )
}


def for_family(layout: Layout, config: PreTrainedConfig) -> Layout:
    """The layout of a model of `config`, which knows how many key/value heads a layer may keep.

    Raises:
        UsageError: it holds no model of this family.
    """
    if not layout.is_stock:
        return layout
    family, heads = config.model_type, config.num_key_value_heads
    if family in FUSED_FAMILIES:
        raise UsageError(
            f"--layout {layout.name} is not written for {family}, whose projections are fused: give {OWN_LAYOUT}"
        )
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
    if not layout.is_stock:
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
    found += ["layers of different sizes"] if len(set(plan)) > 1 else []
    if found:
        raise ValueError(f"the layout {layout.name} cannot hold {', '.join(found)}")


def stock_config(config: PreTrainedConfig, shape: LayerShape) -> PreTrainedConfig:
    """The configuration of the family's own model whose layers all have the sizes `shape`, which fits the layout."""
    settings = config.to_dict() | {"intermediate_size": shape.intermediate_size}
    if shape.kv_heads:
        groups = config.num_attention_heads // config.num_key_value_heads
        settings |= {"num_key_value_heads": shape.kv_heads, "num_attention_heads": groups * shape.kv_heads}
        settings["head_dim"] = head_dim(config)  # no longer the hidden size over the heads
    return type(config).from_dict(settings)
