"""A pruned model without weights: how it is made of a plan, tried out and counted."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_olica import LayerShape
from .families import FAMILIES


def pruned_skeleton(config: PreTrainedConfig, plan: list[LayerShape]) -> PreTrainedModel:
    """The pruned form, without weights, of a dense model of `config` whose layers get the sizes `plan`.

    Raises:
        ValueError: the plan does not fit the model.
    """
    pruned_class = FAMILIES[config.model_type]
    settings = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    with torch.device("meta"):
        return pruned_class(pruned_class.config_class(**settings, layer_shapes=[shape.to_dict() for shape in plan]))


@torch.no_grad()
def try_out(model: PreTrainedModel) -> None:
    """Check a model's settings as saving does, and send two tokens through it on the meta device, into its cache.

    No weight is needed.

    Raises:
        Exception: what the model would later raise, for settings that only saving or a forward pass meets.
    """
    model.config.validate()
    model(torch.ones(1, 2, dtype=torch.long, device="meta"), use_cache=True)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count the distinct parameters, tied ones once: `total`, and `decoder_layers` alone.

    `total` includes embeddings, head and norms; the linear corrections of a pruned model are in both.
    """
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "decoder_layers": sum(parameter.numel() for parameter in model.get_decoder().layers.parameters()),
    }
