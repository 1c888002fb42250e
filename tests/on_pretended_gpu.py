"""Run a script on a pretended GPU, as python would on a real one.

    python tests/on_pretended_gpu.py FOLDER SCRIPT ARGUMENT...
    python tests/on_pretended_gpu.py FOLDER -m MODULE ARGUMENT...

FOLDER holds the compiled guard of the device, for the next call too.
"""

import runpy
import sys
from pathlib import Path

from pretended_gpu import PretendedGpu, compiled_guard


def main() -> None:
    folder, *sys.argv = sys.argv[1:]
    guard = compiled_guard(Path(folder))
    if guard is None:
        sys.exit("there is no C++ compiler to make a pretended GPU with")
    with PretendedGpu().installed(guard):
        if sys.argv[0] == "-m":
            module = sys.argv.pop(1)
            sys.path[0] = ""
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
