"""A pretended GPU: tensors that say they are on `cuda:0`, compute on the CPU, and refuse to meet host tensors.

It shows of a program's placement of tensors what a GPU shows: an operation on tensors of both devices fails, memory of
the device is counted and runs out, and threads, libraries and command lines see a device that is there. It says nothing
of time, of kernels, nor of what they take beside the tensors that they return.

    gpu = PretendedGpu(memory=10**9)
    with gpu.installed(compiled_guard(folder)):
        torch.ones(3, device="cuda") + torch.ones(3)  # DeviceMismatch
"""

import ctypes
import shutil
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
NAME = "pretended GPU"
# What others have taken of the device: transformers leaves more than a GB alone, and a tiny device has no such room.
TAKEN_BY_OTHERS = 4 * 2**30
SOURCE = Path(__file__).with_suffix(".cpp")
# What takes a tensor from one device to the other, and where indices on the host may meet a tensor on the device.
MOVES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Attention by the kernel of products and a softmax: the choice of a fused one goes by a device's own kernels.
ATTENTION_CHOICE, ATTENTION_MATH = "aten::_fused_sdp_choice", 0


class DeviceMismatch(RuntimeError):
    """A host tensor and a device tensor meet in one operation."""


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on `cuda:0`.

    Attributes:
        inner: the tensor on the CPU that holds its values.
        allocation: its share of the device's memory, held by all tensors of one storage.
    """

    @staticmethod
    def __new__(cls, data: torch.Tensor, requires_grad: bool = True):
        """A weight, as of the class Parameter: libraries make one anew by the class of the old one."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def of(cls, inner: torch.Tensor, gpu: "PretendedGpu") -> "DeviceTensor":
        """The tensor of these values on the device."""
        allocation = gpu.allocation_of(inner)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
            requires_grad=inner.requires_grad,
        )
        tensor.inner, tensor.allocation = inner, allocation
        return tensor

    def __repr__(self):
        return f"DeviceTensor({self.inner})"

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert a tensor on {self.device} to numpy")
        return self.cpu().numpy()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = next(tensor for tensor in tensors_in([args, kwargs]) if isinstance(tensor, DeviceTensor))
        return tensor.allocation.gpu.run(func, args, kwargs)


class Allocation:
    """Bytes of the device that a storage takes, given back when the last tensor of it is gone."""

    def __init__(self, gpu: "PretendedGpu", size: int):
        self.gpu, self.size = gpu, size
        gpu.allocated += size
        gpu.peak = max(gpu.peak, gpu.allocated)

    def __del__(self):
        self.gpu.allocated -= self.size


class PretendedGpu:
    """The device, with so much memory.

    Attributes:
        memory, allocated, peak: bytes that there are, that tensors take, and that they took at most.
        is_full: whether every allocation fails from now on.
    """

    def __init__(self, memory: int = 80 * 10**9):
        self.memory, self.allocated, self.peak = memory, 0, 0
        self.is_full = False
        self._allocations: weakref.WeakValueDictionary[int, Allocation] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()

    def allocation_of(self, inner: torch.Tensor) -> Allocation:
        """What the storage of `inner` takes, from now on or already.

        Raises:
            OutOfMemoryError: there is no room for it.
        """
        storage = inner.untyped_storage()
        with self._lock:
            if found := self._allocations.get(storage.data_ptr()):
                return found
            size = storage.nbytes()
            if size and (self.is_full or self.allocated + size > self.memory):
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            allocation = Allocation(self, size)
            if size:
                self._allocations[storage.data_ptr()] = allocation
            return allocation

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """An operation of torch, by the CPU, its results where a GPU would have them."""
        name, tensors = func._schema.name, list(tensors_in([args, kwargs]))
        ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, DeviceTensor)}
        device = kwargs.get("device")
        goes_there = bool(ours) if device is None else torch.device(device).type == "cuda"
        if not (ours or goes_there):
            return func(*args, **kwargs)
        refuse_mixture(name, args, kwargs, tensors)
        if name == ATTENTION_CHOICE:
            return ATTENTION_MATH
        settings = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
        if device is not None and goes_there:
            settings["device"] = CPU
        result = func(*mapped(inner, args), **mapped(inner, settings))
        if not goes_there or (name == "aten::copy_" and id(result) not in ours):
            return result

        def placed(tensor: torch.Tensor) -> DeviceTensor:
            # What was changed in place is what was given, unless it has another shape now, as by squeeze_ within `@`.
            given = ours.get(id(tensor))
            return given if given is not None and given.shape == tensor.shape else DeviceTensor.of(tensor, self)

        return mapped(placed, result)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Let every allocation fail meanwhile."""
        self.is_full = True
        try:
            yield
        finally:
            self.is_full = False

    @contextmanager
    def installed(self, guard: ctypes.CDLL) -> Iterator["PretendedGpu"]:
        """Have the device meanwhile, in this thread and in all that it starts; modules are moved to it by swapping."""
        run_thread = threading.Thread.run

        def run_within(thread: threading.Thread) -> None:
            with self._modes():
                run_thread(thread)

        previous = guard.exchange_guard(guard.pretended_guard())
        swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with ExitStack() as stack:
                for target, replacement in self._replacements().items():
                    stack.enter_context(patch(f"torch.cuda.{target}", replacement))
                stack.enter_context(patch.object(threading.Thread, "run", run_within))
                stack.enter_context(self._modes())
                yield self
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapped)
            guard.exchange_guard(previous)

    @contextmanager
    def _modes(self) -> Iterator[None]:
        with _Arguments(), _Operations(self):
            yield

    def _replacements(self) -> dict[str, Callable]:
        """What takes the place of torch.cuda's functions."""

        def reset_peak(device=None) -> None:
            self.peak = self.allocated

        total = self.memory + TAKEN_BY_OTHERS
        properties = SimpleNamespace(name=NAME, total_memory=total, major=9, minor=0, is_integrated=False)
        values = {
            "is_available": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": NAME,
            "get_device_properties": properties,
            "get_device_capability": (9, 0),
            "is_bf16_supported": True,
        }
        constant = {name: lambda *args, value=value, **kwargs: value for name, value in values.items()}
        return constant | {
            "_lazy_init": lambda: None,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (self.memory - self.allocated, self.memory + TAKEN_BY_OTHERS),
            "memory_allocated": lambda device=None: self.allocated,
            "memory_reserved": lambda device=None: self.allocated,
            "max_memory_allocated": lambda device=None: self.peak,
            "reset_peak_memory_stats": reset_peak,
        }


class _Operations(TorchDispatchMode):
    """Brings operations without a device tensor, such as those that make one, to the device."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.gpu.run(func, args, kwargs or {})


class _Arguments(TorchFunctionMode):
    """Says what torch would not ask operations for: the device of a number, and where Python's numbers become tensors.

    A tensor of Python's numbers is made on the host first; torch copies it to a device past all operations.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device and len(args) == 1:
            args = (device_of_number(*args),)
        elif func is torch.Tensor.to:
            args = (args[0], *map(device_of_number, args[1:2]), *args[2:])
        kwargs = {key: device_of_number(value) if key == "device" else value for key, value in (kwargs or {}).items()}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "cuda":
            return func(*args, **kwargs | {"device": CPU}).to(CUDA)
        return func(*args, **kwargs)


def device_of_number(value: Any) -> Any:
    """The device where its index is given; anything else as it is."""
    return CUDA if type(value) is int else value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments of an operation, which may be in lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same with what `function` makes of every tensor in their place."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)(mapped(function, item) for item in value)
    return {key: mapped(function, item) for key, item in value.items()} if isinstance(value, dict) else value


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """What the CPU computes with."""
    return tensor.inner if isinstance(tensor, DeviceTensor) else tensor


def refuse_mixture(name: str, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
    """Raise DeviceMismatch where a GPU would: numbers without a dimension, and indices, may come from the host."""
    if name in MOVES:
        return
    if name in INDEXING and isinstance(args[0], DeviceTensor):
        tensors = [args[0], *args[2:3]]  # not the indices
    met = [tensor for tensor in tensors if tensor.ndim or isinstance(tensor, DeviceTensor)]
    if len({isinstance(tensor, DeviceTensor) for tensor in met}) > 1:
        shapes = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in met)
        raise DeviceMismatch(f"{name}: tensors of both devices meet: {shapes}")
    if kwargs.get("generator") is not None:
        raise DeviceMismatch(f"{name}: a generator of the host for a tensor of the device")


def compiled_guard(folder: Path) -> ctypes.CDLL | None:
    """The guard of the device, compiled into `folder` unless it is there; None where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    library, root = folder / "pretended_gpu.so", Path(torch.__file__).parent
    if not library.exists():
        if compiler is None:
            return None
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([compiler, SOURCE, "-o", library, *flags], check=True)
    guard = ctypes.CDLL(str(library))
    for function in (guard.exchange_guard, guard.pretended_guard):
        function.restype = ctypes.c_void_p
    guard.exchange_guard.argtypes = [ctypes.c_void_p]
    return guard
