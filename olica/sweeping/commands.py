"""The commands that a sweep's page and record name: of the sweep, and of each of its points."""

import shlex
from dataclasses import asdict, fields
from typing import Any

from ..settings import Settings
from .plan import SweepPlan, SweepSettings


def command_of(script: str, settings: Settings, **more: Any) -> str:
    """The command of a script with these settings: what is at its default is left out, but for model and recipe.

    Args:
        script: name of the script.
        settings: of the pruning, whose sparsity is left out.
        more: flags beside them, by name; a switch is True.
    """
    plain, flags = Settings(recipe=settings.recipe), {"base_model": settings.base_model, **more}
    flags["recipe"] = settings.recipe
    if settings.datasets != plain.datasets:  # other texts have another number of samples by default
        plain = Settings(recipe=settings.recipe, datasets=settings.datasets)
        flags["datasets"] = settings.datasets
    for f in fields(Settings):
        value = getattr(settings, f.name)
        if f.name not in ("sparsity", "overwrite", "parameters", *flags) and value != getattr(plain, f.name):
            flags[f.name] = value
    words = ["python", script]
    for name, value in (flags | settings.parameters).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def sweep_command(plan: SweepPlan) -> str:
    """The command of a sweep."""
    plain = SweepSettings()
    asked = {name: value for name, value in asdict(plan.wanted).items() if value != getattr(plain, name)}
    asked["sparsity"] = ",".join(f"{sparsity:g}" for sparsity in plan.wanted.sparsity)
    return command_of("model_sweep.py", plan.settings, **asked)
