"""What a pruning is asked for: the flags of the command line, by their names, with what they may be."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from os.path import expanduser
from typing import Any

from .checks import as_bytes, as_kind, check_choice, refuse_unknown
from .errors import UsageError
from .methods.plus import PlusParameters
from .methods.recipe import PAPERS_TEXT
from .methods.recipes import RECIPES
from .methods.refit import LeastSquares, Refit
from .model.layouts import LAYOUTS, OWN_LAYOUT
from .outputs.names import DEFAULT_BASE_MODEL, DEFAULT_RECIPE, RECIPES_OWN, SPARSITY_OF
from .outputs.weight_shards import LARGEST_FILE
from .sources.weights import DTYPES

# What `--refit` puts in place of all that a recipe, of which these are the parameters, does with what stays.
REFITS: dict[str, Callable[[Any], Refit | None]] = {
    RECIPES_OWN: lambda _: None,
    "none": lambda _: None,
    "least-squares": lambda parameters: LeastSquares(getattr(parameters, "ridge", PlusParameters.ridge)),
}
# Settings that are a number or "auto".
NUMBERS_OR_AUTO = ("batch_size", "round_to")
# Settings that may begin with ~.
PATHS = ("base_model", "data_dir", "save_dir")
# The values of the settings that are one of a few. Recipes are looked up when they are asked for: others may come in.
CHOICES: dict[str, Iterable[Any]] = {
    "add_bos_token": (False, True),
    "overwrite": (False, True),
    "recipe": RECIPES,
    "sparsity_of": SPARSITY_OF,
    "layout": LAYOUTS,
    "refit": REFITS,
    "dtype": ("auto", *DTYPES),
}


@dataclass(frozen=True)
class Settings:
    """What a pruning is asked for: the flags of the command line, by their names, with their defaults.

    Attributes:
        base_model: name, hub id, folder or .gguf file.
        dtype: to run and save in.
        datasets: texts joined by +, or a token file; None becomes the recipe's own.
        data_dir: folder searched first for named texts; drawn tokens and surveys are kept there.
        num_samples: samples drawn from each text; None becomes the recipe's number for its own, else the paper's.
        seqlen: tokens in each.
        seed: of the draw.
        add_bos_token: whether every sample begins with the tokenizer's start token.
        candidates: how many times as many samples are drawn, of which those stay that have the most different tokens;
            None becomes the recipe's number for its own text, else 1.
        recipe: name of the method.
        sparsity: share of the parameters to remove, in [0, 1).
        sparsity_of: what it is a share of: the whole "model" or its decoder "layers".
        round_to: sizes become multiples of it; "auto": what the layout wants.
        layout: what the checkpoint can hold, a key of `LAYOUTS`.
        refit: what is done with what stays: what the "recipe" does, "none", or "least-squares".
        device: where layers run.
        cache_dev: where hidden states live.
        batch_size: samples that go through a layer at a time, or "auto".
        save_dir: folder that receives the checkpoint's folder.
        max_shard_size: largest file of weights, such as "500MB" or "5GB"; a single weight that is larger has its own.
        overwrite: replace an existing checkpoint.
        parameters: those of the recipe that are not left at their defaults, by name.
    """

    base_model: str = DEFAULT_BASE_MODEL
    dtype: str = "auto"
    datasets: str | None = None
    data_dir: str = "./data"
    num_samples: int | None = None
    seqlen: int = 128
    seed: int = 0
    add_bos_token: bool = False
    candidates: int | None = None
    recipe: str = DEFAULT_RECIPE
    sparsity: float = 0.2
    sparsity_of: str = SPARSITY_OF[0]
    round_to: int | str = "auto"
    layout: str = OWN_LAYOUT
    refit: str = RECIPES_OWN
    device: str = "auto"
    cache_dev: str = "auto"
    batch_size: int | str = 16
    save_dir: str = "./pruned_models"
    max_shard_size: str = LARGEST_FILE
    overwrite: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in fields(self):
            kind = int if f.name in NUMBERS_OR_AUTO else type(f.default)
            if kind in (int, float, str) and not (f.name in NUMBERS_OR_AUTO and getattr(self, f.name) == "auto"):
                value = as_kind(f.name, getattr(self, f.name), kind)
                object.__setattr__(self, f.name, expanduser(value) if f.name in PATHS else value)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"--sparsity {self.sparsity:g} is outside [0, 1): it is the share of parameters to remove")
        as_bytes("max_shard_size", self.max_shard_size)
        if self.batch_size != "auto" and self.batch_size < 1:
            raise UsageError(f"--batch_size {self.batch_size} must be at least 1")
        own = RECIPES[self.recipe].text
        given = own if self.datasets is None else PAPERS_TEXT
        defaults = {"datasets": own.datasets, "num_samples": given.num_samples, "candidates": given.candidates}
        for name, default in defaults.items():
            value = getattr(self, name)
            object.__setattr__(self, name, default if value is None else as_kind(name, value, type(default)))
        if self.candidates < 1:
            raise UsageError(f"--candidates {self.candidates} must be at least 1")

    def flat(self) -> dict[str, Any]:
        """All settings by the names of their flags, the recipe's parameters at their values."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "parameters"}
        own["round_to"] = self.multiple
        return own | asdict(RECIPES[self.recipe].with_parameters(self.parameters))

    @property
    def shard_bytes(self) -> int:
        """Bytes of weights that a file has at most, unless a single one has more."""
        return as_bytes("max_shard_size", self.max_shard_size)

    @property
    def multiple(self) -> int:
        """What sizes become multiples of."""
        return LAYOUTS[self.layout].round_to if self.round_to == "auto" else int(self.round_to)


def settings_of(given: dict[str, Any], others: Iterable[str] = ()) -> Settings:
    """Settings, some of which are parameters of the recipe.

    Args:
        given: by their names.
        others: names of what the caller takes beside them, for messages.

    Raises:
        UsageError: a name that is neither, or a value that cannot be.
    """
    names = [f.name for f in fields(Settings) if f.name != "parameters"]
    own = {name: value for name, value in given.items() if name in names}
    parameters = {name: value for name, value in given.items() if name not in names}
    settings = Settings(**own, parameters=parameters)
    recipe, of_recipes = RECIPES[settings.recipe], {name for row in RECIPES.values() for name in row.parameter_names}
    strangers = [name for name in parameters if name not in of_recipes]
    named = [name for name in names if name != "base_model"]  # the first argument has no name
    refuse_unknown(strangers, [*named, *others, *recipe.parameter_names])
    recipe.with_parameters(parameters)
    return settings
