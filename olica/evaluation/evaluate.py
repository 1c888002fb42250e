"""The whole of an evaluation: find the models, the texts and the tasks, measure, and write the record."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from os import PathLike
from os.path import expanduser
from pathlib import Path
from typing import Any

from ..checks import check_no_file, check_record_path, refuse_twice
from ..errors import UsageError, memory_in_words
from ..machine import pick_device
from ..outputs import identity, records
from ..outputs.model_card import add_metrics
from ..outputs.names import DEFAULT_BASE_MODEL, checkpoint_folder
from ..processes import Processes, working_together
from ..sources.configuration import count_dense_parameters, read_config
from ..sources.locate import Location, locate
from ..sources.text_sources import evaluation_text
from ..sources.weights import DTYPES
from .measures import Measures, measure
from .paired import compare
from .settings import EvaluationSettings, listed
from .subject import Protocol, TestText, TestWindows, prepare
from .zero_shot import check_tasks

logger = logging.getLogger(__name__)

Names = str | Sequence[str | PathLike]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation did.

    Attributes:
        record: what the record says: `results` by the names of the models ("dense" and "pruned" with `with_dense`,
            else "model"), the settings, the environment.
        path: file of the record.
    """

    record: dict
    path: Path


def evaluate(
    model: str | PathLike | None = None,
    *,
    base_model: str | PathLike | None = None,
    ppl: Names = "wikitext2",
    tasks: Names = "",
    output_path: str | PathLike | None = None,
    **settings: Any,
) -> Evaluated | None:
    """Measure a pruned or dense checkpoint as model_evaluate.py does, and write the record.

    Args:
        model: the checkpoint: a folder, name, hub id or .gguf file. None: the one that `base_model`, `sparsity` and
            `sparsity_of` find in `save_dir`.
        base_model: the dense model, measured too with `with_dense`; None: what the checkpoint's record says.
        ppl: names or paths of the texts of the perplexity, or one string that joins them by commas.
        tasks: names of the tasks of lm-eval, likewise.
        output_path: file of the record; None: one named by the time in the checkpoint's folder.
        **settings: the remaining flags of model_evaluate.py, by their names, see `EvaluationSettings`.

    Returns:
        The record and its path; None in all but the first of the processes that `accelerate launch` started.

    Raises:
        UsageError: a setting, a model, a text or a task is wrong, or memory runs out.
    """
    refuse_twice("checkpoint", "evaluate", settings)
    asked = EvaluationSettings.of(
        settings
        | {"checkpoint": model, "base_model": base_model, "ppl": ppl, "tasks": tasks, "output_path": output_path}
    )
    with working_together(pick_device(asked.device)) as processes:
        return _evaluate(asked, processes)


def _evaluate(asked: EvaluationSettings, processes: Processes) -> Evaluated | None:
    device = processes.device
    check_processes(asked, processes.count)
    locations = find_models(asked)
    measured = locations.get("pruned") or locations["model"]
    now = datetime.now(UTC)
    path = record_path(asked.output_path, measured, now)
    protocol = make_protocol(asked, common_dtype(asked, locations))
    subjects = [prepare(name, location, protocol) for name, location in locations.items()]
    stages = records.Stages(device)
    evaluation = identity.of_evaluation(asdict(asked), locations, protocol.data, device)
    measures = Measures(path.parent, path.name if asked.output_path else None, evaluation, stages, processes)
    if measures.found and processes.is_main:
        logger.warning("going on with a stopped evaluation; measured before: %d", measures.found)
    with measures.says_how_to_go_on(), memory_in_words(partial(memory_advice, asked, processes.count)):
        results = {subject.name: measure(subject, protocol, measures, stages, processes) for subject in subjects}
    if not processes.is_main:
        return None
    if asked.with_dense:
        results["pruned"]["to_dense"] = compare(results["pruned"], results["dense"])
    record = {
        "kind": "evaluation",
        "date": now.isoformat(timespec="seconds"),
        "settings": asdict(asked),
        "dtype": protocol.dtype,
        "processes": processes.count,
        "results": results,
        "stages": stages.rows,
        "environment": records.environment(device),
    }
    path = write(record, path, bool(asked.output_path))
    measures.forget()
    if records.read_pruning_record(measured.path):
        add_metrics(Path(measured.path), results[list(results)[-1]])
    return Evaluated(record, path)


def write(record: dict, path: Path, in_place: bool) -> Path:
    """Write the record, in the place of one of that name or else beside it; returns its path."""
    if not in_place:
        return records.add_record(path, record)
    records.write_record(path, record)
    return path


def find_models(asked: EvaluationSettings) -> dict[str, Location]:
    """The models to measure: "dense" and "pruned" with `with_dense`, else "model".

    Raises:
        UsageError: one of them is not there, or the pruned one was not made from the dense one.
    """
    if asked.checkpoint:
        measured, base = locate(asked.checkpoint, "--checkpoint"), None
    else:
        base = locate(asked.base_model or DEFAULT_BASE_MODEL)
        found_by = {"sparsity": asked.sparsity, "sparsity_of": asked.sparsity_of}
        folder = checkpoint_folder(asked.save_dir, base.label, **found_by)
        if not folder.is_dir():
            others = ", ".join(str(other) for other in sorted(folder.parent.glob(f"{folder.name}_*")))
            remedy = f"but {others}: name one" if others else "prune the model first, or name one"
            raise UsageError(f"--save_dir: there is no {folder}; {remedy} with --checkpoint")
        measured = locate(str(folder), "--save_dir")
    record = records.read_pruning_record(measured.path)
    with records.understood(measured.path):
        if base and record and records.has_former_shares(record):
            raise UsageError(
                f"--save_dir: {measured.path} was pruned when {record['settings']['recipe']} had other shares for "
                "grouped heads; prune anew, or name it with --checkpoint"
            )
        name = asked.base_model or (record["model"]["name"] if record and asked.with_dense else None)
        if asked.with_dense and name is None:
            raise UsageError("--with_dense: the checkpoint has no record of its dense model; name it with --base_model")
        dense = locate(name or DEFAULT_BASE_MODEL) if base or asked.with_dense else None
        if dense and record:
            check_same_model(dense, measured, record)
    return {"dense": dense, "pruned": measured} if asked.with_dense else {"model": measured}


def check_same_model(dense: Location, measured: Location, record: dict) -> None:
    """Raise UsageError if the record beside a checkpoint is of another dense model than this one.

    A local model may have moved, so its size is compared; one of the hub is known by its id and need not be at hand.
    """
    if dense.is_local:
        total = count_dense_parameters(dense, read_config(dense))["total"]
        same = record["parameters"]["before"] == total
    else:
        same = record["model"]["source"] == dense.path
    if not same:
        raise UsageError(
            f"--base_model {dense.name}: {measured.path} was pruned from {record['model']['name']} "
            f"({record['model']['source']}, {record['parameters']['before']:,} parameters); name the checkpoint that "
            "you mean with --checkpoint"
        )


def record_path(output_path: str | None, measured: Location, now: datetime) -> Path:
    """Where the record goes, checked now so that no measurement is lost for want of a place."""
    if output_path:
        path, flag = Path(output_path), "--output_path"
    else:
        name = records.EVALUATION_RECORD.format(time=f"{now:%Y%m%dT%H%M%SZ}")
        # A model without a record of ours may lie anywhere; its evaluation goes into the current folder.
        path = Path(measured.path if records.read_pruning_record(measured.path) else "") / name
        flag = "--output_path, left out"
    check_record_path(path, flag)
    return path


def common_dtype(asked: EvaluationSettings, locations: dict[str, Location]) -> str:
    """The dtype that models are read in: --dtype; where that is auto and two are compared, the pruned one's for both.

    A dense model in float32 beside a pruned one in bfloat16 would show what the dtype does, not what the pruning did.
    """
    if asked.dtype != "auto" or not asked.with_dense:
        return asked.dtype
    pruned = locations["pruned"]
    if pruned.gguf_file:
        return "float32"
    stored = str(read_config(pruned).dtype).removeprefix("torch.")
    return stored if stored in DTYPES else "auto"


def make_protocol(asked: EvaluationSettings, dtype: str, windows: Sequence[TestWindows] = ()) -> Protocol:
    """What is to be measured, its texts and tasks read, in `dtype`; raises UsageError if it is nothing.

    `windows` are measured after the texts that the settings name.
    """
    data_dir = Path(asked.data_dir)
    check_no_file(data_dir, "--data_dir")
    names = [] if asked.ppl == "none" else listed(asked.ppl, "--ppl")
    texts = [TestText(name, *evaluation_text(expanduser(name), data_dir, flag="--ppl")) for name in names]
    tasks = listed(asked.tasks, "--tasks")
    if not names and not windows and not tasks and not asked.cost:
        raise UsageError(f"--ppl {asked.ppl} leaves nothing to measure; give a text, --tasks or --cost")
    if asked.apply_chat_template and not tasks:
        raise UsageError("--apply_chat_template is for the prompts of tasks; give --tasks, or leave it out")
    generated = check_tasks(tasks, asked) if tasks else {}
    return Protocol(asked, [*texts, *windows], tasks, generated, dtype)


def check_processes(asked: EvaluationSettings, count: int) -> None:
    """Raise UsageError for what `count` processes cannot do together."""
    if asked.device_map and (count > 1 or asked.device == "cpu"):
        raise UsageError("--device_map gives one process all GPUs; leave it out, or start one process without --device")
    rows = asked.limit if asked.limit and asked.limit >= 1 else count
    if count > min(rows, asked.ppl_windows or count):
        raise UsageError(f"{count} processes have nothing to share in --limit or --ppl_windows below that")
    if asked.cost and count > 1:
        raise UsageError("--cost measures one process; leave it out, or start a single process")


def memory_advice(asked: EvaluationSettings, count: int, of_host: bool) -> str:
    """What to do when memory, of the host or of a GPU, runs out; batches are single by then, unless `count` share."""
    ways = ["a --dtype of half the width"]
    if count > 1:
        ways.insert(0, "a lower --batch_size")
    if pick_device(asked.device).type == "cuda" and not of_host:
        ways += [*([] if asked.device_map or count > 1 else ["--device_map auto"]), "--device cpu"]
    return f"give {' or '.join(ways)}"
