"""Olica (He and Lin, ICML 2025), as the released code and as the paper has it, and what the paper compares it with."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..checks import check_above_zero
from ..errors import UsageError
from ..model.configuration_olica import LayerShape
from . import correction, feed_forward, shares, value_output
from .correction import (
    LowRankCorrection,
    Ridge,
    dense_output_sums,
    fit_workspace,
    naming,
    residual_sums,
    residual_workspace,
    ridge_of,
)
from .feed_forward import ThinnedMLP
from .linalg import RegressionSums, multiple_correlation, ridge_regression
from .moments import Statistic, diagonal
from .query_key import LowRankQueryKey
from .recipe import Findings, Layer, Method, Survey
from .shares import Corrections, FixedShares
from .sizes import Sizes
from .thinning import thin
from .value_output import OUTPUT_MOMENT, FactorisedProjections, NarrowedHeads


@dataclass(frozen=True)
class OlicaParameters:
    """What Olica leaves open, with the defaults of the released code."""

    k: float = field(default=3.0, metadata={"help": "query and key lose this many times the share of value and output"})
    mlp_num: int = field(
        default=shares.DEFAULT_CORRECTIONS, metadata={"help": "number of MLPs that get a linear correction"}
    )
    ratio: float = field(default=0.03, metadata={"help": "rank of a correction, a share of the hidden size in (0, 1]"})
    percdamp: float = field(default=0.5, metadata={"help": "ridge penalty in mean diagonals of X^T X, above 0"})

    def __post_init__(self) -> None:
        check_above_zero("k", self.k, "it is a ratio of shares")
        check_above_zero("percdamp", self.percdamp, "without it the fit may be singular")
        if not 0 < self.ratio <= 1:
            raise UsageError(f"--ratio {self.ratio:g} is outside (0, 1]: it is a share of the hidden size")


class Regression(Protocol):
    """What ranks the layers: a regression on the MLP's input.

    Attributes:
        needs: statistics that it reads.
        reads_plan: whether it depends on the sizes planned.
    """

    @property
    def needs(self) -> frozenset[Statistic]: ...  # noqa: D102

    @property
    def reads_plan(self) -> bool: ...  # noqa: D102

    def __call__(self, layer: Layer, shape: LayerShape | None) -> RegressionSums:
        """Its sums; `shape` are the sizes planned for the layer, which it needs if it reads the plan."""

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """Bytes that it takes beside the statistics."""


@dataclass(frozen=True)
class OfDenseOutput:
    """How linear is the dense MLP? The released code's question (D6)."""

    needs = dense_output_sums.needs
    reads_plan = False

    def __call__(self, layer: Layer, shape: LayerShape | None) -> RegressionSums:
        """See `Regression`."""
        return dense_output_sums(layer.moments)

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Regression`."""
        return 0


@dataclass(frozen=True)
class OfResidual:
    """How well is explained what the MLP, pruned as planned by `mlp`, loses? The paper's question (eq. 9)."""

    mlp: ThinnedMLP

    reads_plan = True

    @property
    def needs(self) -> frozenset[Statistic]:
        """See `Regression`."""
        return residual_sums.needs | self.mlp.importance.needs

    def __call__(self, layer: Layer, shape: LayerShape | None) -> RegressionSums:
        """See `Regression`."""
        assert shape is not None, "sizes are planned before"
        thinned = thin(layer.weights.down_proj.weight, self.mlp.kept(layer, shape))
        return residual_sums(layer.moments, *thinned.lost())

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Regression`."""
        return residual_workspace(sizes, sizes.intermediate_size - shape.intermediate_size)


@dataclass(frozen=True)
class OlicaSurvey(Survey):
    """What Olica measures of the dense layers: what the value heads' basis needs, and what ranks the MLPs.

    Attributes:
        regression: whose mean multiple correlation (paper, eq. 9 and 10: MC2) is the finding `correlation`.
        ridge: rule of its ridge.
        percdamp: strength of the ridge.
        corrections: which layers may get one.
        keeps: further findings by name: statistics, to be O(F) numbers.
    """

    regression: Regression
    ridge: Ridge
    percdamp: float
    corrections: Corrections
    keeps: dict[str, Statistic]

    @property
    def serves_stages(self) -> bool:  # type: ignore[override]
        """See `Survey`."""
        return bool(self.keeps)

    @property
    def reads_plan(self) -> bool:  # type: ignore[override]
        """See `Survey`."""
        return self.corrections.number > 0 and self.regression.reads_plan

    def decided_by(self, parameters: Any) -> dict[str, Any]:
        """See `Survey`; how many layers get a correction, and of which rank, is decided later."""
        return {"ranking": self.corrections.number > 0, "percdamp": self.percdamp}

    def needs(self, index: int, layers: int) -> frozenset[Statistic]:
        """See `Survey`."""
        ranking = self.corrections.number and index < self.corrections.candidates(layers)
        return frozenset(self.keeps.values()) | (self.regression.needs if ranking else frozenset())

    def workspace(self, sizes: Sizes, shape: LayerShape) -> int:
        """See `Survey`."""
        return self.regression.workspace(sizes, shape) + fit_workspace(sizes) if self.corrections.number else 0

    def __call__(self, layer: Layer, shape: LayerShape | None) -> Findings:
        """See `Survey`; a layer whose statistics are not summed has no `correlation`."""
        findings = {name: layer.moments[statistic].cpu() for name, statistic in self.keeps.items()}
        if layer.moments.cover(self.regression.needs):
            sums = self.regression(layer, shape)
            with naming(self.percdamp):
                solution = ridge_regression(sums, ridge_of(layer.moments, self.ridge, self.percdamp))
            findings["correlation"] = multiple_correlation(sums, solution).mean().cpu()
        return findings


# The released code's Fast-OND.
FAST_OND = NarrowedHeads(value_output.output_directions, value_output.released_importance)


def released(
    parameters: OlicaParameters,
    rule: shares.Shares = shares.released_sparsities,
    value_heads: NarrowedHeads | FactorisedProjections = FAST_OND,
) -> Method:
    """The released code's arithmetic, which made the paper's tables; grouped heads lose what it says of plain ones.

    Args:
        parameters: as given.
        rule: of the shares.
        value_heads: what becomes of v_proj and o_proj.
    """
    ridge = correction.released_ridge
    corrections = Corrections(parameters.mlp_num, parameters.ratio, last_is_eligible=False)
    repair = LowRankCorrection(ridge, parameters.percdamp, correction.released_output_weights)
    mlp = ThinnedMLP(feed_forward.released_importance, feed_forward.RELEASED_PROTECTED_FRACTION, repairs=(repair,))
    is_factorised = isinstance(value_heads, FactorisedProjections)
    is_measured = getattr(value_heads, "directions", None) is value_output.output_directions
    keeps = {OUTPUT_MOMENT: diagonal("attention_output")} if is_measured else {}
    survey = OlicaSurvey(OfDenseOutput(), ridge, parameters.percdamp, corrections, keeps)
    return Method(
        stream="pruned",
        survey=survey if keeps or corrections.number else None,
        allocate=FixedShares(rule, shares.kept_by_code, parameters.k, is_factorised, corrections),
        passes=((mlp, LowRankQueryKey(), value_heads),),
    )


def paper(parameters: OlicaParameters) -> Method:
    """The paper's text: equations 4 to 11, Algorithm 1, Appendix A."""
    ridge = correction.paper_ridge
    corrections = Corrections(parameters.mlp_num, parameters.ratio, last_is_eligible=True)
    repair = LowRankCorrection(ridge, parameters.percdamp, correction.equal_output_weights)
    mlp = ThinnedMLP(feed_forward.paper_importance, repairs=(repair,))
    value_heads = NarrowedHeads(value_output.value_directions, value_output.paper_importance)
    survey = OlicaSurvey(OfResidual(mlp), ridge, parameters.percdamp, corrections, keeps={})
    return Method(
        stream="dense",
        survey=survey if corrections.number else None,
        allocate=FixedShares(shares.paper_sparsities, shares.kept_by_paper, parameters.k, False, corrections),
        passes=((mlp, LowRankQueryKey(), value_heads),),
    )
