"""The machine that work runs on: its devices, the memory that they have left, and how much was in use at most."""

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache

from .errors import UsageError, is_out_of_memory

logger = logging.getLogger(__name__)

# Linux's control groups: which the process is in, where they are, and for each of the two versions the folder and the
# names of the limit, of what is used of it, and of that part of it that is cached files.
CGROUP_OF_PROCESS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
CGROUPS_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
CGROUPS_2 = ("", "memory.max", "memory.current", "inactive_file")
# Linux: RESET_PEAK written to the first makes the kernel start VmHWM, a line of the second, from the present
# resident size again (proc(5)).
CLEAR_REFS = Path("/proc/self/clear_refs")
PROCESS_STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


# Names that `pick_device` takes.
DEVICES = ("auto", "cpu", "cuda")


def pick_device(name: str, flag: str = "--device") -> torch.device:
    """The device named "cpu", "cuda" or "auto" (a GPU if there is one).

    Raises:
        UsageError: another name, or "cuda" where there is no GPU.
    """
    if name not in DEVICES:
        raise UsageError(f"{flag} {name} is none of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{flag} cuda: torch sees no GPU; give {flag} cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class BatchSize:
    """How many samples go through a layer, or a model, at a time: halved, for good, when memory runs out.

    Attributes:
        size: samples.
    """

    def __init__(self, size: int):
        self.size = size

    def run(self, work: Callable[[slice], None], samples: int) -> None:
        """Call `work` with the rows of one batch after the other; a batch that does not fit is done again in halves.

        Raises:
            RuntimeError: out of memory, even with a single sample.
        """
        start = 0
        while start < samples:
            rows = slice(start, min(start + self.size, samples))
            try:
                work(rows)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.size == 1:
                    raise
            else:
                start = rows.stop
                continue
            # Here the error is forgotten, and with it the frames that held what had been allocated.
            clear_device_cache()
            self.size //= 2
            logger.warning("out of memory: going on with --batch_size %d", self.size)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; for the CPU those that the system, and a limit on this process, leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *left_by_control_groups()])


def left_by_control_groups(process: Path = CGROUP_OF_PROCESS, mounted: Path = CGROUPS) -> list[int]:
    """What the memory limits of Linux leave (containers and batch systems set them); empty where there are none."""
    left = []
    groups = process.read_text().splitlines() if process.exists() else []
    for controllers, group in (line.split(":", 2)[1:] for line in groups):
        if not controllers:
            folder, *files = CGROUPS_2
        elif "memory" in controllers.split(","):
            folder, *files = CGROUPS_1
        else:
            continue
        # Inside a container the group may have another name than outside: its limit is then that of the root.
        own = mounted / folder / group.strip("/")
        above = [path for path in own.parents if path.is_relative_to(mounted / folder)]
        left += [_left(path, *files) for path in (own, *above) if (path / files[0]).exists()]
    return [number for number in left if number is not None]


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    most = (group / limit).read_text().strip()
    if most == "max":
        return None
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(most) - int((group / used).read_text()) + int(counts[cached])  # cached files give way


def hand_back_memory() -> None:
    """Give host memory that was freed back to the system: glibc keeps what lies below a block that is in use."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def reset_peak_memory(device: torch.device | str) -> bool:
    """Start the peaks that `peak_memory` reports from the memory in use now.

    Returns whether the host's peak was reset too; where the system does not offer it, that peak stays the one
    of the whole process.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def peak_memory(device: torch.device | str) -> dict[str, int | None]:
    """Peak memory since `reset_peak_memory`, in bytes: `host_bytes` and `device_bytes`.

    The host's is the resident size of this process; the device's is what torch allocated for tensors on
    `device`, and None unless that is a CUDA device.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "host_bytes": _host_peak(),
        "device_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
    }


def _host_peak() -> int:
    """Peak resident bytes: since the last reset, or of the whole process where the system has no VmHWM."""
    try:
        lines = PROCESS_STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # "VmHWM:    123456 kB"
    # Imported here because Windows does not have it.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


@contextmanager
def full_precision() -> Iterator[None]:
    """Have products in single precision meanwhile: TF32 keeps ten bits, too few for sums that are subtracted."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
