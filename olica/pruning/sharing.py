"""What several processes share of a pruning, each of which has a share of the samples; one writes what is finished.

Where there is one process only, all is handed on as it is.

N samples, n those that variants of a layer see, T tokens, D hidden size
"""

from torch import Tensor, nn

from ..methods.moments import Moments
from ..processes import Processes
from .options import Work
from .progress import Progress, Surveyed, SurveyProgress


def combine(moments: Moments, processes: Processes) -> None:
    """Have moments of a process's samples become those of all samples."""
    if moments.statistics:
        moments.move_to(processes.tensors_of(0, moments.centres))
        processes.add_up(moments.sums)
        moments.count = sum(processes.all_of(moments.count))


def spread(wanted: int, number: int) -> list[int]:
    """Indices of `wanted` of `number` samples, evenly spread, since the texts come one after the other."""
    return [index * number // wanted for index in range(wanted)]


def probe_rows(work: Work, samples: int) -> list[list[int]]:
    """Which samples the variants of layers see, `samples` in all, for every process."""
    number, processes = len(work.calibration_ids), work.options.processes
    shares = [processes.rows_of(index, number) for index in range(processes.count)]
    return [[row for row in spread(samples, number) if row in share] for share in shares]


def taken_up_survey(work: Work, progress: SurveyProgress, probes: list[list[int]]) -> Surveyed:
    """How far a survey is, with this process's share of the states.

    Args:
        work: what is surveyed.
        progress: what the main process has kept of it.
        probes: those of `probe_rows`.
    """
    processes = work.options.processes
    kept = progress.surveyed()
    findings = [
        processes.tensors_of(0, kept.findings[index] if processes.is_main else None)
        for index in range(processes.from_main(len(kept.findings)))
    ]
    hidden = _scattered(work, kept.hidden)
    rows = [len(own) for own in probes]
    travelling = {
        key: processes.scattered(kept.travelling.get(key), rows) for key in processes.from_main([*kept.travelling])
    }
    return Surveyed(findings, hidden, travelling)


def keep_survey(work: Work, progress: SurveyProgress, surveyed: Surveyed) -> None:
    """Have the main process keep, now and then, how far a survey is, of which each has its share of the states."""
    processes = work.options.processes
    _agree_on_batches(work)
    if processes.on_main(progress.is_due):
        hidden = None if surveyed.hidden is None else processes.gathered(surveyed.hidden)
        travelling = {key: processes.gathered(state) for key, state in surveyed.travelling.items()}
        if processes.is_main:
            progress.save(Surveyed(surveyed.findings, hidden, travelling))


def taken_up_cut(work: Work, progress: Progress) -> tuple[int, int, Tensor | None]:
    """What `Progress.pruned` says in the main process, with this process's share of the hidden states."""
    finished, entered, hidden = progress.pruned()
    finished, entered = work.options.processes.from_main((finished, entered))
    return finished, entered, _scattered(work, hidden)


def weights_of(work: Work, progress: Progress, index: int) -> dict[str, Tensor]:
    """The weights of a finished layer, which the main process has kept."""
    processes = work.options.processes
    return processes.tensors_of(0, progress.weights(index) if processes.is_main else None)


def keep_layer(work: Work, progress: Progress, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
    """Have the main process keep a finished layer and, now and then, the states that enter the next (None: none do)."""
    processes = work.options.processes
    _agree_on_batches(work)
    if hidden is not None:
        hidden = processes.gathered(hidden) if processes.on_main(progress.is_due) else None
    progress.save_layer(index, layer, hidden)


def _agree_on_batches(work: Work) -> None:
    """Have all go on with the smallest batch: what a run goes on with is then one number, whoever ran out of memory."""
    batch_size = work.options.batch_size
    batch_size.size = min(work.options.processes.all_of(batch_size.size))


def _scattered(work: Work, hidden: Tensor | None) -> Tensor | None:
    """This process's share of hidden states (N, T, D) that the main process has; None where it has none."""
    processes, samples = work.options.processes, len(work.calibration_ids)
    if not processes.from_main(hidden is not None):
        return None
    return processes.scattered(hidden, [len(processes.rows_of(index, samples)) for index in range(processes.count)])
