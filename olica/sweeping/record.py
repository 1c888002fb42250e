"""Whether the record of a sweep that lies in a folder is that of the sweep which is asked for."""

import json
from pathlib import Path

from ..errors import UsageError
from ..evaluation.settings import EvaluationSettings
from ..evaluation.subject import Protocol
from ..outputs import identity
from ..sources.calibration_set import CalibrationSet
from .plan import RECORD, SweepPlan


def identity_of(plan: SweepPlan, asked: EvaluationSettings, protocol: Protocol, calibration: CalibrationSet) -> dict:
    """What decides a point, by names for messages: one of another sweep is not taken up.

    Args:
        plan: of the sweep.
        asked: what every model is measured by.
        protocol: made of it.
        calibration: what every point is pruned with.
    """
    job = plan.jobs[0]
    settings = {name: value for name, value in plan.settings.flat().items() if name != "sparsity"}
    decides = identity.of_run(settings, job.location, calibration.token_hash, job.options.device)
    measured = identity.of_evaluation(
        {"tasks": asked.tasks, "limit": asked.limit, "seed": asked.seed}, {}, protocol.data, job.options.device
    )
    decides |= {f"--{name}": value for name, value in measured["settings"].items()}
    decides |= {f"digest of {name}": value for name, value in measured["data"].items()}
    return json.loads(json.dumps(decides | {"version of the code that measures": measured["code"]}))


def read_record(folder: Path, wanted: dict, overwrite: bool) -> dict | None:
    """The record of a sweep in a folder; None where there is none, or one that is to be replaced.

    Raises:
        UsageError: it is that of another sweep, and is not to be replaced.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        before = record["identity"]
        record["dense"], record["points"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if overwrite:
            return None
        raise UsageError(f"--save_dir: {path} is no record of a sweep; give --overwrite to replace it") from error
    other = [name for name in before | wanted if before.get(name) != wanted.get(name)]
    if not other:
        return record
    if overwrite:
        return None
    raise UsageError(
        f"--save_dir: the sweep in {folder} was made with another {other[0]} ({before.get(other[0])}, now "
        f"{wanted.get(other[0])}); give --overwrite to replace it, or another --save_dir"
    )
