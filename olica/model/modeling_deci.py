"""LLaMA whose layers have MLPs of different widths, by the names that engines know it by: DeciLM.

This file is copied into every checkpoint of the layout `deci`, and imports nothing of ours. Engines go by the name of
the architecture and read `block_configs`; transformers has no such model and takes this one.
"""

import copy

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP


class Block(dict):
    """A part of `block_configs`: a plain dictionary for config.json, an object with attributes for engines."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def as_block(value):
    """`value`, its dictionaries as `Block`."""
    return Block({key: as_block(inner) for key, inner in value.items()}) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """LLaMA's configuration with `block_configs`: of every layer how its attention and its MLP are.

    `intermediate_size` is that of the widest MLP. All layers have all heads.
    """

    model_type = "nemotron-nas"

    def __setattr__(self, name, value):
        if name == "block_configs" and value is not None:
            value = [as_block(block) for block in value]
        super().__setattr__(name, value)

    def to_dict(self):
        """The settings, rotary embeddings by their former names too, whichever release saves a checkpoint again.

        An old release takes a theta of 10,000 and is silent where it finds the names of today alone.
        """
        settings = super().to_dict()
        if rope := settings.get("rope_parameters"):
            kind = {name: value for name, value in rope.items() if name != "rope_theta"}
            scaling = None if kind.get("rope_type") == "default" else kind
            settings |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        return settings


class DeciLMModel(LlamaModel):
    """The base model."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        for layer, block in zip(self.layers, config.block_configs, strict=True):
            sized = copy.copy(config)
            sized.intermediate_size = block.ffn.intermediate_size
            layer.mlp = LlamaMLP(sized)
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """The causal language model."""

    config_class = DeciLMConfig
    base_class = DeciLMModel

    def __init__(self, config):
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
