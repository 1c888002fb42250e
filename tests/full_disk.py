"""A command on a disk that is full, and the same one when there is room: for test_hammering.py.

    python full_disk.py BYTES SCRIPT ARGUMENT...

mounts a disk of so many bytes at the folder `disk`, which only this process and its children see, runs the command,
makes the disk larger, runs the command again and copies what is on the disk to the folder `later`. It prints, as JSON,
how both ended and what the first one left on the disk; or nothing, where the system gives no process a disk of its own.
"""

import ctypes
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

NEW_USER, NEW_MOUNTS, REMOUNT = 0x10000000, 0x00020000, 32
ROOM = 2**30
DISK = Path("disk")
_system = ctypes.CDLL(None, use_errno=True)


def _mount(size: int, flags: int = 0) -> bool:
    return not _system.mount(b"tmpfs", os.fsencode(DISK.absolute()), b"tmpfs", flags, b"size=%d" % size)


def _own_disk(size: int) -> bool:
    """Mount a disk of so many bytes that only this process and its children see; returns whether that is allowed."""
    ids = {"uid_map": os.getuid(), "gid_map": os.getgid()}
    if _system.unshare(NEW_USER | NEW_MOUNTS):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    for name, number in ids.items():
        Path("/proc/self", name).write_text(f"0 {number} 1")
    return _mount(size)


def _ended(arguments: list[str]) -> dict:
    """How a command ends that has been told there is room, as if others had filled the disk meanwhile."""
    if (child := os.fork()) == 0:
        with open("errors", "w") as errors:
            os.dup2(errors.fileno(), 2)
        from olica import checks

        checks.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=10**15))
        sys.argv, status = arguments, 0
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = {str(path.relative_to(DISK)): path.stat().st_size for path in DISK.rglob("*") if path.is_file()}
    return {"status": status, "errors": Path("errors").read_text(errors="replace"), "left": left}


def main(size: int, arguments: list[str]) -> None:
    """See above."""
    DISK.mkdir(exist_ok=True)
    if not _own_disk(size):
        return
    full = _ended(arguments)
    if not _mount(ROOM, REMOUNT):
        raise OSError(ctypes.get_errno(), "the disk does not grow")
    later = _ended(arguments)
    shutil.copytree(DISK, "later")
    print(json.dumps([full, later]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
