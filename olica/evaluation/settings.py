"""What an evaluation is asked for: the flags of model_evaluate.py, their defaults, and what is wrong with a value."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from os.path import exists, expanduser
from typing import Any, Self

from ..checks import as_kind, check_choice, refuse_unknown
from ..errors import UsageError
from ..machine import DEVICES
from ..outputs.names import SPARSITY_OF
from ..sources.weights import DTYPES

# The values of the settings that are one of a few.
CHOICES = {
    "sparsity_of": tuple(SPARSITY_OF),
    "dtype": ("auto", *DTYPES),
    "device": DEVICES,
    "device_map": (None, "auto"),
    "with_dense": (False, True),
    "add_bos_token": (False, True),
    "apply_chat_template": (False, True),
    "cost": (False, True),
}
PATHS = ("base_model", "save_dir", "checkpoint", "data_dir", "output_path")
# Whole numbers, by the least that they may be; the tokenizer and the model say more.
LEAST = {"batch_size": 1, "ppl_windows": 1, "num_fewshot": 0, "ppl_seqlen": None, "seed": None}


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation, by the names of the flags, which `model_evaluate.py --help` explains.

    Raises:
        UsageError: a value is none that any model could satisfy.
    """

    base_model: str | None = None
    sparsity: float = 0.2
    sparsity_of: str = SPARSITY_OF[0]
    save_dir: str = "./pruned_models"
    checkpoint: str | None = None
    with_dense: bool = False
    dtype: str = "auto"
    ppl: str = "wikitext2"
    ppl_seqlen: int = 128
    ppl_windows: int | None = None
    tasks: str = ""
    num_fewshot: int = 0
    limit: int | float | None = None
    add_bos_token: bool = False
    apply_chat_template: bool = False
    cost: bool = False
    prompt: str | None = None
    data_dir: str = "./data"
    seed: int = 0
    device: str = "auto"
    device_map: str | None = None
    batch_size: int = 16
    output_path: str | None = None

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in CHOICES:
                check_choice(name, value, CHOICES[name])
            elif name != "limit" and not (value is None and field.default is None):
                value = as_kind(name, value, int if name in LEAST else float if name == "sparsity" else str)
                object.__setattr__(self, name, expanduser(value) if name in PATHS else value)
        for name, least in LEAST.items():
            if least is not None and (value := getattr(self, name)) is not None and value < least:
                raise UsageError(f"--{name} {value} must be at least {least}")
        share = isinstance(self.limit, float) and 0 < self.limit < 1
        rows = isinstance(self.limit, int) and not isinstance(self.limit, bool) and self.limit >= 1
        if self.limit is not None and not share and not rows:
            raise UsageError(
                f"--limit {self.limit} must be a number of rows without a point, or a share of them below 1"
            )
        if not math.isfinite(self.sparsity):
            raise UsageError(f"--sparsity {self.sparsity} is no number that a checkpoint was pruned by")

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """The settings with these values by their names; a sequence of names stands for what commas join.

        Raises:
            UsageError: a name is that of no setting, or a value is wrong.
        """
        named = [field.name for field in fields(cls) if field.name != "checkpoint"]  # the first argument has no name
        refuse_unknown([name for name in values if name != "checkpoint"], named)
        joined = {
            name: value if isinstance(value, str) else ",".join(as_kind(name, item, str) for item in value) or absent
            for name, absent in (("ppl", "none"), ("tasks", ""))
            if isinstance(value := values.get(name), Iterable)
        }
        return cls(**values | joined)


def listed(names: str, flag: str) -> list[str]:
    """The names that commas join.

    Raises:
        UsageError: one of them is there twice.
    """
    found = [name for name in _split(names) if name]
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {names}: a name is there twice")
    return found


def _split(names: str) -> Iterator[str]:
    """The names that commas join; of a path that exists, a comma is a part."""
    parts = names.split(",")
    while parts:
        ends = range(len(parts), 1, -1)
        end = next((end for end in ends if exists(expanduser(",".join(parts[:end]).strip()))), 1)
        yield ",".join(parts[:end]).strip()
        parts = parts[end:]
