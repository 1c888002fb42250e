"""Which device work runs on, and the memory that it leaves."""

import ctypes
import sys

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


def hand_back_memory() -> None:
    """Give host memory that was freed back to the system: glibc keeps what lies below a block that is in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
