"""The card of a pruned checkpoint: what it was made of and how, what was measured of it, and how to load it."""

import os
from pathlib import Path

from huggingface_hub import ModelCardData

from ..model.layouts import EXPORTS, LAYOUTS, OWN_LAYOUT, Layout
from ..sources.calibration_set import is_token_file
from ..terminal import with_error
from .names import DIALS, turned
from .records import alone_in, read_vocabulary_record, write_text

CARD = "README.md"
# Parameters of the recipes that correct MLPs; where no MLP got a correction they had no part in the result.
OF_CORRECTIONS = ("mlp_num", "ratio", "percdamp")
METRICS, NONE_YET = "## Metrics\n\n", "None measured yet.\n"
CARD_TEXT = """---
{metadata}
---

# {name} without {sparsity:.1%} of its parameters

{model}, pruned without retraining ({method}): {changes}.

| | dense | pruned |
|---|---|---|
| parameters | {parameters[before]:,} | {parameters[after]:,} |
| of the decoder layers | {parameters[decoder_layers_before]:,} | {parameters[decoder_layers_after]:,} |

Recipe `{settings[recipe]}` with `{flags}`;
{corrections}calibrated on {samples} samples of {tokens} tokens from {texts}. `olica_run.json` has the rest.{exported}

{licence}

## Loading

`FOLDER` is this folder, or the id of the repository that holds its files.

```python
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
{tokenizer}```

{code}

{metrics}"""

EXPORTED = "\n\nWritten in the layout `{name}` afterwards: {about}."
FEWER_TOKENS = (
    "\n\nOf the {before:,} tokens of its vocabulary {after:,} are left; "
    "`olica_vocabulary.json` says by which texts they were chosen."
)
VOCABULARY_CARD_TEXT = """---
{metadata}
---

# {name} with {tokens[after]:,} of its {tokens[before]:,} tokens

{model}, from {parameters[before]:,} to {parameters[after]:,} parameters.
The tokens that {texts} had least are gone from its tokenizer, its embedding and its head; everything else is as it
was. Every text can still be written, in the tokens that are left. Text of another kind, or in another language, may
need many more of them than before. `olica_vocabulary.json` has the rest.

{licence}
"""
LICENCE = "These weights are made of the dense model's{revision}, whose licence holds for them too: {licence}."
TOKENIZER_LINE = "tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})\n"
# The tokenizer is none of ours, but AutoTokenizer looks into the configuration first, which is, but for `stock`.
TRUST = ", trust_remote_code=True"
OURS = "Where the package is installed, `import olica` takes the place of `trust_remote_code=True`."
STOCK = "The architecture is the dense model's own: any engine that runs that one runs this one."


def write_card(folder: Path, record: dict) -> None:
    """Write the card of a checkpoint, whose other files lie in `folder`, from the record of its pruning."""
    model, calibration = record["model"], record["calibration"]
    samples, tokens = calibration["ids"]
    base = base_of(model)
    name = base or Path(model["name"]).name
    layout = EXPORTS[record["exported"]] if "exported" in record else layout_of(record["settings"])
    trust = TRUST if layout.has_code else ""
    exported = EXPORTED.format(name=layout.name, about=layout.about) if "exported" in record else ""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    text = CARD_TEXT.format(
        metadata=metadata_of(model, "pruned"),
        name=name,
        model=model.get("description", name),
        sparsity=record["measured_sparsity"],
        samples=samples,
        tokens=tokens,
        texts=" + ".join(Path(source["name"]).name for source in calibration["sources"]),
        method=record["recipe"]["about"],
        changes=changes(record["plan"], record["dense_layer"]),
        flags=flags(record),
        corrections=corrections(record),
        exported=exported + tokens_left(folder),
        licence=licence_in_words(model),
        classes="AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM",
        tokenizer=TOKENIZER_LINE.format(trust=trust) if has_tokenizer else "",
        trust=trust,
        code=OURS if trust else STOCK,
        metrics=METRICS + NONE_YET,
        parameters=record["parameters"],
        settings=record["settings"],
    )
    write_text(folder / CARD, text)


def write_vocabulary_card(folder: Path, record: dict) -> None:
    """Write the card of a dense model with fewer tokens, from the record of that."""
    model = record["model"]
    text = VOCABULARY_CARD_TEXT.format(
        metadata=metadata_of(model, "vocabulary"),
        name=base_of(model) or Path(model["name"]).name,
        model=model["description"],
        texts=" + ".join(Path(source["name"]).name for source in record["texts"]),
        licence=licence_in_words(model),
        tokens=record["tokens"],
        parameters=record["parameters"],
    )
    write_text(folder / CARD, text)


def base_of(model: dict) -> str | None:
    """The hub's id of a dense model, as a record describes it; None where it was read from elsewhere."""
    return model["source"] if model["revision"] else None


def licence_of_record(model: dict) -> dict[str, str]:
    """The fields of a dense model's licence, for whoever does not have its folder."""
    licence, base = dict(model.get("licence", {})), base_of(model)  # old records have none
    link = licence.get("license_link", "")
    if link and "://" not in link:  # a file beside the dense model
        del licence["license_link"]
        if base:
            licence["license_link"] = f"https://huggingface.co/{base}/blob/{model['revision']}/{link}"
    return licence


def metadata_of(model: dict, made: str) -> str:
    """What the hub reads of a card of weights that were `made` of a dense model."""
    metadata = ModelCardData(
        base_model=base_of(model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["olica", made],
        **licence_of_record(model),
    )
    return metadata.to_yaml()


def licence_in_words(model: dict) -> str:
    """Whose licence holds for weights that were made of a dense model."""
    return LICENCE.format(
        revision=f" at revision `{model['revision']}`" if base_of(model) else "",
        licence=", ".join(licence_of_record(model).values()) or "its files here do not name it",
    )


def tokens_left(folder: Path) -> str:
    """How many tokens a checkpoint, or the model that it was made of, has lost, in words; empty where none are gone."""
    record = read_vocabulary_record(folder)
    if record is None:
        return ""
    first = record
    while "earlier" in first:
        first = first["earlier"]
    return FEWER_TOKENS.format(before=first["tokens"]["before"], after=record["tokens"]["after"])


def add_metrics(folder: Path, result: dict) -> None:
    """Write what was measured of a checkpoint into its card, in place of what the same protocol gave before.

    A card that cannot be written to, or has no list of metrics any more, is left alone. Evaluations that end at the
    same time write one after the other.
    """
    path = folder / CARD
    if not path.is_file() or not all(os.access(place, os.W_OK) for place in (folder, path)):
        return
    with alone_in(folder):
        head, mark, listed = path.read_text(encoding="utf-8").partition(METRICS)
        if mark:
            write_text(path, head + mark + _with_metrics(listed, result))


def _with_metrics(text: str, result: dict) -> str:
    """The part of a card that begins with its list of metrics, with those of a result."""
    listed, rest = (text_after := text.partition("\n#"))[0], "".join(text_after[1:])
    lines = dict(line.rsplit(": ", 1) for line in listed.splitlines() if line.startswith("- ") and ": " in line)
    lines |= {f"- {name}": figure for name, figure in metrics(result).items()}
    body = "".join(f"{name}: {figure}\n" for name, figure in lines.items()) or NONE_YET
    return body + rest


def changes(plan: list[dict[str, int]], dense: dict[str, int]) -> str:
    """What became of the layers, in words: of their sizes `plan`, those that are not the `dense` ones."""
    factors = {"q_rank": "query", "k_rank": "key", "v_rank": "value", "o_rank": "output"}
    found = [name for size, name in factors.items() if any(shape.get(size) for shape in plan)]
    parts = [f"low-rank {' and '.join(found)} projections"] if found else []
    narrower = {"v_head_dim": "narrower value heads", "intermediate_size": "narrower MLPs"}
    parts += [words for size, words in narrower.items() if any(shape[size] < dense[size] for shape in plan)]
    if any(shape["kv_heads"] for shape in plan):
        parts.append("fewer attention heads")
    if any(shape["o_bias"] or shape["down_bias"] for shape in plan):
        parts.append("output biases for what is gone")
    if any(shape["correction_rank"] for shape in plan):
        parts.append("low-rank linear corrections beside some MLPs")
    return ", ".join(parts) or "no size changed"


def layout_of(settings: dict) -> Layout:
    """The layout that a record's settings name; old records have none but ours."""
    return LAYOUTS[settings.get("layout", OWN_LAYOUT)]


def flags(record: dict) -> str:
    """The flags, beside the recipe, that had a part in the result."""
    settings, parameters = record["settings"], record["parameters"]
    own, of_corrections = record["recipe"]["parameters"], OF_CORRECTIONS if can_correct(record) else ()
    if layout_of(settings).is_alike:  # and decides what --sizes_of asks
        own = [name for name in own if name != "sizes_of"]
    names = ["sparsity", "sparsity_of"]
    if parameters["after"] < parameters["before"]:
        names += [name for name in own if name not in of_corrections]
        names += ["round_to"] if settings["round_to"] > 1 else []
        names += turned(settings, DIALS)
    if record["corrected_layers"]:
        names += [name for name in own if name in of_corrections]
    if not is_token_file(settings["datasets"]):
        names += ["seed", *(["candidates"] if settings.get("candidates", 1) > 1 else [])]
    values = {name: settings[name] for name in names}
    given = [f"--{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in values.items()]
    return " ".join([*given, *(["--add_bos_token"] if settings.get("add_bos_token") else [])])


def can_correct(record: dict) -> bool:
    """Whether the recipe has the parameters of corrections."""
    return set(OF_CORRECTIONS) <= set(record["recipe"]["parameters"])


def corrections(record: dict) -> str:
    """A line that says beside which MLPs there are corrections; or that there are none, and why if some were wanted.

    Empty where the recipe has no corrections.
    """
    if record["corrected_layers"]:
        return f"corrections beside the MLPs of the layers {', '.join(map(str, record['corrected_layers']))};\n"
    if not can_correct(record):
        return ""
    number = record["settings"]["mlp_num"]
    why = f" (no MLP lost a channel, so `--mlp_num {number}` had no effect)" if number else ""
    return f"no corrections{why};\n"


def metrics(result: dict) -> dict[str, str]:
    """Figures by their name and protocol."""
    found = {}
    for text, measured in result.get("perplexity", {}).items():
        protocol = f"{measured['windows']} windows of {measured['seqlen']} tokens, start token: {measured['bos']}"
        name = f"perplexity on {Path(text).name}, {protocol}, {result['dtype']}"
        found[name] = with_error(measured["value"], measured["standard_error"], 2)
        if measured.get("bits_per_byte"):  # records of before have none
            found[name.replace("perplexity", "bits per byte", 1)] = f"{measured['bits_per_byte']:.4f}"
    zero_shot = result.get("zero_shot", {"tasks": {}})
    for task, scores in zero_shot["tasks"].items():
        start = "with" if zero_shot["add_bos_token"] else "without"
        protocol = (
            f"{scores['samples']} of {scores['split_size']} rows, {scores['num_fewshot']} examples, {start} start token"
        )
        if zero_shot.get("apply_chat_template"):
            protocol += ", by the chat template"
        for metric in scores["metrics"]:
            name = f"{task} {metric}, {protocol}, {zero_shot['harness']}, {result['dtype']}"
            found[name] = with_error(scores[metric], scores.get(f"{metric}_stderr"), 4)
    return found
