"""What a model costs: parameters, bytes, seconds per forward pass, and the peak memory of some work."""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

# Linux: RESET_PEAK written to the first makes the kernel start VmHWM, a line of the second, from the present
# resident size again (proc(5)).
CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count the distinct parameters, tied ones once: `total`, and `decoder_layers` alone.

    `total` includes embeddings, head and norms; the linear corrections of a pruned model are in both.
    """
    return {
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "decoder_layers": sum(parameter.numel() for parameter in model.get_decoder().layers.parameters()),
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters of `model` in their dtypes, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def folder_weight_bytes(folder: str | Path) -> int:
    """Bytes on disk of the safetensors files directly in `folder`, headers included; 0 if it holds none."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


@torch.no_grad()
def forward_latency(
    models: dict[str, nn.Module], ids: torch.Tensor, repeats: int
) -> dict[str, dict[str, float]]:
    """Time a forward pass over `ids` (B, T), `repeats` times for each of `models`, in seconds.

    Returns `median_s`, `min_s`, `max_s` and `ratio`, the median over that of the first model, by the names
    of `models`. The models take turns within one process, so that a clock or a neighbour that changes speed
    meets all of them alike. One pass of each is left out of the count: the first allocates and picks kernels.
    """
    inputs = {name: ids.to(model.device) for name, model in models.items()}
    seconds = {name: [] for name in models}
    for _ in range(1 + repeats):
        for name, model in models.items():
            seconds[name].append(_seconds_of_forward(model, inputs[name]))
    timed = {name: _spread(values[1:]) for name, values in seconds.items()}
    first = next(iter(timed.values()))["median_s"]
    return {name: spread | {"ratio": spread["median_s"] / first} for name, spread in timed.items()}


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


def _seconds_of_forward(model: nn.Module, ids: torch.Tensor) -> float:
    """Wall-clock seconds of one forward pass over `ids` (B, T), to the end of what it started on a GPU."""
    synchronize(ids.device)
    start = time.perf_counter()
    model(ids, use_cache=False)
    synchronize(ids.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for all that was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def _host_peak() -> int:
    """Peak resident bytes: since the last reset, or of the whole process where the system has no VmHWM."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024  # "VmHWM:    123456 kB"
    # Imported here because Windows does not have it.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
