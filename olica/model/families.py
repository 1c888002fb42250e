"""The supported families: their pruned models, by the `model_type` of the dense one."""

from typing import Any

from transformers import CONFIG_MAPPING

from .configuration_olica import FAMILY_NAMES
from .modeling_olica import KINDS, model_class


def pruned_models(kind: str) -> dict[str, Any]:
    """The pruned models of one of KINDS, of those families of which the installed transformers has such a model."""
    library, _ = KINDS[kind]
    installed = [model_type for model_type in FAMILY_NAMES if model_type in CONFIG_MAPPING]
    return {name: model_class(name, kind) for name in installed if CONFIG_MAPPING[name] in library}


FAMILIES = pruned_models("ForCausalLM")
SEQUENCE_CLASSIFIERS = pruned_models("ForSequenceClassification")
TOKEN_CLASSIFIERS = pruned_models("ForTokenClassification")
