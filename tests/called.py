"""Command lines and scripts, run in this process."""

import importlib.util
import sys
from pathlib import Path

from olica.command_line import run_command

ROOT = Path(__file__).parents[1]
# The flags that the paper's authors give.
PAPERS_PRUNING = (
    "--base_model 7b --datasets bookcorpus+alpaca --num_samples 128 --seqlen 128 --percdamp 0.5 --mlp_num 6 "
    "--sparsity 0.2 --ratio 0.03 --k 3 --save_dir ./pruned_models"
)
PAPERS_EVALUATION = (
    "--base_mode 7b --sparsity 0.2 "
    "--tasks openbookqa,arc_easy,winogrande,hellaswag,arc_challenge,piqa,boolq --save_dir ./pruned_models"
)


def call(module, *flags) -> int:
    """The exit status of a command line, given its module."""
    return run_command(module.build_parser(), module.run, [str(flag) for flag in flags])


def load(path: str):
    """The script at `path` of the repository as a module."""
    sys.path.insert(0, str((ROOT / path).parent))  # some import what they share
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
