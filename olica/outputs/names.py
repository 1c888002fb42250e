"""Where checkpoints lie: what prunes saves them there, and what measures them finds them there."""

from pathlib import Path

DEFAULT_RECIPE = "olica"
# What `--sparsity` is a share of: the whole model, as in the paper, or the decoder layers alone.
SPARSITY_OF = ("model", "layers")

# What `--refit` says of the recipe's own repair.
RECIPES_OWN = "recipe"


def checkpoint_folder(
    save_dir: str,
    label: str,
    sparsity: float,
    recipe: str = DEFAULT_RECIPE,
    sparsity_of: str = SPARSITY_OF[0],
    refit: str = RECIPES_OWN,
) -> Path:
    """Where a pruned model is saved; defaults are not named, so that evaluation finds it by two flags."""
    of = "" if sparsity_of == SPARSITY_OF[0] else f"_of-{sparsity_of}"
    suffix = "" if recipe == DEFAULT_RECIPE else f"_{recipe}"
    repaired = "" if refit == RECIPES_OWN else f"_refit-{refit}"
    return Path(save_dir) / f"{label}_sparsity-{sparsity:g}{of}{suffix}{repaired}"
