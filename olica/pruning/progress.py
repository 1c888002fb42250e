"""What the passes over the layers report of what they have finished, so that a run that ends early can go on.

These two keep nothing: they serve where all happens in memory, and in processes that another one writes for.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ..methods.recipe import Findings


@dataclass(frozen=True)
class Surveyed:
    """How far a survey is.

    Attributes:
        findings: of the layers that are surveyed.
        hidden: states (N, T, D) that enter the next layer; None where nothing travels, or all are surveyed.
        travelling: states (n, T, D) of the variants that were tried, by the index of the first layer of their group and
            their number.
    """

    findings: list[Findings] = field(default_factory=list)
    hidden: Tensor | None = None
    travelling: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class SurveyProgress:
    """What is finished of a survey.

    Attributes:
        is_complete: whether an earlier run finished it.
        layers_before: how many layers an earlier run had surveyed.
    """

    is_complete = False
    layers_before = 0

    def described(self) -> dict | None:
        """What a record says of where the findings came from; None where they were not kept."""
        return None

    def surveyed(self) -> Surveyed:
        """What `save` was given last; nothing at first."""
        return Surveyed()

    def is_due(self) -> bool:
        """Whether it is time to keep how far the survey is."""
        return False

    def save(self, surveyed: Surveyed) -> None:
        """Keep how far the survey is."""

    def finish(self, findings: list[Findings]) -> None:
        """Keep the completed findings of all layers: the survey is over."""


class Progress:
    """What is finished of the cut."""

    def pruned(self) -> tuple[int, int, Tensor | None]:
        """How many layers are finished; the index of the layer that the hidden states kept last enter, which may be one
        of those, and these states (N, T, D); 0 and None: none were kept."""
        return 0, 0, None

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of a finished layer."""
        raise KeyError(index)

    def is_due(self) -> bool:
        """Whether it is time to keep hidden states beside a layer."""
        return False

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """Keep a finished layer and the hidden states that enter the next one; None: those that were kept stay."""

    def wait(self) -> None:
        """Return when the layers that were to be kept are kept."""
