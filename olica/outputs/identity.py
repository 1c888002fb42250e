"""What decides a result: a run that goes on must not differ in any of it from the run that began."""

import hashlib
import json
from pathlib import Path

import torch

from ..sources.locate import Location
from .records import EVALUATION_RECORD, environment

# These say where something is, choose the calibration set, which goes by its tokens, or decide nothing.
NOT_COMPARED = ("base_model", "datasets", "data_dir", "num_samples", "seqlen", "seed", "cache_dev")
NOT_COMPARED += ("save_dir", "overwrite", "dry_run")

PACKAGE = Path(__file__).parents[1]
# The code that decides the bits of a pruned model, and that which decides the figures of an evaluation, as patterns
# within the package, whose own modules are the ground, and jobs.py and run.py. What shows results is left out.
PRUNING_CODE = ("*.py", "model/**/*.py", "methods/**/*.py", "sources/**/*.py", "pruning/**/*.py")
PRUNING_CODE += tuple(
    f"outputs/{name}.py" for name in ("checkpoint", "journal", "run_folder", "run_progress", "survey_store")
)
EVALUATION_CODE = ("*.py", "model/**/*.py", "sources/**/*.py", "evaluation/**/*.py")
# The packages that compute a pruned model; those of tokenizers do not, since the calibration set goes by its tokens.
PRUNING_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "gguf")


def of_run(settings: dict, location: Location, token_hash: str, device: torch.device) -> dict:
    """The settings, the dense model, the calibration set, the code and the machine of a run, by names for messages.

    Args:
        settings: values of the flags by their names.
        location: of the dense model.
        token_hash: of the calibration set.
        device: where layers run.
    """
    machine = environment(device)
    return {
        "calibration set": token_hash,
        **{f"--{name}": value for name, value in settings.items() if name not in NOT_COMPARED},
        **_source(location),
        "version of the code": _code(PRUNING_CODE),
        "version of Python": machine["python"],
        **{f"version of {name}": machine["packages"][name] for name in PRUNING_PACKAGES},
        "device": machine["device"],
        "number of threads": machine["cpu_threads"],
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
        "code": _code(EVALUATION_CODE, without=("jobs.py", "run.py")),
        # What the commit changed in the code, the digest of the code knows.
        "environment": {name: value for name, value in environment(device).items() if name != "git_commit"},
    }


def _source(location: Location) -> dict:
    """Size and time of the last change of every file of a local model; the commit of one of the hub."""
    if not location.is_local:
        return {"revision of the model": location.revision}
    files = [path for path in location.files if not path.match(EVALUATION_RECORD.format(time="*"))]
    return {f"{path.name} of the model": [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _code(patterns: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """The sha256 (hex) of the names and contents of the files of the package that fit `patterns`, but for one."""
    paths = {path for pattern in patterns for path in PACKAGE.glob(pattern)} - {PACKAGE / name for name in without}
    names = {path.relative_to(PACKAGE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
