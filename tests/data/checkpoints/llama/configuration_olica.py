"""Sizes of pruned decoder layers, and one configuration per model family.

This file and `modeling_olica.py` are copied into every pruned checkpoint, so they import nothing of ours but each
other. The scalars of the dense configuration (`intermediate_size`, `head_dim`, ...) stay as they were: the Hugging
Face constructor builds the dense modules and `shrink_layer` narrows them to `layer_shapes`.
"""

from dataclasses import MISSING, asdict, dataclass, fields

from huggingface_hub.dataclasses import strict
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one pruned decoder layer; a rank of 0 means that there are no factors.

    Attributes:
        q_rank: inner width of the factors of `q_proj`, 0 where it stays one dense matrix.
        k_rank: the same for `k_proj`.
        v_head_dim: width that each value head keeps, at most `head_dim`.
        intermediate_size: channels that the MLP keeps.
        calibration_rank: inner width of the linear correction beside the MLP, 0 where there is none.
        v_rank: inner width of the factors of `v_proj`, 0 where its heads are narrowed, or it stays dense.
        o_rank: the same for `o_proj`.
    """

    q_rank: int
    k_rank: int
    v_head_dim: int
    intermediate_size: int
    calibration_rank: int = 0
    v_rank: int = 0
    o_rank: int = 0

    def to_dict(self) -> dict[str, int]:
        """The sizes as a plain dictionary, the form in which `config.json` holds them."""
        return asdict(self)


def head_dim(config) -> int:
    """Width of a query head, for configurations that leave it to `hidden_size / num_attention_heads`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_layer_shapes(config) -> None:
    """Raise ValueError unless `config.layer_shapes` fits the dense sizes of `config`.

    A checkpoint edited by hand, or cut short, is told here rather than by a size mismatch of some tensor.
    """
    shapes = config.layer_shapes
    if shapes is None:
        return
    if len(shapes) != config.num_hidden_layers:
        raise ValueError(f"layer_shapes has {len(shapes)} rows for {config.num_hidden_layers} layers")
    names = {field.name for field in fields(LayerShape)}
    required = {field.name for field in fields(LayerShape) if field.default is MISSING}
    largest = {"v_head_dim": head_dim(config), "intermediate_size": config.intermediate_size}
    for index, shape in enumerate(shapes):
        if not required <= set(shape) <= names:
            raise ValueError(f"layer_shapes[{index}] has the keys {sorted(shape)}, not {sorted(names)}")
        for name, size in shape.items():
            if not (1 if name in largest else 0) <= size <= largest.get(name, size):
                raise ValueError(f"layer_shapes[{index}]: {name} = {size} does not fit this model")


@dataclass(kw_only=True)
class PrunedConfig:
    """What every family's configuration gains: the sizes of each decoder layer, one row per layer (None: all dense)."""

    layer_shapes: list[dict[str, int]] | None = None

    # Sharding a zero-padded value projection over devices by the dense model's plan would cut heads apart.
    base_model_tp_plan = None

    def validate_architecture(self):
        """Part of the strict validation: the dense sizes, then the sizes of every layer."""
        super().validate_architecture()
        check_layer_shapes(self)


@strict
class OlicaLlamaConfig(PrunedConfig, LlamaConfig):
    """A pruned LLaMA."""

    model_type = "olica_llama"


@strict
class OlicaMistralConfig(PrunedConfig, MistralConfig):
    """A pruned Mistral."""

    model_type = "olica_mistral"


@strict
class OlicaQwen2Config(PrunedConfig, Qwen2Config):
    """A pruned Qwen2."""

    model_type = "olica_qwen2"


@strict
class OlicaQwen3Config(PrunedConfig, Qwen3Config):
    """A pruned Qwen3."""

    model_type = "olica_qwen3"


@strict
class OlicaSmolLM3Config(PrunedConfig, SmolLM3Config):
    """A pruned SmolLM3."""

    model_type = "olica_smollm3"


@strict
class OlicaGraniteConfig(PrunedConfig, GraniteConfig):
    """A pruned Granite."""

    model_type = "olica_granite"


@strict
class OlicaOlmo2Config(PrunedConfig, Olmo2Config):
    """A pruned OLMo 2."""

    model_type = "olica_olmo2"


@strict
class OlicaGemma2Config(PrunedConfig, Gemma2Config):
    """A pruned Gemma 2."""

    model_type = "olica_gemma2"


@strict
class OlicaGemma3TextConfig(PrunedConfig, Gemma3TextConfig):
    """A pruned Gemma 3 (text)."""

    model_type = "olica_gemma3_text"


@strict
class OlicaPhi3Config(PrunedConfig, Phi3Config):
    """A pruned Phi-3."""

    model_type = "olica_phi3"
