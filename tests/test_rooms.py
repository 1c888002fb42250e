"""Which module may import which: the rooms of the package, held over its syntax trees."""

import ast
import shutil
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "olica"

# What the modules of a room, or a single module, may import beside their own room and the ground. The ground is every
# module of the package itself that is not named here.
MAY_IMPORT = {
    "model": set(),
    "methods": {"model"},
    "sources": {"model"},
    "pruning": {"methods", "sources", "model"},
    "outputs": {"sources", "model", "pruning.progress"},
    "evaluation": {
        "outputs.records",
        "outputs.model_card",
        "outputs.identity",
        "outputs.names",
        "sources",
        "model",
    },
    "report": {"outputs.records", "outputs.model_card", "outputs.names", "sources", "model", "evaluation.paired"},
    "duration": {"methods", "sources"},
    "settings": {"outputs.names", "outputs.weight_shards", "methods", "sources", "model"},
    "described": {"duration", "jobs", "settings", "pruning", "methods"},
    "jobs": {"settings", "pruning", "outputs", "methods", "sources", "model"},
    "run": {"jobs", "settings", "pruning", "outputs", "methods", "sources", "model"},
    "sweeping": {
        "run",
        "jobs",
        "settings",
        "pruning",
        "evaluation",
        "report",
        "outputs",
        "methods",
        "sources",
        "model",
    },
    "__init__": {"run", "sweeping", "evaluation", "methods", "model"},
}
# All that `evaluation` and `report` may have of `outputs`, at any remove.
READ_OF_OUTPUTS = {"outputs.records", "outputs.model_card", "outputs.identity", "outputs.names"}
# Copied into checkpoints, where there is nothing else of this program.
COPIED = {"model.configuration_olica", "model.modeling_olica", "model.modeling_deci"}


@cache
def names_in(text: str, within: tuple[str, ...]) -> set[str]:
    """The full names that a module imports whose text this is, and which lies in the package `within`."""
    named = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = within[: len(within) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            named |= {f"{base}.{alias.name}" for alias in node.names}
    return named


def imports_of(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each of them imports, wherever in it, by names within the package."""
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    found = {}
    for name, path in paths.items():
        named = names_in(path.read_text(encoding="utf-8"), ("olica", *name.split(".")[:-1]))
        found[name] = {module for full in named if (module := module_of(full, paths)) is not None} - {name}
    return found


def module_of(full: str, paths: dict[str, Path]) -> str | None:
    """The module of the package that a dotted name names, or is in; None for a name of another package."""
    first, *parts = full.split(".")
    if first != "olica":
        return None
    for end in range(len(parts), 0, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in paths:
                return module
    return "__init__"


def room_of(module: str) -> str:
    room = module.split(".")[0]
    return room if "." in module or room in MAY_IMPORT else "ground"


def is_allowed(importer: str, imported: str) -> bool:
    if importer in COPIED:
        return imported in COPIED
    room, other = room_of(importer), room_of(imported)
    return other in (room, "ground") or bool({other, imported} & MAY_IMPORT.get(room, set()))


def broken(package: Path) -> list[str]:
    """The imports that no rule allows, and the modules that import each other in a circle."""
    imports = imports_of(package)
    wrong = [f"{name} imports {other}" for name in imports for other in imports[name] if not is_allowed(name, other)]
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        wrong.append(f"circle: {' imports '.join(reversed(error.args[1]))}")
    return sorted(wrong)


def test_every_import_is_one_that_its_room_may_make():
    assert broken(PACKAGE) == []


def reached_from(room: str, package: Path) -> set[str]:
    """The modules of other rooms that the modules of a room import, themselves or through what they import."""
    imports = imports_of(package)
    reached, new = set(), {name for name in imports if room_of(name) == room}
    while new:
        reached |= new
        new = set().union(*(imports[name] for name in new)) - reached
    return {name for name in reached if room_of(name) != room}


def wrongly_reached(room: str, package: Path) -> list[str]:
    """What a room that only reads checkpoints and records imports, at any remove, of what prunes and writes them."""
    reached = reached_from(room, package)
    return sorted(
        name
        for name in reached
        if room_of(name) in ("pruning", "methods", "duration", "jobs", "described", "run", "sweeping")
        or (room_of(name) == "outputs" and name not in READ_OF_OUTPUTS)
    )


@pytest.mark.parametrize("room", ["evaluation", "report"])
def test_what_measures_and_shows_never_reaches_what_prunes(room):
    assert "outputs.records" in reached_from(room, PACKAGE)
    assert wrongly_reached(room, PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("outputs/names.py", "from .run_folder import RunFolder", "pruning.progress"),
        ("outputs/records.py", "from .journal import Journal", "outputs.journal"),
        ("sources/locate.py", "def late():\n    from ..methods.linalg import by_rows", "methods.linalg"),
    ],
)
def test_an_import_at_a_remove_is_found(tmp_path, file, line, fault):
    copy = shutil.copytree(PACKAGE, tmp_path / "olica", ignore=shutil.ignore_patterns("*.pyc"))
    with (copy / file).open("a") as edited:
        edited.write(f"\n{line}\n")
    assert fault in wrongly_reached("evaluation", copy)


def test_every_room_has_rules_and_every_rule_a_room():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == {room for room in MAY_IMPORT if (PACKAGE / room).is_dir()}
    modules = imports_of(PACKAGE).keys()
    named = {part for parts in MAY_IMPORT.values() for part in parts if "." in part} | COPIED
    assert named <= modules
    assert {"errors", "checks", "machine", "terminal", "processes", "command_line"} <= {
        module for module in modules if room_of(module) == "ground"
    }


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("methods/linalg.py", "from ..sources import locate", "methods.linalg imports sources.locate"),
        ("methods/linalg.py", "from ..sources.locate import Location", "methods.linalg imports sources.locate"),
        ("methods/linalg.py", "from olica.sources.locate import Location", "methods.linalg imports sources.locate"),
        ("methods/linalg.py", "import olica.sources.locate as here", "methods.linalg imports sources.locate"),
        ("methods/linalg.py", "from olica import sources", "methods.linalg imports sources.__init__"),
        ("methods/linalg.py", "from .. import LayerShape", "methods.linalg imports __init__"),
        ("report/runs.py", "def late():\n    from ..pruning import survey", "report.runs imports pruning.survey"),
        ("report/runs.py", "def late():\n    import olica.methods.refit", "report.runs imports methods.refit"),
        ("evaluation/cost.py", "from ..outputs.journal import Journal", "evaluation.cost imports outputs.journal"),
        ("outputs/records.py", "from ..evaluation.paired import compare", "outputs.records imports evaluation.paired"),
        ("outputs/records.py", "from ..pruning.survey import survey", "outputs.records imports pruning.survey"),
        ("errors.py", "from .sources.locate import Location", "errors imports sources.locate"),
        ("errors.py", "from . import LayerShape", "errors imports __init__"),
        ("model/modeling_olica.py", "from ..errors import UsageError", "model.modeling_olica imports errors"),
        (
            "methods/deeper/new.py",
            "from ...sources.locate import Location",
            "methods.deeper.new imports sources.locate",
        ),
        ("errors.py", "from .checks import all_finite", "circle: "),
        ("sources/locate.py", "def late():\n    from .weights import read_model", "circle: "),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(tmp_path, file, line, fault):
    copy = shutil.copytree(PACKAGE, tmp_path / "olica", ignore=shutil.ignore_patterns("*.pyc"))
    before = broken(copy)
    (copy / file).parent.mkdir(exist_ok=True)
    with (copy / file).open("a") as edited:
        edited.write(f"\n{line}\n")
    planted = [wrong for wrong in broken(copy) if wrong not in before]
    assert any(wrong.startswith(fault) for wrong in planted), planted


def test_an_import_that_the_rules_allow_is_none(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "olica", ignore=shutil.ignore_patterns("*.pyc"))
    before = broken(copy)
    (copy / "pruning" / "new.py").write_text("from ..methods.linalg import by_rows\nfrom ..errors import UsageError\n")
    (copy / "jobs.py").write_text("from .outputs.records import environment\nimport torch\n")
    assert broken(copy) == before
