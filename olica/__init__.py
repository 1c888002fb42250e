"""Structured pruning of LLaMA-like language models without retraining (Olica, ICML 2025).

Importing the package makes pruned checkpoints known to the Auto classes of transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_olica import LayerShape
from .modeling_olica import FAMILIES

__all__ = ["FAMILIES", "LayerShape"]

for _causal_lm in FAMILIES.values():
    _config, _model = _causal_lm.config_class, _causal_lm.base_class
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)
    # save_pretrained then copies the two modelling files into the checkpoint, which needs no olica to load.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal_lm.register_for_auto_class("AutoModelForCausalLM")
