"""What decides a result: a run that goes on must not differ in any of it from the run that began."""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch

from ..sources.locate import Location
from .records import EVALUATION_RECORD, environment

# These say where something is, choose the calibration set, which goes by its tokens, or decide nothing.
NOT_COMPARED = ("base_model", "datasets", "data_dir", "num_samples", "seqlen", "seed")
NOT_COMPARED += ("add_bos_token", "candidates", "cache_dev", "save_dir", "overwrite")

CODE = "version of the code"
PACKAGE = Path(__file__).parents[1]
# The code that decides the bits of a pruned model, and that which decides the figures of an evaluation, as patterns
# within the package. What shows results, and what of the ground only prints, is left out.
PRUNING_CODE = ("settings.py", "jobs.py", "run.py", "machine.py", "processes.py", "tensor_files.py")
PRUNING_CODE += tuple(f"{room}/**/*.py" for room in ("model", "methods", "sources", "pruning"))
PRUNING_CODE += tuple(
    f"outputs/{name}.py"
    for name in ("checkpoint", "journal", "run_folder", "run_progress", "survey_store", "weight_shards")
)
EVALUATION_CODE = ("machine.py", "processes.py", "model/**/*.py", "sources/**/*.py", "evaluation/**/*.py")
# Blocks of a file that are read to know it, and bytes of each.
BLOCKS, BLOCK = 256, 16384
# The packages that compute a pruned model; those of tokenizers do not, since the calibration set goes by its tokens.
PRUNING_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf")


def of_run(settings: dict, location: Location, token_hash: str, device: torch.device, processes: int = 1) -> dict:
    """The settings, the dense model, the calibration set, the code and the machine of a run, by names for messages.

    Args:
        settings: values of the flags by their names.
        location: of the dense model.
        token_hash: of the calibration set.
        device: where layers run.
        processes: how many share the samples, of whose sums the rounding depends on it.
    """
    machine = environment(device)
    return {
        "calibration set": token_hash,
        **{f"--{name}": value for name, value in settings.items() if name not in NOT_COMPARED},
        **_source(location),
        CODE: _code(PRUNING_CODE),
        "version of Python": machine["python"],
        **{f"version of {name}": machine["packages"][name] for name in PRUNING_PACKAGES},
        "device": machine["device"],
        "number of threads": machine["cpu_threads"],
        "number of processes": processes,
    }


def of_evaluation(settings: dict, locations: dict[str, Location], data: dict[str, str], device: torch.device) -> dict:
    """The settings, models, texts and rows, code and machine of an evaluation: figures of another are not taken up.

    Args:
        settings: values of the flags by their names.
        locations: of the models, by their names in the record.
        data: digests of texts and local rows, by their names.
        device: where the models run.
    """
    return {
        "settings": {name: value for name, value in settings.items() if name != "output_path"},
        "models": {name: _source(location) for name, location in locations.items()},
        "data": data,
        "code": _code(EVALUATION_CODE),
        # What the commit changed in the code, the digest of the code knows.
        "environment": {name: value for name, value in environment(device).items() if name != "git_commit"},
    }


def _source(location: Location) -> dict:
    """Size and digest of every file of a local model; the commit of one of the hub."""
    if not location.is_local:
        return {"revision of the model": location.revision}
    files = [path for path in location.files if not path.match(EVALUATION_RECORD.format(time="*"))]
    return {f"{path.name} of the model": _content(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@cache
def _content(path: Path, size: int, changed: int) -> list:  # noqa: ARG001
    """Size of a file, and the sha256 (hex) of BLOCKS blocks spread over it: of small files all there is.

    Weights of gigabytes are not read as a whole for it; models of equal sizes differ nearly everywhere. `changed` is
    when the file was last changed, so that one that is written anew is read anew.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return [size, digest.hexdigest()]


def _code(patterns: tuple[str, ...]) -> str:
    """The sha256 (hex) of the names and contents of the files of the package that fit `patterns`."""
    paths = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    names = {path.relative_to(PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def digest_of(identity: dict) -> str:
    """What an identity is known by: the sha256 (hex) of its names and values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
