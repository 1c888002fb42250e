"""What greedy removal and exchanges leave, by brute force: every candidate is removed and solved anew, from samples."""

import copy

import numpy as np
import torch
from by_threshold import inputs_of, weights_of

from olica.methods.obs import GROUP_SHARE, SMALLEST_GROUP


def regularised(x: np.ndarray, damping: float) -> np.ndarray:
    """The samples x (N, f) and f more, so that their second moment is H = C + damping mean(diag C) I."""
    scale = damping * (x**2).mean()
    return np.concatenate([x, np.sqrt(len(x) * scale) * np.eye(x.shape[1])])


class ByHand:
    """The problem of W (O, f) on samples (N, f), f of them pseudo-samples, whose units have `width` features."""

    def __init__(self, weight: np.ndarray, samples: np.ndarray, width: int = 1):
        self.weight, self.samples, self.width = weight, samples, width
        self.count = len(samples) - weight.shape[1]
        self.units = weight.shape[1] // width

    def columns(self, units) -> np.ndarray:
        return (np.asarray(sorted(units), dtype=int)[:, None] * self.width + np.arange(self.width)).flatten()

    def solved(self, staying: set[int]) -> np.ndarray:
        """W' (O, f), zero where units are gone."""
        columns, full = self.columns(staying), np.zeros_like(self.weight)
        if len(columns):
            y = self.samples @ self.weight.T
            full[:, columns] = np.linalg.lstsq(self.samples[:, columns], y, rcond=None)[0].T
        return full

    def error(self, staying: set[int]) -> float:
        return float(((self.samples @ (self.weight - self.solved(staying)).T) ** 2).sum() / self.count)

    def costs(self, staying: set[int]) -> dict[int, float]:
        """What the error grows by if a unit that stays goes."""
        return {u: self.error(staying - {u}) - self.error(staying) for u in staying}

    def gains(self, staying: set[int]) -> dict[int, float]:
        """What the error falls by if a unit that is gone comes."""
        return {u: self.error(staying) - self.error(staying | {u}) for u in set(range(self.units)) - staying}

    def greedy(self, kept: int, smallest: int = 1, share: float = 0.0) -> set[int]:
        staying = set(range(self.units))
        while left := len(staying) - kept:
            costs = self.costs(staying)
            group = min(left, max(smallest, int(share * left)))
            staying = staying - set(sorted(costs, key=costs.get)[:group])
        return staying

    def exchanged(self, staying: set[int], rounds: int) -> set[int]:
        gone = self.units - len(staying)
        size = min(max(1, int(GROUP_SHARE * gone)), len(staying), gone)
        while size and rounds:
            rounds -= 1
            costs = self.costs(staying)
            fewer = staying - set(sorted(costs, key=costs.get)[:size])
            gains = self.gains(fewer)
            other = fewer | set(sorted(gains, key=gains.get, reverse=True)[:size])
            if other != staying and self.error(other) < self.error(staying):
                staying = other
            else:
                size //= 2
        return staying


def prune_by_hand(model, ids: torch.Tensor, plan, damping: float, rounds: int):
    """The dense model with zeros for what goes and refitted columns, and what stays in each layer.

    Every part is chosen on what the parts before it give.
    """
    model, config = copy.deepcopy(model), model.config
    width = config.hidden_size // config.num_key_value_heads
    kept = []
    for index, shape in enumerate(plan):
        layer, stay = model.model.layers[index], []
        parts = (
            ("o_proj", layer.self_attn.o_proj, shape.kv_heads or config.num_key_value_heads, width),
            ("down_proj", layer.mlp.down_proj, shape.intermediate_size, 1),
        )
        for name, linear, count, unit in parts:
            samples = regularised(inputs_of(model, ids)[index][name], damping)
            problem = ByHand(weights_of(model)[index][name], samples, unit)
            groups = (1, 0.0) if name == "o_proj" else (SMALLEST_GROUP, GROUP_SHARE)
            staying = problem.exchanged(problem.greedy(count, *groups), rounds)
            if count < problem.units:
                with torch.no_grad():
                    linear.weight.copy_(torch.from_numpy(problem.solved(staying)))
            stay.append(problem.columns(staying))
        kept.append(stay)
    return model, kept
