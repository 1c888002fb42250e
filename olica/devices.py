"""Which device work runs on."""

import torch

from .errors import UsageError


def pick_device(name: str, flag: str = "--device") -> torch.device:
    """The device named "cpu", "cuda" or "auto" (a GPU if there is one).

    Raises:
        UsageError: "cuda" where there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{flag} cuda: torch sees no GPU; give {flag} cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
