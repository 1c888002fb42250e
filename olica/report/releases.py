"""What became of pruned checkpoints on several releases of transformers: the record of scripts/compatibility.sh."""

import json
from pathlib import Path

from .tables import markdown

RECORD = Path("compatibility") / "releases.json"
# Logits of two releases may differ by the order of their sums.
ALIKE = 1e-4
ABOUT = (
    "Tiny models of every family that a release has, pruned to the layouts `olica` (recipes `olica`, `olica-plus`), "
    "`stock` and `deci`: of how many each check holds."
)
CHECKED = [
    f"Logits: within {ALIKE:g} of this package's in float32. Tokens: the same of texts. Generated: the same greedy "
    "continuation with a cache, without one and by this package. Saved: the same logits after saving and loading "
    "again, and what the release saved is read by this package.",
    'Gemma 2 ran with `attn_implementation="eager"`: the fused attention of some releases leaves its cap out, of the '
    "dense model too.",
    "What fails of `stock`, which has no code of ours, is the release's own.",
]
CHECKS = ("tokens", "generated", "saved")
HEADER = ["transformers", "code", "checkpoints", "logits alike", "largest difference", "tokens"]
HEADER += ["generated with a cache", "saved and read again", "read by this package"]


def table(results: Path) -> str | None:
    """A row for each release that was tried; None where there is no record."""
    path = results / RECORD
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    rows, notes = [], [*CHECKED]
    for found in record["releases"]:
        checkpoints, code = found["checkpoints"], "olica" if found["with_olica"] else "the checkpoint's"
        tried = {name: row for name, row in checkpoints.items() if row}
        rows.append([found["transformers"], code, str(len(tried)), *_counts(list(tried.values()))])
        named = f"{found['transformers']} ({code})"
        notes += [f"{named}, {name}: {row['error']}." for name, row in tried.items() if "error" in row]
        for check in CHECKS:
            if failed := [name for name, row in tried.items() if row.get(check) is False]:
                notes.append(f"{named}, {check} otherwise: {', '.join(failed)}.")
        if lacking := sorted({name.partition("_sparsity")[0] for name in checkpoints.keys() - tried.keys()}):
            notes.append(f"{named} has no family of these: {', '.join(lacking)}.")
    made = record["environment"]
    notes.append(f"Record: `{path.as_posix()}`, made by `scripts/compatibility.sh` at commit {made['git_commit']}.")
    return markdown("Releases of transformers", HEADER, rows, notes, ABOUT)


def _counts(tried: list[dict]) -> list[str]:
    """Of how many each check holds, and the largest difference of logits."""
    differences = [row["logits"] for row in tried if "logits" in row]
    alike = sum(difference <= ALIKE for difference in differences)
    again = [row.get("read_again") for row in tried]
    read = sum(isinstance(difference, float) and difference <= ALIKE for difference in again)
    kept = [sum(row.get(check) is True for row in tried) for check in CHECKS]
    largest = max(differences, default=float("nan"))
    return [str(alike), f"{largest:.0e}" if largest else "0", *map(str, kept), str(read)]
