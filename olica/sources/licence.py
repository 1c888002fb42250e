"""The licence of a model, as far as its files say: weights that are derived from it inherit it."""

from huggingface_hub.repocard import metadata_load
from transformers.utils import cached_file

from .gguf import header_of
from .locate import Location

CARD = "README.md"
# What cards of the hub say of it; the fields of a GGUF file are the same, with dots.
FIELDS = ("license", "license_name", "license_link")


def licence_of(location: Location) -> dict[str, str]:
    """Those of FIELDS that a model's card, or the header of its GGUF file, has."""
    if location.gguf_file:
        fields = header_of(location).fields
        said = {name: fields.get(f"general.{name.replace('_', '.')}") for name in FIELDS}
    else:
        try:
            # That of the commit whose configuration was read: asking for another would make it the one that is known.
            card = cached_file(
                location.path, CARD, revision=location.revision, _raise_exceptions_for_missing_entries=False
            )
            said = (metadata_load(card) if card else None) or {}
        except Exception:  # no network, or metadata that is none: the libraries share none
            said = {}
    return {name: said[name] for name in FIELDS if isinstance(said.get(name), str)}
