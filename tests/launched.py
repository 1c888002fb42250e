"""Processes of the command lines, alone or as a launcher starts them, and how they end."""

import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

import torch
from forked import Fork

ROOT = Path(__file__).parents[1]
COMMAND = [str(ROOT / "model_pruning.py")]
# Code that runs the script named by the arguments behind it; what is to be changed first goes before it.
RUN = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    errors: str
    at: float


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Variables of a process that finds the program, does without a hub, and has as many threads as this one."""
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return os.environ | own | more


def start(server: str, arguments: list[str], errors: Path) -> Fork:
    """Start a fork of the `server`, which Python calls with the arguments, and which writes its errors to a file."""
    with errors.open("w") as said, open(os.devnull, "w") as null:
        return Fork(server, arguments, environment(), (0, null.fileno(), said.fileno()))


def started(server: str, arguments: list[str], count: int = 2) -> list[Fork]:
    """Processes as a launcher starts them, forks of the `server`, which Python calls with the arguments."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    forks = []
    for rank in map(str, range(count)):
        variables = environment(**shared, RANK=rank, LOCAL_RANK=rank)
        with open(f"out.{rank}", "w") as out, open(f"errors.{rank}", "w") as errors, open(os.devnull) as null:
            forks.append(Fork(server, arguments, variables, (null.fileno(), out.fileno(), errors.fileno())))
    return forks


def end_of(forks: list[Fork]) -> list[Ended]:
    """How they ended."""
    ended: dict[int, float] = {}
    while len(ended) < len(forks):
        for rank, fork in enumerate(forks):
            if rank not in ended and fork.poll() is not None:
                ended[rank] = time.monotonic()
        time.sleep(0.01)
    said = [(Path(f"out.{rank}").read_text(), Path(f"errors.{rank}").read_text()) for rank in range(len(forks))]
    return [Ended(fork.returncode, *said[rank], ended[rank]) for rank, fork in enumerate(forks)]
