"""Which files of a folder are its model's: others may lie there, of an adapter, another form or an old download."""

import json
import re
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..checks import refuse_pointers
from ..errors import UsageError

# In the order in which transformers looks: the weights as a whole, or an index of files that hold them.
WEIGHT_FORMS = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
# How llama.cpp names the parts of a model that it splits.
GGUF_PART = re.compile(r"-(\d{5})-of-(?!00001)\d{5}$")
ONE_PART = (
    "the file is one part of a split model; put it together by "
    "llama-gguf-split --merge FIRST_PART WHOLE.gguf, and give that"
)


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights of the model in `folder`, those that transformers reads; none if it has none.

    Raises:
        UsageError: the index is damaged, or names files that are not there.
    """
    folder = Path(folder)
    for whole, index in WEIGHT_FORMS:
        if (folder / whole).is_file():
            return [folder / whole]
        if (folder / index).is_file():
            return _indexed(folder / index)
    return []


def folder_weight_bytes(folder: str | Path) -> int:
    """Bytes on disk of the files that hold a model's weights, headers included; 0 if `folder` holds no model."""
    return sum(path.stat().st_size for path in weight_files(folder))


def model_files(folder: str | Path) -> list[Path]:
    """All files that say what the model in `folder` is: its weights, and those of settings and tokenizers.

    Raises:
        UsageError: as `weight_files`.
    """
    return sorted([*weight_files(folder), *Path(folder).glob("*.json"), *Path(folder).glob("*.model")])


def _indexed(index: Path) -> list[Path]:
    refuse_pointers([index])
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (index.parent / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is not the index of a model's weights; download or convert it anew") from error
    if missing:
        raise UsageError(f"{index} names {missing[0]}, which is not there; download or convert it anew")
    return [index.parent / name for name in names]
