"""Which device work runs on, and the memory that it leaves."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # CUDA itself, cuBLAS and cuSOLVER take memory of their own, past torch's allocator.
    return should_reduce_batch_size(error) or any(
        words in str(error) for words in ("CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    )


def is_of_host(error: BaseException) -> bool:
    """Whether the memory that ran out is the host's, not a GPU's."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_explained(advice: Callable[[bool], str]) -> Iterator[None]:
    """Turn memory that runs out into a UsageError that ends in `advice`, which is told whether it was the host's."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "the host has none left").splitlines()[0]
        raise UsageError(f"out of memory ({reason}); {advice(is_of_host(error))}") from error


def hand_back_memory() -> None:
    """Give host memory that was freed back to the system: glibc keeps what lies below a block that is in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
