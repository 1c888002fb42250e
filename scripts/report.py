"""Make tables and figures of the recorded runs: one of them, or RESULTS.md with all.

python scripts/report.py                            all models, all tables and figures, written to RESULTS.md
python scripts/report.py table2 --only smollm2      one table, printed; a figure is drawn and its file named
"""

import argparse
import re
from collections import Counter
from os.path import relpath
from pathlib import Path

import olica_stopping
from olica.command_line import run_command
from olica.errors import UsageError
from olica.report import choices, compared, layouts, methods, peers, releases, texts, vocabulary
from olica.report.plots import FIGURES, draw, quality_over_size
from olica.report.runs import MODELS, Results
from olica.report.tables import TABLES, bullets

BESIDE_THE_PAPER = {
    "methods": methods.tables,
    "layouts": layouts.table,
    "compare": compared.table,
    "peers": peers.table,
    "texts": texts.table,
    "vocabulary": vocabulary.table,
}
ALL_TABLES = TABLES | BESIDE_THE_PAPER
TITLES = {
    "figure2": "Figure 2: singular values of the attention projections",
    "figure3": "Figure 3: corrected MLPs, and how well each is explained",
    "figure4": "Figure 4: number of corrected MLPs and rank of the corrections",
    "figure5": "Figure 5: size of the calibration set",
    "figure6": "Figure 6: calibration texts",
}
HEAD = """# Results

`python scripts/report.py` makes this page from the records in `results/`; nothing here is written by hand. Tables 1 to
7 and Figures 2 to 6 have scripts of their names in `scripts/`, methods are made by `scripts/methods.sh`, layouts by
`scripts/layouts.sh`, and `scripts/everything.sh` has the variables of each.

± is one standard error. That of a perplexity allows for neighbouring windows' being alike (Newey and West), that of a
mean accuracy takes the tasks as independent. "To dense" is the difference on the same windows or rows, with its paired
error. The paper's own figures, and what does not fit together in them, are in `results/paper/`.
"""
OVER_SIZE = "Quality over size"
CHECKS = "Choices and checks"


def section(results: Results, folder: Path) -> str:
    """Tables and figures of one model."""
    ours = {name: make for name, make in TABLES.items() if not results.belongs_elsewhere(int(name[len("table") :]))}
    parts = [table for make in (BESIDE_THE_PAPER | ours).values() if (table := make(results))]
    for name, title in TITLES.items():
        if drawing := draw(name, results):
            path, notes = drawing
            parts.append("\n".join([f"### {title}", "", f"![{title}]({relpath(path, folder)})", *bullets(notes)]))
    return "\n\n".join([f"## {results.title}", *parts])


def page(folder: Path, results: list[Results], path: Path) -> str:
    """All tables and figures of all models, the first ones those that say which recipe to take."""
    parts = []
    if figure := quality_over_size(results):
        figure.savefig(picture := folder / "methods.png")
        parts.append(f"## {OVER_SIZE}\n\n![{OVER_SIZE}]({relpath(picture, path.parent)})")
    parts += [section(of_model, path.parent) for of_model in results]
    if checks := [*choices.tables(folder), *filter(None, [releases.table(folder)])]:
        parts.append("\n\n".join([f"## {CHECKS}", *checks]))
    return "\n\n".join([HEAD.rstrip(), contents(parts), *parts]) + "\n"


def contents(parts: list[str]) -> str:
    """Links to the headings of a page, as GitHub names their places."""
    lines, seen = [], Counter()
    for mark, title in re.findall(r"^(###?) (.+)$", "\n".join(parts), flags=re.MULTILINE):
        place = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        lines.append(f"{'  ' * (len(mark) - 2)}- [{title}](#{place}{f'-{seen[place]}' if seen[place] else ''})")
        seen[place] += 1
    return "\n".join(lines)


def drawn(name: str, results: Results) -> str | None:
    """Draw a figure; the name of its file and its notes."""
    if not (drawing := draw(name, results)):
        return None
    path, notes = drawing
    return "\n".join([str(path), *notes])


def in_order(labels: list[str]) -> list[str]:
    """Models of the paper first, then the others that are known."""
    known = list(MODELS)
    return sorted(labels, key=lambda label: (known.index(label) if label in known else len(known), label))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*ALL_TABLES, *FIGURES], help="one table or figure (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (results)")
    parser.add_argument("--only", help="name of the model's folder there (default: every one)")
    parser.add_argument("--output_path", type=Path, default=Path("RESULTS.md"), help="where all goes (RESULTS.md)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Print one table, draw one figure, or write all."""
    recorded = sorted({path.relative_to(args.results).parts[0] for path in args.results.rglob("flags")})
    if not recorded:
        raise UsageError(f"--results {args.results}: nothing is recorded there; run a script of a table or figure")
    if args.only and args.only not in recorded:
        raise UsageError(f"--only {args.only}: recorded in {args.results} are {', '.join(recorded)}")
    if args.only and args.name is None:
        raise UsageError("--only goes with one table or figure; RESULTS.md has all models")
    models = [Results(args.results, label) for label in ([args.only] if args.only else in_order(recorded))]
    if args.name is None:
        args.output_path.write_text(page(args.results, models, args.output_path), encoding="utf-8")
        print(f"wrote {args.output_path}")
        return
    made = [
        ALL_TABLES[args.name](results) if args.name in ALL_TABLES else drawn(args.name, results) for results in models
    ]
    if not any(made):
        raise UsageError(f"{args.name}: the runs that it shows are not recorded in {args.results / (args.only or '')}")
    print(*filter(None, made), sep="\n\n")


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
