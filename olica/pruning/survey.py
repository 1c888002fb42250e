"""Stream the calibration set through the dense model before anything is pruned: what ranks layers, and what bases need.

N samples, T tokens, D hidden size
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import correction
from ..methods.allocation import with_corrections
from ..methods.linalg import multiple_correlation, ridge_regression
from ..methods.moments import Moments
from ..methods.recipes import Recipe
from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import projections_of
from ..sources.dense_model import DenseModel
from .activations import calibrate, enter_layers
from .options import PruningOptions
from .progress import Progress
from .soundness import check_finite, regression

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSurvey:
    """What the survey keeps of a dense layer.

    Attributes:
        correlation: mean multiple correlation of the recipe's regression; None where the layer is not to be calibrated.
        moments: the sums that the basis of the value heads needs.
    """

    correlation: float | None
    moments: Moments


@torch.no_grad()
def survey_layers(
    dense: DenseModel,
    calibration_ids: Tensor,
    shapes: list[LayerShape],
    recipe: Recipe,
    options: PruningOptions,
    progress: Progress,
) -> list[LayerSurvey]:
    """Stream the calibration set (N, T) through the dense layers, as far as anything is asked of them."""
    layers, heads = len(shapes), dense.config.num_attention_heads
    facts, tensors, hidden = progress.survey()
    survey = _unpacked(facts, tensors, recipe, heads)
    eligible = recipe.eligible_layers(layers) if options.mlp_num else 0
    wanted = [recipe.survey_needs(ranking=index < eligible) for index in range(layers)]
    if not any(wanted):
        return [LayerSurvey(None, Moments((), heads)) for _ in shapes]
    if len(survey) == layers:
        return survey
    hidden, calls = enter_layers(dense, calibration_ids, hidden, options.cache_device)
    for index, layer in dense.layers(options.device, "survey", first=len(survey)):
        moments = Moments(wanted[index], heads)
        calibrate(layer, hidden, calls[index], moments, options.batch_size, advance=index + 1 < layers)
        check_finite(moments, index, hidden.dtype)
        correlation = None
        if index < eligible:
            sums = recipe.survey_regression(recipe, projections_of(layer), moments, shapes[index])
            with regression(options.percdamp, index):
                ridge = options.ridge(recipe, moments, calibration_ids.shape)
                correlation = multiple_correlation(sums, ridge_regression(sums, ridge)).mean().item()
        survey.append(LayerSurvey(correlation, moments.kept(recipe.value_output.survey_needs)))
        progress.save_survey(*_packed(survey), hidden if index + 1 < layers else None)
    return survey


def _packed(survey: list[LayerSurvey]) -> tuple[dict, dict[str, Tensor]]:
    facts = {
        "layers": len(survey),
        "correlations": [layer.correlation for layer in survey],
        "tokens": survey[0].moments.count,
    }
    tensors = {}
    for index, layer in enumerate(survey):
        tensors |= {f"{index}.{name}": summed for name, summed in layer.moments.state().items()}
    return facts, tensors


def _unpacked(facts: dict, tensors: dict[str, Tensor], recipe: Recipe, heads: int) -> list[LayerSurvey]:
    survey = []
    for index, correlation in enumerate(facts.get("correlations", [])):
        prefix = f"{index}."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        moments = Moments.restored(state, recipe.value_output.survey_needs, heads, facts["tokens"])
        survey.append(LayerSurvey(correlation, moments))
    return survey


def choose_corrected(
    plan: list[LayerShape], survey: list[LayerSurvey], recipe: Recipe, options: PruningOptions
) -> list[LayerShape]:
    """The plan with corrections beside the `options.mlp_num` MLPs whose survey promises most."""
    if options.mlp_num == 0:
        return plan
    correlations = [layer.correlation for layer in survey]
    calibrated = correction.best_explained(correlations, options.mlp_num)
    logger.info("calibrated layers: %s", calibrated)
    return with_corrections(plan, calibrated, options.correction_rank)
