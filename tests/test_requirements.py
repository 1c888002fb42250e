"""The lists of packages name all that is imported, at the versions that were tested."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [path for pattern in ("*.py", "olica/**/*.py", "scripts/*.py") for path in ROOT.glob(pattern)]
BENCHMARKS, TESTS = list(ROOT.glob("benchmarks/*.py")), list(ROOT.glob("tests/*.py"))
# Modules within the package have names of packages, but are never imported by them alone.
MODULES = [path for path in [*CODE, *BENCHMARKS, *TESTS] if "olica" not in path.relative_to(ROOT).parts]
OURS = {path.stem for path in MODULES} | {"olica", "benchmarks"}

# What a benchmark asks for in a sentence where it is not installed; docs/after-pruning.md names the version.
UNLISTED = {"bitsandbytes"}


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def versions(file: str, sign: str) -> dict[str, str]:
    """The version behind `sign` that each line of a list gives, by package."""
    lines = (ROOT / file).read_text().splitlines()
    found = [re.match(rf"([\w.-]+){sign}([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    return {normal(match[1]): match[2] for match in found}


def imported(files: Iterable[Path]) -> set[str]:
    """The packages that files import, wherever in them."""
    modules = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.split(".")[0])
    distributions = packages_distributions()
    return {normal(distributions.get(name, [name])[0]) for name in modules - OURS - sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("files", "lists"),
    [(CODE, ["requirements.txt"]), ([*BENCHMARKS, *TESTS], ["requirements.txt", "requirements-dev.txt"])],
)
def test_every_imported_package_is_listed(files, lists):
    found = imported(files)
    assert {"torch", "transformers", "safetensors"} <= found
    assert found - UNLISTED <= {name for file in lists for name in versions(file, ">=")}


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_the_lower_bounds_are_the_tested_versions(file):
    tested = versions("constraints.txt", "==")
    bounds = versions(file, ">=")
    assert bounds and bounds == {name: tested[name] for name in bounds}


def test_the_package_asks_for_what_the_lists_name():
    """`pip install .` with all extras takes the packages of both lists, at the same lower bounds, and no other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == {"eval", "plots", "dev"}
    named = [
        entry.split(">=")
        for entry in [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    ]
    listed = versions("requirements.txt", ">=") | versions("requirements-dev.txt", ">=")
    assert {normal(name): bound for name, bound in named} == listed
