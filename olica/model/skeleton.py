"""A model without weights: how it is made, of a plan where it is pruned, tried out and counted."""

from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .configuration_olica import LayerShape
from .dense_form import dense_config
from .families import FAMILIES
from .layouts import DECI, DENSE, LAYOUTS, OWN_LAYOUT, Layout, check_fits, deci_config, stock_config
from .modeling_deci import DeciLMForCausalLM
from .modeling_olica import module_paths

# The parts of a decoder layer, and the modules of each. A correction, where there is one, stands beside the MLP.
PARTS = {
    "query_key": ("q_proj", "k_proj"),
    "value_output": ("v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "correction": ("correction",),
}


def without_weights(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model that `make` makes, all of it on the meta device, where no initial weight is drawn in vain."""
    with no_init_weights(), torch.device("meta"):
        model = make()
    model.tie_weights()  # which belongs to what was left out
    return model


def pruned_skeleton(
    config: PreTrainedConfig, plan: list[LayerShape], layout: Layout = LAYOUTS[OWN_LAYOUT]
) -> PreTrainedModel:
    """The pruned form, without weights, of a dense model of `config` whose layers get the sizes `plan`.

    Raises:
        ValueError: the plan fits neither the model nor the layout.
    """
    check_fits(layout, plan, config)
    if layout.name == DECI:
        sized = deci_config(config, plan)
        return without_weights(lambda: DeciLMForCausalLM(sized))
    if layout.is_stock or layout.name == DENSE:
        own = stock_config(config, plan[0]) if layout.is_stock else dense_config(config, plan)
        return without_weights(lambda: AutoModelForCausalLM.from_config(own))
    pruned_class = FAMILIES[config.model_type]
    settings = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        settings.pop(key, None)
    pruned_config = pruned_class.config_class(**settings, layer_shapes=[shape.to_dict() for shape in plan])
    return without_weights(lambda: pruned_class(pruned_config))


@torch.no_grad()
def try_out(model: PreTrainedModel) -> None:
    """Check a model's settings as saving does, and send two tokens through it on the meta device, into its cache.

    No weight is needed. Rotary embeddings that are scaled as texts grow are no longer so afterwards: they ask for the
    largest position, of which the meta device knows nothing.

    Raises:
        Exception: what the model would later raise, for settings that only saving or a forward pass meets.
    """
    model.config.validate()
    for module in model.modules():
        if vars(module).get("rope_type") == "dynamic":
            vars(module)["rope_type"] = "default"
    model(torch.ones(1, 2, dtype=torch.long, device="meta"), use_cache=True)


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count the distinct parameters, tied ones once: `total`, and `decoder_layers` alone.

    `total` includes embeddings, head and norms; the linear corrections of a pruned model are in both.
    """
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "decoder_layers": sum(parameter.numel() for parameter in model.get_decoder().layers.parameters()),
    }


def count_by_part(config: PreTrainedConfig, plan: list[LayerShape]) -> list[dict[str, int]]:
    """Parameters of every part of PARTS of each decoder layer whose sizes are `plan`, biases included.

    What belongs to no part, such as norms, is left out. The layout makes no difference.

    Raises:
        ValueError: the plan does not fit the model.
    """
    layers = pruned_skeleton(config, plan).get_decoder().layers
    return [_by_part(layer) for layer in layers]


def _by_part(layer: torch.nn.Module) -> dict[str, int]:
    sizes = {
        name: sum(parameter.numel() for parameter in layer.get_submodule(path).parameters())
        for name, path in module_paths(layer).items()
    }
    return {part: sum(sizes.get(name, 0) for name in names) for part, names in PARTS.items()}
