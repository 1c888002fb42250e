"""Where checkpoints lie: what prunes saves them there, and what measures them finds them there."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..model.layouts import OWN_LAYOUT

DEFAULT_BASE_MODEL, DEFAULT_RECIPE = "7b", "olica"
# What `--sparsity` is a share of: the whole model, as in the paper, or the decoder layers alone.
SPARSITY_OF = ("model", "layers")

# What `--refit` says of the recipe's own repair.
RECIPES_OWN = "recipe"


# Flags that a folder is named after where they are not at their defaults.
NAMED = {
    "sparsity_of": (SPARSITY_OF[0], "_of-{}"),
    "recipe": (DEFAULT_RECIPE, "_{}"),
    "layout": (OWN_LAYOUT, "_layout-{}"),
    "refit": (RECIPES_OWN, "_refit-{}"),
}
# Those of them that make something else of what a recipe does.
DIALS = ("layout", "refit")


def checkpoint_folder(save_dir: str, label: str, sparsity: float, **flags: str) -> Path:
    """Where a pruned model is saved; evaluation finds it by two flags where the others are at their defaults."""
    return _named(save_dir, f"{label}_sparsity-{sparsity:g}", flags)


def sweep_folder(save_dir: str, label: str, **flags: str) -> Path:
    """Where a sweep over the sparsity has its record and its page."""
    return _named(save_dir, f"{label}_sweep", flags)


def _named(save_dir: str, name: str, flags: Mapping[str, str]) -> Path:
    return Path(save_dir) / "".join([name, *(NAMED[flag][1].format(flags[flag]) for flag in turned(flags))])


def recipe_in_words(settings: Mapping[str, Any], dials: Iterable[str] = DIALS) -> str:
    """The recipe, and those of some dials that are not at their defaults."""
    return ", ".join([settings["recipe"], *(f"{name}: {settings[name]}" for name in turned(settings, dials))])


def turned(settings: Mapping[str, Any], names: Iterable[str] = NAMED) -> list[str]:
    """Those of some of these flags that are not at their defaults; an old record may lack them."""
    return [name for name in names if settings.get(name, NAMED[name][0]) != NAMED[name][0]]
