import gc
import resource
from types import SimpleNamespace

import pytest
import torch

from olica import machine


def test_limits_of_control_groups(tmp_path):
    process, mounted = tmp_path / "cgroup", tmp_path / "fs"

    def group(folder: str, **files: str) -> None:
        (mounted / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (mounted / folder / name.replace("__", ".")).write_text(text + "\n")

    assert machine.left_by_control_groups(process, mounted) == []
    process.write_text("0::/job/step\n")
    assert machine.left_by_control_groups(process, mounted) == []
    cached = {"memory__stat": "anon 5\ninactive_file 30"}
    group("job/step", memory__max="max", memory__current="7", **cached)
    group("job", memory__max="1000", memory__current="400", **cached)
    assert machine.left_by_control_groups(process, mounted) == [1000 - 400 + 30]
    process.write_text("9:cpu:/x\n4:memory,pids:/job\n")
    stat = {"memory__stat": "total_inactive_file 3"}
    group("memory", memory__limit_in_bytes="900", memory__usage_in_bytes="100", **stat)
    group("memory/job", memory__limit_in_bytes="500", memory__usage_in_bytes="50", **stat)
    assert machine.left_by_control_groups(process, mounted) == [453, 803]
    process.write_text("0::/elsewhere/inside/a/container\n")
    group(".", memory__max="2000", memory__current="500", **cached)
    assert machine.left_by_control_groups(process, mounted) == [1530]


def test_free_memory_is_the_least_of_what_system_and_limits_leave(monkeypatch):
    system = machine.psutil.virtual_memory().available
    assert machine.free_memory(torch.device("cpu")) <= 1.1 * system
    monkeypatch.setattr(machine, "left_by_control_groups", lambda: [10**6])
    assert machine.free_memory(torch.device("cpu")) == 10**6


def test_host_peak_sees_memory_that_is_gone_again():
    size = 200 * 2**20
    reset = machine.reset_peak_memory("cpu")
    before = machine.peak_memory("cpu")
    block = torch.ones(size, dtype=torch.uint8)
    del block
    gc.collect()
    after = machine.peak_memory("cpu")
    assert before["device_bytes"] is None
    if not reset:
        pytest.skip("this system cannot reset the peak of a process")
    assert 0.9 * size < after["host_bytes"] - before["host_bytes"] < 1.5 * size
    machine.reset_peak_memory("cpu")
    assert machine.peak_memory("cpu")["host_bytes"] < after["host_bytes"] - 0.5 * size


def test_host_peak_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(machine, "PROCESS_STATUS", tmp_path / "no" / "status")
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert machine.reset_peak_memory("cpu") is False
    assert machine.peak_memory("cpu")["host_bytes"] == 5000 * 1024
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    assert machine.peak_memory("cpu")["host_bytes"] == 5000


@pytest.mark.gpu
def test_device_peak():
    if not torch.cuda.is_available():
        pytest.skip("wants a CUDA device")
    machine.reset_peak_memory("cuda")
    before = machine.peak_memory("cuda")["device_bytes"]
    block = torch.ones(2**26, dtype=torch.uint8, device="cuda")
    del block
    assert machine.peak_memory("cuda")["device_bytes"] - before >= 2**26
