"""Python processes that start at once: forks of one that has imported what takes seconds, but nothing of olica.

    python forked.py --serve SOCKET             the process that is forked, until its standard input ends
    python -I -S forked.py SOCKET ARGUMENT...   a fork of it, with this call's streams, folder, variables and arguments

The second takes the place of `python ARGUMENT...`: it hands SIGINT and SIGTERM on, and ends as the fork ends. Variables
that libraries look at while they are imported are those of the first, but for where HF_HOME has the code of checkpoints
copied to.
"""

import gc
import io
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

# What the command lines and the scripts import.
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "lm_eval.tasks", "lm_eval.models.huggingface", "gguf")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "gemma2", "gemma3", "phi3")


def serve(path: str) -> None:
    """Fork a process for every request at the socket `path`, until the standard input ends."""
    import importlib
    import select

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)  # who finds it there may connect
    for name in (*LIBRARIES, *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES)):
        importlib.import_module(name)
    from lm_eval.tasks import _index
    from stock_tasks import build_from

    _index.TaskIndex.build = build_from(Path(path).with_name("stock_tasks.pickle"))
    gc.collect()
    gc.freeze()  # the forks share it: no search for garbage has to visit and so copy it
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()
    os._exit(0)  # all that was imported would be torn down for seconds, as in every fork


def _answer(connection: socket.socket) -> None:
    """Run what is asked for in a child; send its number, and its status when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(connection.recv(int.from_bytes(length), socket.MSG_WAITALL))
    if (child := os.fork()) == 0:
        connection.close()
        _run(request, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    with suppress(OSError):  # nobody asks any more
        connection.sendall(f"{child}\n".encode())
        connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
    os._exit(0)


def _run(request: dict, streams: list[int]) -> None:
    """Run a script, code after -c or a module after -m, as Python would, and exit."""
    import atexit
    import runpy
    import threading

    import torch
    from transformers import dynamic_module_utils

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # New ones: what the server's could do, such as seek, these need not be able to.
    unbuffered = bool(request["env"].get("PYTHONUNBUFFERED"))
    written = open(1, "wb", buffering=0 if unbuffered else -1, closefd=False)
    sys.stdin, sys.stdout = open(0, closefd=False), io.TextIOWrapper(written, write_through=unbuffered)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if "HF_HOME" in os.environ:  # what comes with checkpoints is copied below it
        dynamic_module_utils.HF_MODULES_CACHE = os.path.join(os.environ["HF_HOME"], "modules")
    sys.argv = request["argv"]
    sys.path[0:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    status = 0
    try:
        match sys.argv[0]:
            case "-c":
                exec(sys.argv.pop(1), {"__name__": "__main__"})  # noqa: S102
            case "-m":
                runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
            case script:
                sys.path[0] = str(Path(script).resolve().parent)
                runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int | None) else 1
        if not isinstance(ended.code, int | None):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status or 0)


class Fork:
    """A fork that was asked for, as `subprocess.Popen` shows a process."""

    def __init__(self, path: str, argv: list[str], env: dict[str, str], streams: tuple[int, int, int]):
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(path)
        request = json.dumps({"argv": argv, "env": env, "cwd": os.getcwd()}).encode()
        socket.send_fds(self._connection, [len(request).to_bytes(4)], streams)
        self._connection.sendall(request)
        self.pid = int(self._read())
        self.returncode: int | None = None

    def _read(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += (received := self._connection.recv(1))
            assert received, "the process that is forked has ended"
        return line

    def wait(self) -> int:
        """The status, when the fork has ended: negative if by a signal."""
        if self.returncode is None:
            self.returncode = int(self._read())
        return self.returncode

    def poll(self) -> int | None:
        """The status, if the fork has ended."""
        if self.returncode is None:
            with suppress(BlockingIOError):
                self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if the fork has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def main() -> None:
    """Ask for a fork, and end as it does."""
    fork = Fork(sys.argv[1], sys.argv[2:], dict(os.environ), (0, 1, 2))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: fork.send_signal(number))
    status = fork.wait()
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "--serve" else main()
