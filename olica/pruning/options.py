"""What a recipe leaves open."""

from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..machine import BatchSize
from ..methods.moments import Moments, diagonal
from ..methods.recipes import Recipe


@dataclass(frozen=True)
class PruningOptions:
    """What the recipe leaves open.

    Attributes:
        percdamp: strength of the ridge.
        mlp_num: how many MLPs get a linear correction.
        correction_rank: rank of a correction.
        batch_size: samples that go through a layer at a time.
        device: where layers run.
        cache_device: where the hidden states (N, T, D) of the calibration set live.
    """

    percdamp: float
    mlp_num: int
    correction_rank: int
    batch_size: BatchSize
    device: torch.device
    cache_device: torch.device

    def ridge(self, recipe: Recipe, moments: Moments, ids_shape: tuple[int, int]) -> float:
        """Ridge penalty of a regression on the MLP's input, for a calibration set of `ids_shape` (N, T)."""
        mean_diagonal = moments[diagonal("mlp_input")].mean().item()
        return recipe.ridge(self.percdamp, mean_diagonal, *ids_shape)


def check_mlp_num(mlp_num: int, num_layers: int, recipe: Recipe) -> None:
    """Raise UsageError unless so many layers can be calibrated."""
    eligible = recipe.eligible_layers(num_layers)
    if not 0 <= mlp_num <= eligible:
        reason = "" if recipe.last_is_eligible else ", since it never calibrates the last one"
        raise UsageError(
            f"--mlp_num {mlp_num} does not fit: of the model's {num_layers} layers --recipe {recipe.name} can "
            f"calibrate 0 to {eligible}{reason}"
        )
