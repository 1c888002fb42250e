"""Errors in words: the one exception that a user can cause, and how those of libraries become it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size


class UsageError(ValueError):
    """Wrong input: the message is a sentence that names the flag or file and what to do.

    The command lines print it and end with exit status 2.
    """


@contextmanager
def in_words(
    sentence: Callable[[Exception], str],
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    let_through: Callable[[Exception], bool] | None = None,
) -> Iterator[None]:
    """Turn errors of libraries, which share no exception of their own, into a UsageError; one that is one stays as is.

    Args:
        sentence: gives the message for an error.
        kinds: of errors that are turned.
        let_through: whether an error is none of those; left out, `is_no_fault_of_input`.

    Raises:
        UsageError: with that message, caused by the error.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        if (let_through or is_no_fault_of_input)(error):
            raise
        raise UsageError(sentence(error)) from error


def memory_in_words(advice: Callable[[bool], str]) -> AbstractContextManager[None]:
    """Turn memory that runs out into a UsageError that ends in `advice`, which is given whether it was the host's."""
    return in_words(
        lambda error: f"out of memory ({reason(error, 'the host has none left')}); {advice(is_of_host(error))}",
        let_through=lambda error: not is_out_of_memory(error),
    )


def is_no_fault_of_input(error: Exception) -> bool:
    """Whether an error comes of a mistake in a program, or of memory that runs out, and not of a file or a flag."""
    return isinstance(error, NameError | AssertionError) or is_out_of_memory(error)


def reason(error: BaseException, otherwise: str | None = None) -> str:
    """The first line of an error's message; where it has none, `otherwise` or else the name of its class."""
    return (str(error).strip() or otherwise or type(error).__name__).splitlines()[0]


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
