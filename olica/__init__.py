"""Structured pruning of LLaMA-like language models without retraining (Olica, ICML 2025).

Importing the package makes pruned checkpoints known to the Auto classes of transformers.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .model.configuration_olica import LayerShape
from .model.families import FAMILIES, SEQUENCE_CLASSIFIERS, TOKEN_CLASSIFIERS
from .model.modeling_deci import DeciLMForCausalLM
from .version import __version__

__all__ = ["FAMILIES", "LayerShape", "RECIPES", "__version__", "evaluate", "prune", "sweep"]

# Public names, by the modules that define them: these take seconds to import, and loading a checkpoint needs none.
_LAZY = {
    "evaluate": "olica.evaluation.evaluate",
    "prune": "olica.run",
    "sweep": "olica.sweeping.work",
    "RECIPES": "olica.methods.recipes",
}

_CAUSAL_LMS = [*FAMILIES.values(), DeciLMForCausalLM]
for _causal_lm in _CAUSAL_LMS:
    _config, _model = _causal_lm.config_class, _causal_lm.base_class
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    # save_pretrained then copies the modelling files into the checkpoint, which needs no olica to load.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
for _auto, _models in (
    (AutoModelForCausalLM, _CAUSAL_LMS),
    (AutoModelForSequenceClassification, SEQUENCE_CLASSIFIERS.values()),
    (AutoModelForTokenClassification, TOKEN_CLASSIFIERS.values()),
):
    for _model in _models:
        _auto.register(_model.config_class, _model)
        _model.register_for_auto_class(_auto.__name__)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
