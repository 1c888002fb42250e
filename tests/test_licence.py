"""The licence of a model by its card or the header of its GGUF file."""

from pathlib import Path

import pytest
from conftest import save_tiny
from tiny_gguf import merging_tokenizer

from olica.outputs.gguf_file import write_gguf
from olica.sources.licence import licence_of
from olica.sources.locate import locate


@pytest.fixture
def saved(tmp_path) -> Path:
    save_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Tiny\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_name: own\n---\n", {"license": "other", "license_name": "own"}),
        ("---\nlicense: [mit, gpl]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# Tiny, of which nothing is said\n", {}),
        (None, {}),
    ],
)
def test_a_folders_card_names_it(saved, card, expected):
    if card is not None:
        (saved / "README.md").write_text(card)
    assert licence_of(locate(str(saved))) == expected


def test_the_header_of_a_gguf_file_names_it():
    assert licence_of(locate("smollm2")) == {"license": "apache-2.0"}


def test_a_gguf_file_without_a_licence_has_none(saved, tmp_path):
    merging_tokenizer().save_pretrained(saved)
    write_gguf(saved, tmp_path / "tiny.gguf", "f16")
    assert licence_of(locate(str(tmp_path / "tiny.gguf"))) == {}
