"""What the README promises and the code can be held to."""

import re
from pathlib import Path

import pytest

import model_evaluate
import model_pruning
from olica.model_source import MODEL_NAMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", [model_pruning, model_evaluate])
def test_every_flag_is_explained_with_its_default(script):
    section = README.split(f"`{script.__name__}.py`\n\n| flag")[1].split("\n\n")[0]
    listed = dict(re.findall(r"^\| `(--\w+)` \| ([^|]*) \|", section, flags=re.MULTILINE))
    for action in script.build_parser()._actions:
        if action.dest == "help":
            continue
        assert f"--{action.dest}" in listed, action.dest
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            assert float(listed[f"--{action.dest}"]) == action.default, action.dest
    assert len(listed) == len(script.build_parser()._actions) - 1, "a flag is listed that does not exist"


def test_every_model_name_is_listed():
    for name in MODEL_NAMES:
        assert f"`{name}`" in README


def test_every_script_that_is_named_exists():
    for path in re.findall(r"(?:bash|python) ((?:scripts|benchmarks)/[\w.]+|\w+\.py)", README):
        assert (ROOT / path).is_file(), path


def test_the_papers_commands_are_those_of_the_tests():
    from test_cli import PAPERS_EVALUATION, PAPERS_PRUNING

    flat = re.sub(r"\\\n", "", README)
    assert PAPERS_PRUNING in flat and PAPERS_EVALUATION in flat
