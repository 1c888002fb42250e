"""The table of methods: for each recipe the function used at each stage, and the stream its statistics come from."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..model.configuration_olica import LayerShape
from ..model.modeling_olica import Projections
from . import allocation, correction, feed_forward, query_key, value_output
from .linalg import RegressionSums
from .moments import Moments, Statistic, needs
from .value_output import FactorisedProjections, NarrowedHeads


@dataclass(frozen=True)
class Recipe:
    """One method, as a row of functions. The loop in `olica.pruning` knows nothing more about it.

    Attributes:
        name: value of the flag `--recipe`.
        sparsities: (sizes, sparsity, k) -> shares that query/key, value/output and the MLP lose.
        kept: (size, share lost) -> size that stays.
        dense_stream: whether a layer is calibrated on what the dense layers before it produce, or the pruned ones.
        query_key: (layer, moments, shape) -> factors.
        value_output: (layer, moments, survey moments, shape, H, K) -> what v_proj and o_proj become.
        channel_importance: (layer, moments) -> importance of the intermediate channels.
        protected_fraction: share of the channels, the least important, that stay nevertheless.
        survey_regression: (recipe, layer, moments, shape) -> the regression whose correlation ranks the layers.
        last_is_eligible: whether the last layer may be calibrated.
        ridge: (percdamp, mean diagonal of X^T X, samples, tokens per sample) -> ridge.
        output_weights: (sums, solution) -> weight of every output in the low-rank step of the correction.
    """

    name: str
    sparsities: Callable
    kept: Callable[[int, float], int]
    dense_stream: bool
    query_key: Callable
    value_output: NarrowedHeads | FactorisedProjections
    channel_importance: Callable
    protected_fraction: float
    survey_regression: Callable
    last_is_eligible: bool
    ridge: Callable[[float, float, int, int], float]
    output_weights: Callable

    def eligible_layers(self, layers: int) -> int:
        """How many of `layers` layers, from the first on, may be calibrated."""
        return layers if self.last_is_eligible else layers - 1

    def survey_needs(self, ranking: bool) -> set[Statistic]:
        """Statistics of the survey of a layer; without `ranking` it is not going to be calibrated."""
        return {*self.value_output.survey_needs, *(self.survey_regression.needs if ranking else ())}

    def calibration_needs(self, calibrated: bool) -> set[Statistic]:
        """Statistics that pruning one layer takes, with or without a linear correction."""
        stages = [self.query_key, self.value_output, self.channel_importance]
        if calibrated:
            stages.append(correction.residual_sums)
        return {statistic for stage in stages for statistic in stage.needs}

    def kept_channels(self, layer: Projections, moments: Moments, shape: LayerShape) -> Tensor:
        """Indices of the intermediate channels that stay."""
        importance = self.channel_importance(layer, moments)
        return feed_forward.kept_channels(importance, shape.intermediate_size, self.protected_fraction)


@needs(*correction.dense_output_sums.needs)
def regress_dense_output(recipe: Recipe, layer: Projections, moments: Moments, shape: LayerShape) -> RegressionSums:
    """Rank layers by how linear the dense MLP is."""
    return correction.dense_output_sums(layer, moments)


@needs(*correction.residual_sums.needs, *feed_forward.paper_importance.needs)
def regress_residual(recipe: Recipe, layer: Projections, moments: Moments, shape: LayerShape) -> RegressionSums:
    """Rank layers by how well the residual of the MLP, pruned as planned, is explained (paper, eq. 9)."""
    return correction.residual_sums(layer, moments, recipe.kept_channels(layer, moments, shape))


# The released code's arithmetic, which made the paper's tables; grouped heads lose what its rule says of plain ones.
OLICA = Recipe(
    name="olica",
    sparsities=allocation.released_sparsities,
    kept=allocation.kept_by_code,
    dense_stream=False,
    query_key=query_key.low_rank_query_key,
    value_output=NarrowedHeads(value_output.output_directions, value_output.released_importance),
    channel_importance=feed_forward.released_importance,
    protected_fraction=feed_forward.RELEASED_PROTECTED_FRACTION,
    survey_regression=regress_dense_output,
    last_is_eligible=False,
    ridge=correction.released_ridge,
    output_weights=correction.released_output_weights,
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        OLICA,
        # Ours: other shares where heads are grouped, of which the released code knows nothing.
        replace(OLICA, name="olica-grouped", sparsities=allocation.grouped_sparsities),
        Recipe(  # the paper's text: equations 4 to 11, Algorithm 1, Appendix A
            name="olica-paper",
            sparsities=allocation.paper_sparsities,
            kept=allocation.kept_by_paper,
            dense_stream=True,
            query_key=query_key.low_rank_query_key,
            value_output=NarrowedHeads(value_output.value_directions, value_output.paper_importance),
            channel_importance=feed_forward.paper_importance,
            protected_fraction=0.0,
            survey_regression=regress_residual,
            last_is_eligible=True,
            ridge=correction.paper_ridge,
            output_weights=correction.equal_output_weights,
        ),
        # What the paper compares Fast-OND with, everything else being equal: full OND (Table 6); SVD, SVD weighted by
        # the inputs' norms, and importance without any decomposition (Table 5).
        replace(
            OLICA,
            name="olica-ond",
            value_output=NarrowedHeads(value_output.product_directions, value_output.released_importance),
        ),
        replace(OLICA, name="olica-svd", value_output=FactorisedProjections(by_input=False)),
        replace(OLICA, name="olica-awsvd", value_output=FactorisedProjections(by_input=True)),
        replace(
            OLICA,
            name="olica-wanda",
            value_output=NarrowedHeads(value_output.given_directions, value_output.released_importance),
        ),
    )
}

# Other names of recipes. While `olica` had shares of its own for grouped heads, this was the row of the released ones.
ALIASES = {"olica-released": "olica"}


def recipe_name(text: str) -> str:
    """The name in `RECIPES` of the recipe that a user calls `text`."""
    return ALIASES.get(text, text)
