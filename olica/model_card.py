"""The card of a pruned checkpoint: what it was made of and how, what was measured of it, and how to load it."""

import os
from pathlib import Path

from huggingface_hub import ModelCardData

CARD = "README.md"
METRICS, NONE_YET = "## Metrics\n\n", "None measured yet.\n"
CARD_TEXT = """---
{metadata}
---

# {name} without {sparsity:.1%} of its parameters

{name}, pruned by Olica (He and Lin, ICML 2025) without retraining: low-rank query and key projections, narrower value
heads and MLPs, and low-rank linear corrections beside some MLPs.

| | dense | pruned |
|---|---|---|
| parameters | {parameters[before]:,} | {parameters[after]:,} |
| of the decoder layers | {parameters[decoder_layers_before]:,} | {parameters[decoder_layers_after]:,} |

Recipe `{settings[recipe]}` with `--sparsity {settings[sparsity]:g} --k {settings[k]:g} --mlp_num {settings[mlp_num]}
--ratio {settings[ratio]:g} --percdamp {settings[percdamp]:g}`; corrections beside the MLPs of the layers {layers};
calibrated on {samples} samples of {tokens} tokens from {texts}, seed {settings[seed]}. `olica_run.json` has the rest.

## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

Where the package is installed, `import olica` takes the place of `trust_remote_code=True`.

{metrics}"""


def write_card(folder: Path, record: dict) -> None:
    """Write the card of a checkpoint from the record of its pruning."""
    model, calibration = record["model"], record["calibration"]
    samples, tokens = calibration["ids"]
    # The hub wants an id of its own there, which a model without a revision has not.
    base = model["source"] if model["revision"] else None
    metadata = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation", tags=["olica", "pruned"]
    )
    text = CARD_TEXT.format(
        metadata=metadata.to_yaml(),
        name=base or Path(model["name"]).name,
        sparsity=record["measured_sparsity"],
        samples=samples,
        tokens=tokens,
        texts=" + ".join(source["name"] for source in calibration["sources"]),
        layers=", ".join(map(str, record["calibrated_layers"])) or "(none)",
        metrics=METRICS + NONE_YET,
        parameters=record["parameters"],
        settings=record["settings"],
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def add_metrics(folder: Path, result: dict) -> None:
    """Write what was measured of a checkpoint into its card, in place of what the same protocol gave before.

    A card that cannot be written to, or has no list of metrics any more, is left alone.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() and os.access(path, os.W_OK) else ""
    head, mark, listed = text.partition(METRICS)
    if not mark:
        return
    lines = dict(line.rsplit(": ", 1) for line in listed.splitlines() if line.startswith("- "))
    lines |= {f"- {name}": figure for name, figure in metrics(result).items()}
    body = "".join(f"{name}: {figure}\n" for name, figure in lines.items()) or NONE_YET
    path.write_text(head + mark + body, encoding="utf-8")


def metrics(result: dict) -> dict[str, str]:
    """Figures by their name and protocol."""
    found = {}
    for text, measured in result.get("perplexity", {}).items():
        protocol = f"{measured['windows']} windows of {measured['seqlen']} tokens, start token: {measured['bos']}"
        name = f"perplexity on {Path(text).name}, {protocol}, {result['dtype']}"
        found[name] = _with_error(measured["value"], measured["standard_error"])
    zero_shot = result.get("zero_shot", {"tasks": {}})
    for task, scores in zero_shot["tasks"].items():
        protocol = f"{scores['samples']} of {scores['split_size']} rows, {scores['num_fewshot']} examples"
        for metric in scores["hits"]:
            error = scores.get(f"{metric}_stderr")
            name = f"{task} {metric} in percent, {protocol}, {zero_shot['harness']}, {result['dtype']}"
            found[name] = _with_error(100 * scores[metric], None if error is None else 100 * error)
    return found


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"
