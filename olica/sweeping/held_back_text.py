"""The text that a sweep measures on: what the calibration set leaves of its own, or other text.

Dimensions: M windows of held-back text, T tokens in each.
"""

from dataclasses import replace

from torch import Tensor

from ..errors import UsageError
from ..run import draw_calibration_set
from ..sources.calibration_set import CalibrationSet, held_back, without
from .plan import SweepPlan


def draw_held_back(plan: SweepPlan, tokenizer, calibration: CalibrationSet) -> tuple[Tensor, list[dict]]:
    """Windows (M, T) that no calibration window is among, from other rows, and where they come from.

    Raises:
        UsageError: there are none, or too few rows.
    """
    settings, wanted, config = plan.settings, plan.wanted, plan.jobs[0].config
    if wanted.held_back_datasets is not None:
        other = replace(settings, datasets=wanted.held_back_datasets, num_samples=wanted.held_back, candidates=1)
        flag = f"--held_back_datasets {wanted.held_back_datasets}"
    else:
        before = settings.num_samples * settings.candidates
        other = replace(settings, num_samples=before + wanted.held_back, candidates=1)
        flag = f"--held_back {wanted.held_back}, which goes on top of --num_samples"
    try:
        drawn = draw_calibration_set(other, tokenizer, config)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from error
    if wanted.held_back_datasets:
        ids = without(drawn.ids, calibration.ids)
    else:
        ids = held_back(drawn, calibration, settings.candidates)
    if not len(ids):
        raise UsageError(f"{flag}: all of its samples are in the calibration set; give other text")
    return ids, drawn.sources
