"""Write docs/flags.md from the parsers of the commands.

python scripts/write_flags.py
"""

import argparse
from pathlib import Path
from runpy import run_path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("model_pruning.py", "model_sweep.py", "model_evaluate.py", "model_export.py")
# Commands that take all flags of another: only what differs is listed again.
EXTENDS = {"model_sweep.py": "model_pruning.py"}
PAGE = ROOT / "docs" / "flags.md"
HEAD = """# Flags

Written by `python scripts/write_flags.py` from what `--help` prints; nothing here is written by hand. Names of models
and texts are explained in [models and texts](models-and-texts.md), what the figures mean in [protocol](protocol.md),
memory and stopped runs in [robustness](robustness.md), the methods in [recipes](recipes.md).
"""


def default_of(action: argparse.Action) -> str:
    """What a flag is without being given, as a table shows it."""
    if action.required:
        return "required"
    if action.default == argparse.SUPPRESS:
        return "off" if action.nargs == 0 else "the recipe's"  # what only acts, or what goes by --recipe
    return shown(action.default)


def shown(value: object) -> str:
    """A default or a choice as a table shows it: switches are off, what is not given is none."""
    if value is None or value == "":
        return "none"
    return "off" if value is False else f"`{value}`"


def row(action: argparse.Action) -> str:
    """The line of one flag in its table."""
    meaning = (action.help or "") % vars(action)
    if action.choices:
        meaning += f"; one of {', '.join(map(shown, action.choices))}"
    cells = f"`{(action.option_strings or [action.metavar])[-1]}`", default_of(action), meaning.removeprefix("; ")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rows_of(group: argparse._ArgumentGroup) -> list[str]:
    """The lines of a group's flags, but for hidden ones."""
    hidden = (action.help == argparse.SUPPRESS or action.dest == "help" for action in group._group_actions)
    return [row(action) for action, hide in zip(group._group_actions, hidden, strict=True) if not hide]


def section(name: str, parser: argparse.ArgumentParser, extended: argparse.ArgumentParser | None = None) -> str:
    """The flags of one command, a table for each group that `--help` prints.

    Of a command that extends another, whose parser is `extended`, those that are not the same there.
    """
    parts = [f"## {name}", parser.description]
    known = [line for group in extended._action_groups for line in rows_of(group)] if extended else []
    if extended:
        parts.append(f"All flags of {EXTENDS[name]}, and in their place or beside them:")
    for group in parser._action_groups:
        if rows := [line for line in rows_of(group) if line not in known]:
            table = "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])
            parts += [f"### {group.title}", *filter(None, [group.description]), table]
    return "\n\n".join(parts)


def flags_page() -> str:
    """The text of docs/flags.md."""
    parsers = {name: run_path(str(ROOT / name))["build_parser"]() for name in COMMANDS}
    sections = (section(name, parser, parsers.get(EXTENDS.get(name))) for name, parser in parsers.items())
    return "\n".join([HEAD, "\n\n".join(sections), ""])


if __name__ == "__main__":
    PAGE.write_text(flags_page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
