"""What the passes over the layers tell of what they have finished, so that a run that ends early can go on."""

from torch import Tensor, nn


class Progress:
    """What is finished of a pruning. This one keeps nothing: it serves where all happens in memory."""

    def survey(self) -> tuple[dict, dict[str, Tensor], Tensor | None]:
        """What `save_survey` was given last: facts, tensors and hidden states; empty at first."""
        return {}, {}, None

    def save_survey(self, facts: dict, tensors: dict[str, Tensor], hidden: Tensor | None) -> None:
        """Keep, now and then, what the survey has found and the hidden states (N, T, D) that enter the next layer.

        Args:
            facts: plain values; `layers` is the number of surveyed layers.
            tensors: the rest of it.
            hidden: None when all layers are surveyed; that is always kept.
        """

    def pruned(self) -> tuple[int, int, Tensor | None]:
        """How many layers are finished; hidden states (N, T, D) that were kept last, and the index of the layer that
        they enter, which may be one of those (None and 0: none were kept)."""
        return 0, 0, None

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of a finished layer."""
        raise KeyError(index)

    def save_layer(self, index: int, layer: nn.Module, hidden: Tensor | None) -> None:
        """Keep a finished layer and, now and then, the hidden states that enter the next one (None: there is none)."""

    def wait(self) -> None:
        """Return when the layers that were to be kept are kept."""
