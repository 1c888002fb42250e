"""What a global threshold leaves, by brute force; and a dense model whose units are silenced by hooks."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tiny_families import make_family
from torch import nn

from olica.model.configuration_olica import LayerShape
from olica.model.modeling_olica import projections_of, separate_projections

# Of a model of `tiny_families`: heads and channels go, only heads, only channels.
KEPT_HEADS, KEPT_CHANNELS = (2, 1, 3), (101, 177, 60)


def family_plan(biases: bool) -> list[LayerShape]:
    """A plan for a model of `tiny_families` with three key/value heads."""
    return [
        LayerShape(
            0, 0, 10, channels, kv_heads=heads % 3, o_bias=biases and heads < 3, down_bias=biases and channels < 177
        )
        for heads, channels in zip(KEPT_HEADS, KEPT_CHANNELS, strict=True)
    ]


def weights_of(model) -> list[dict[str, np.ndarray]]:
    """The projections of every layer, by name; those of fused ones too."""
    copy = make_family(model.config.model_type) if model.config.model_type == "phi3" else model
    found = []
    for layer in copy.model.layers:
        separate_projections(layer, copy.config)
        found.append({n: m.weight.detach().double().numpy() for n, m in projections_of(layer)._asdict().items()})
    return found


def inputs_of(model, ids: torch.Tensor) -> list[dict[str, np.ndarray]]:
    """What the projections of every layer read (tokens, features), by their names."""
    found: list[dict[str, np.ndarray]] = [{} for _ in model.model.layers]
    handles = []
    for inputs, layer in zip(found, model.model.layers, strict=True):
        for name, module in (*layer.self_attn.named_children(), *layer.mlp.named_children()):
            if not name.endswith("_proj"):
                continue

            def keep(_, args, inputs=inputs, name=name) -> None:
                inputs[name] = args[0].detach().flatten(0, 1).double().numpy()

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def lowest(scores: np.ndarray, kept: int) -> np.ndarray:
    """Indices of all but the `kept` highest."""
    return np.sort(np.argsort(scores, kind="stable")[: len(scores) - kept])


def features(groups: np.ndarray, config) -> np.ndarray:
    """Of some key/value heads the features of their query heads, as o_proj reads them."""
    width = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    return (groups[:, None] * width + np.arange(width)).flatten()


def counts_by_hand(scores: list[tuple[np.ndarray, np.ndarray]], costs: tuple[int, int], budget: float) -> list:
    """How many groups and channels of every layer go: the lowest of all while they fit, but the best of each kind."""
    units = [
        (score, layer, kind)
        for layer, parts in enumerate(scores)
        for kind, part in enumerate(parts)
        for score in np.sort(part)[:-1]
    ]
    gone = [[0, 0] for _ in scores]
    for _, layer, kind in sorted(units, key=lambda unit: unit[0]):
        if budget >= costs[kind] or (kind == 1 and budget >= costs[1] / 2):
            gone[layer][kind] += 1
            budget -= costs[kind]
    return gone


@contextmanager
def silenced(model: nn.Module, gone: list[dict[str, np.ndarray]], values: list[dict[str, np.ndarray]]) -> Iterator:
    """Have the inputs of o_proj and down_proj hold `values` (all their features) where they are `gone` (indices)."""
    handles = []
    for layer, indices, means in zip(model.model.layers, gone, values, strict=True):
        for name, module in (("o_proj", layer.self_attn.o_proj), ("down_proj", layer.mlp.down_proj)):

            def replaced(_, args, index=indices[name], mean=means[name]) -> tuple:
                changed = args[0].clone()
                changed[..., index] = torch.from_numpy(mean[index]).to(changed)
                return (changed,)

            handles.append(module.register_forward_pre_hook(replaced))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
