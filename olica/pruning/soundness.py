"""What can go wrong in the numbers, said in a sentence that names the layer and the projection."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checks import all_finite
from ..errors import UsageError
from ..methods.linalg import SingularError
from ..methods.moments import TAPS, Moments


def _wider(dtype: torch.dtype) -> str:
    """What a user can do whose numbers leave the range of `dtype`."""
    if dtype == torch.float16:
        return "--dtype bfloat16 or float32 has a wider range"
    return f"no --dtype has a wider range than {str(dtype).removeprefix('torch.')}: look at the weights of --base_model"


def check_finite(moments: Moments, index: int, dtype: torch.dtype) -> None:
    """Raise UsageError if activations that were summed in layer `index`, computed in `dtype`, are NaN or infinite."""
    overflown = moments.not_finite()
    if overflown:
        places = ", ".join("{1} of {0}".format(*TAPS[tap]) for tap in overflown)
        raise UsageError(f"in layer {index} the activations at the {places} are NaN or infinite; {_wider(dtype)}")


def check_trial(states: Tensor, layers: range) -> None:
    """Raise UsageError if `states` (n, T, D), those of a model with another form of `layers`, are NaN or infinite."""
    if not all_finite(states):
        tried = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        wider = _wider(states.dtype)
        raise UsageError(f"with another form of {tried} the model's output is NaN or infinite; {wider}")


def check_logits(logits: Tensor) -> None:
    """Raise UsageError if logits by which sizes are decided are NaN or infinite."""
    if not all_finite(logits):
        raise UsageError(f"the model's logits of the calibration set are NaN or infinite; {_wider(logits.dtype)}")


@contextmanager
def solvable(index: int, projections: str) -> Iterator[None]:
    """Say in which layer, and of which projections, a fit is too weakly regularised or a decomposition fails."""
    try:
        yield
    except SingularError as error:
        raise UsageError(
            f"{error}: in layer {index} the regression on {error.inputs} is singular; raise it, or --num_samples, "
            "unless that input is always zero"
        ) from error
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"--base_model: in layer {index} the decomposition of {projections} fails ({str(error).splitlines()[0]}); "
            "another calibration set (--datasets, --num_samples) may help"
        ) from error


def cast_weights(weights: dict[str, Tensor], index: int, like: Tensor) -> dict[str, Tensor]:
    """Computed weights of layer `index` in the dtype and on the device of `like`.

    Raises:
        UsageError: the dtype cannot hold them.
    """
    cast = {name: weight.to(like).contiguous() for name, weight in weights.items()}
    overflown = [name for name, weight in cast.items() if not all_finite(weight)]
    if overflown:
        raise UsageError(f"in layer {index} the new {', '.join(overflown)} cannot be held; {_wider(like.dtype)}")
    return cast
