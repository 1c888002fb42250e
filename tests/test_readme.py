"""What README, docs/, CONTRIBUTING and CHANGELOG promise, and the code and the records can be held to."""

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from called import PAPERS_EVALUATION, PAPERS_PRUNING, call, load
from conftest import make_llama, make_tokenizer, prune, save_tiny, write_pruned
from safetensors.torch import save_file
from tiny_families import SIZES
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig

import model_pruning
import model_sweep
import olica
from olica.errors import UsageError
from olica.evaluation.paired import compare, perplexity_error
from olica.methods.recipes import RECIPES
from olica.model.families import FAMILIES
from olica.outputs.records import has_former_shares
from olica.sources.locate import MODEL_NAMES, locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model
from olica.terminal import with_error

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
RECORDS = ROOT / "results" / "smollm2"
# Programs that a command block may call beside our own scripts.
OTHER_PROGRAMS = {".", "cd", "curl", "hf", "lm_eval", "optimum-cli", "pip", "ruff", "transformers"}

every_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


class Block(NamedTuple):
    """A fenced block; `marker` is what a comment in the line before it says that it needs to be run."""

    marker: str | None
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:^<!-- runnable: (\w+) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(marker or None, language, text) for marker, language, text in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link's #part may name: the page's headings, lower case, spaces as hyphens, without punctuation.

    A heading that stands again has the number of times that it stood before.
    """
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    places = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {
        f"{place}-{before}" if (before := places[:index].count(place)) else place for index, place in enumerate(places)
    }


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of the shell blocks as words, without variables set before them."""
    for block in blocks(page):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                for command in re.split(r" && ", line):
                    words = shlex.split(command, comments=True)
                    while words and re.match(r"\w+=", words[0]):
                        words.pop(0)
                    if words:
                        yield words


def table(text: str, first_cell: str) -> dict[str, list[str]]:
    """The rows of the table whose header begins with `first_cell`: first cell -> the others."""
    (body,) = re.findall(rf"^\| ?{re.escape(first_cell)} ?\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {name: cells for name, *cells in rows}


def test_the_readme_is_read_in_minutes():
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "RESULTS.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists() and linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_of_the_docs_is_linked_in_the_readme():
    linked = set(re.findall(r"\]\(docs/([\w.-]+\.md)", README.read_text()))
    assert linked == {page.name for page in DOCS.iterdir()}


@every_page
def test_commands_are_those_of_the_parsers(page):
    for words in commands(page):
        if words[:2] == ["python", "-m"]:
            continue
        script = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.(py|sh)", word)), None)
        if script is None:
            assert words[0] in OTHER_PROGRAMS, words
            continue
        assert (ROOT / words[script]).is_file(), words
        if words[script].endswith(".py") and hasattr(module := load(words[script]), "build_parser"):
            module.build_parser().parse_args(words[script + 1 :])


@every_page
def test_scripts_that_are_named_exist(page):
    for path in re.findall(r"(?:bash|python)\s+((?:scripts|benchmarks)/[\w.]+|\w+\.py)", page.read_text()):
        assert (ROOT / path).is_file(), path


@every_page
def test_paths_that_are_named_exist(page):
    for path in re.findall(r"`((?:olica|scripts|benchmarks|results|tests|docs)/[\w./*-]*)`", prose(page)):
        assert re.search(r"[A-Z]", path) or list(ROOT.glob(path.rstrip("/"))), path


@every_page
def test_python_blocks_compile(page):
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, page.name, "exec")


@every_page
def test_a_model_is_saved_with_its_tokenizer(page):
    text = "\n".join(block.text for block in blocks(page) if block.language == "python")
    folders = re.findall(r'\.save_pretrained\("(.+?)"', text)
    assert set(folders) == set(re.findall(r'okenizer\b.*\.save_pretrained\("(.+?)"', text))
    assert all(folders.count(folder) == 2 for folder in folders)


def test_the_script_of_after_pruning_runs_all_python_of_its_page():
    page, script = (ROOT / path for path in ("docs/after-pruning.md", "scripts/after_pruning.sh"))
    sections = re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]
    named = {section.splitlines()[0] for section in sections if "\n```python\n" in section}
    assert len(named) == 5 and all(f'"{name}"' in script.read_text() for name in named)
    pinned = re.findall(r"([\w-]+)(?:\[\w+\])?==([\d.]+)", script.read_text())
    assert len(pinned) == 9 and all(f"{name} {version}" in page.read_text() for name, version in pinned)


@every_page
def test_lines_fit_a_screen_but_for_tables(page):
    for line in prose(page).splitlines():
        assert len(line) <= 120 or line.startswith("| "), line


def test_the_page_of_flags_is_what_the_script_writes():
    assert (DOCS / "flags.md").read_text() == load("scripts/write_flags.py").flags_page()


def test_the_page_of_sizes_is_what_the_script_writes():
    assert (DOCS / "sizing.md").read_text() == load("scripts/write_sizing.py").sizing_page()


def test_what_is_far_from_what_was_measured_is_marked():
    beside = load("scripts/write_sizing.py").beside
    assert beside(1.25, 1.0, str) == ["1.25", "1.0", "+25 %"] and beside(0.75, 1.0, str)[-1] == "-25 %"
    assert beside(1.26, 1.0, str)[-1] == "**+26 %, too far**" and beside(0.74, 1.0, str)[-1] == "**-26 %, too far**"


def test_a_row_of_flags_has_default_choices_and_explanation():
    parser = argparse.ArgumentParser(description="About it.")
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    add = parser.add_argument_group("sizes", "of a layer").add_argument
    add("--width", default=3, choices=[3, 4], help="the width|height, %(default)s")
    add("--wide", action="store_true", help="a switch")
    add("--list", action="version", version="1", help="prints")
    add("--share", default=argparse.SUPPRESS, help="of one recipe")
    add("--out", required=True, help="a file")
    assert load("scripts/write_flags.py").section("x.py", parser) == "\n".join([
        "## x.py", "", "About it.", "", "### sizes", "", "of a layer", "",
        "| flag | default | meaning |", "|---|---|---|", "| `--width` | `3` | the width\\|height, 3; one of `3`, `4` |",
        "| `--wide` | off | a switch |",
        "| `--list` | off | prints |", "| `--share` | the recipe's | of one recipe |",
        "| `--out` | required | a file |",
    ])  # fmt: skip


def test_of_the_sweep_the_page_has_the_flags_that_pruning_has_not():
    section = (DOCS / "flags.md").read_text().split("## model_sweep.py")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(--\w+)` \|", section, flags=re.MULTILINE)
    sweep, pruning = (command.build_parser()._option_string_actions for command in (model_sweep, model_pruning))
    assert pruning.keys() < sweep.keys()
    assert sorted(listed) == sorted([*(sweep.keys() - pruning.keys()), "--sparsity"])
    assert "All flags of model_pruning.py" in section


def test_every_model_name_is_listed():
    for name in MODEL_NAMES:
        assert f"`{name}`" in (DOCS / "models-and-texts.md").read_text()


def test_the_families_are_those_that_are_supported():
    listed = table((DOCS / "models-and-texts.md").read_text(), "`model_type`")
    assert list(listed) == [f"`{family}`" for family in FAMILIES]


def test_the_recipes_are_those_of_the_table():
    assert list(table((DOCS / "recipes.md").read_text(), "recipe")) == [f"`{name}`" for name in RECIPES]


def test_the_differences_are_numbered_without_a_gap():
    numbers = [name.split()[0] for name in table((DOCS / "differences.md").read_text(), "")]
    assert numbers == [f"D{number}" for number in range(1, len(numbers) + 1)]


def test_the_papers_commands_are_those_of_the_tests():
    flat = re.sub(r"\\\n", "", README.read_text())
    assert PAPERS_PRUNING in flat and PAPERS_EVALUATION in flat


def record(name: str) -> dict:
    return json.loads((RECORDS / f"{name}.json").read_text())


def measured(name: str) -> dict:
    """The only model's results in the record of an evaluation."""
    (result,) = record(name)["results"].values()
    return result


def perplexity(name: str, text: str) -> str:
    found = measured(name)["perplexity"][text]
    return with_error(found["value"], perplexity_error(found), 2)


def accuracy(name: str) -> str:
    averages = measured(name)["zero_shot"]["averages"]
    return with_error(averages["paper_rule"], averages["standard_error"], 2)


# Columns of the table: what was pruned, and what was.
README_RUNS = [
    "dense",
    *(f"{recipe}_sparsity-{sparsity}_seed-0" for sparsity in (0.2, 0.33) for recipe in ("olica", "olica-plus")),
]


def of_readme(run: str, scored: bool = False) -> str:
    """The folder of a run in the records of the methods, or of the same run when its tasks were scored."""
    return "/".join(["methods", *(["paper"] if run != "dense" else []), *(["tasks"] if scored else []), run])


def size_cells(run: str) -> dict[str, str]:
    """What the README says of the size of a model."""
    sizes = measured(f"{of_readme(run)}/evaluation")["parameters"]
    return {
        "parameters": f"{sizes['total']:,}",
        "parameters of the decoder layers": f"{sizes['decoder_layers']:,}",
        "weights as float32": f"{4 * sizes['total'] / 1e6:.1f} MB",
    }


def test_the_readmes_figures_are_those_of_the_records():
    rows = table(README.read_text(), "")
    for name, text in (("WikiText-2", "wikitext2"), ("C4", "data/c4_report.jsonl")):
        assert rows[f"perplexity, {name}"] == [perplexity(f"{of_readme(run)}/evaluation", text) for run in README_RUNS]
    scored = [accuracy(f"{of_readme(run, scored=True)}/evaluation") for run in README_RUNS]
    assert rows["mean accuracy of seven tasks, %"] == scored
    columns = [size_cells(run) for run in README_RUNS]
    for name in columns[0]:
        assert rows[name] == [column[name] for column in columns]


def test_the_readmes_protocol_is_that_of_the_records():
    for run in README_RUNS:
        result, scored = (measured(f"{of_readme(run, tasks)}/evaluation") for tasks in (False, True))
        assert (result["dtype"], scored["dtype"]) == ("float32", "float32")
        texts, tasks = result["perplexity"], scored["zero_shot"]
        assert [(text["seqlen"], text["bos"]) for text in texts.values()] == [(128, "none")] * len(texts)
        assert texts["wikitext2"]["windows"] == 2382
        assert (len(tasks["tasks"]), tasks["limit"], tasks["harness"]) == (7, 500, "lm-eval 0.4.13")
        assert {task["num_fewshot"] for task in tasks["tasks"].values()} == {0}
        environment = record(f"{of_readme(run)}/evaluation")["environment"]
        made = ("cpu", "db2f165") if "olica-plus" in run else ("NVIDIA H200", "0bb310f")
        assert (environment["device"], environment["git_commit"][:7]) == made
    for run in README_RUNS[1:]:
        pruned = record(f"{of_readme(run)}/pruning")
        assert pruned["settings"]["base_model"] == "smollm2" and pruned["calibration"]["ids"] == [256, 128]
        assert not has_former_shares(pruned)


def test_the_figures_of_the_papers_table_are_those_of_the_records():
    section = (DOCS / "measurements.md").read_text().split("## The paper's tables")[1].split("\n## ")[0]
    runs = ["dense", "sparsity-0.2", "sparsity-0.25", "sparsity-0.3", "sparsity-0.33", "sparsity-0.5"]
    names = [f"tables/{run}/evaluation" for run in runs]
    rows, dense = table(section, ""), measured(names[0])
    assert rows["perplexity"] == [perplexity(name, "wikitext2") for name in names]
    assert rows["mean accuracy, %"] == [accuracy(name) for name in names]
    for column, name in enumerate(names[1:], 1):
        compared = compare(measured(name), dense)
        text, tasks = compared["perplexity"]["wikitext2"], compared["paper_rule"]
        assert rows["ratio to dense"][column] == with_error(text["ratio"], text["ratio"] * text["standard_error"], 3)
        assert rows["difference to dense"][column] == with_error(tasks["difference"], tasks["standard_error"], 2)


class Runnable:
    """How the marked blocks are run in an empty folder: what is there before, and what holds afterwards."""

    def checkpoint(self, code: str, capsys) -> None:
        model, ids = make_llama(num_key_value_heads=2), torch.arange(3, 203).view(10, 20)
        _, plan = prune(model, ids, "olica", 0.2)
        write_pruned(model, plan, make_tokenizer(), Path("pruned_models/7b_sparsity-0.2"))
        exec(code, {})  # noqa: S102
        assert "The capital of France is" in capsys.readouterr().out
        for folder in ("copy", "retrained"):
            again = AutoModelForCausalLM.from_pretrained(folder).eval()
            torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)

    def api(self, code: str, capsys) -> None:
        save_tiny("tiny", num_hidden_layers=8)
        names: dict = {}
        exec(code.replace('"smollm2"', '"tiny"'), names)  # noqa: S102
        done, result = names["done"], names["measured"]
        assert str(done.folder) in capsys.readouterr().out
        assert done.folder.is_relative_to("pruned") or done.folder.is_relative_to(Path("pruned").resolve())
        pruned = AutoModelForCausalLM.from_pretrained(done.folder)
        assert pruned.num_parameters() == done.record["parameters"]["after"] < done.record["parameters"]["before"]
        assert len({shape.intermediate_size for shape in done.plan}) > 1 and len(done.plan) == 8
        measured = json.loads(result.path.read_text())["results"]
        assert [*measured] == ["dense", "pruned"]
        assert all(of_model["perplexity"]["pydoc"]["windows"] > 0 for of_model in measured.values())

    def method(self, code: str, capsys) -> None:
        make_llama(num_hidden_layers=4).save_pretrained("tiny")
        save_file({"calibration_ids": torch.arange(3, 203).view(10, 20)}, "ids.safetensors")
        try:
            exec(code, {})  # noqa: S102
            arguments = dict(datasets="ids.safetensors", sparsity=0.2, recipe="mlps")
            done = olica.prune("tiny", **arguments, spared=2, save_dir="pruned")
            unrepaired = olica.prune("tiny", **arguments, spared=2, refit="none", round_to=16, save_dir="unrepaired")
            with pytest.raises(UsageError, match="--mlp_num"):
                olica.prune("tiny", **arguments, mlp_num=1, save_dir="other")
            with pytest.raises(UsageError, match="--spared 4"):
                olica.prune("tiny", **arguments, spared=4, save_dir="other")
        finally:
            RECIPES.pop("mlps", None)
        channels = [shape.intermediate_size for shape in done.plan]
        assert channels[:2] == [176, 176] and channels[2] == channels[3] < 176
        assert all(shape.intermediate_size % 16 == 0 and not shape.down_bias for shape in unrepaired.plan)
        dense, pruned = (AutoModelForCausalLM.from_pretrained(folder) for folder in ("tiny", done.folder))
        for index, (before, after) in enumerate(zip(dense.model.layers, pruned.model.layers, strict=True)):
            assert torch.equal(after.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
            assert (after.mlp.down_proj.bias is not None) == (index >= 2)
            assert torch.equal(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight) == (index < 2)

    def gemma(self, code: str, capsys) -> None:
        sizes = dict(SIZES, hidden_size=72, num_key_value_heads=3)
        vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        vision |= dict(image_size=28, patch_size=14)
        config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
        torch.manual_seed(0)
        whole = Gemma3ForConditionalGeneration(config).eval()
        whole.save_pretrained("google/gemma-3-4b-pt")
        make_tokenizer().save_pretrained("google/gemma-3-4b-pt")
        exec(code, {})  # noqa: S102
        ids = torch.arange(3, 23)[None]
        assert read_tokenizer(locate("./gemma-3-4b-text"))("ab").input_ids
        text = read_model(locate("./gemma-3-4b-text"))
        torch.testing.assert_close(text(ids).logits, whole(ids).logits)


MARKED = {block.marker for page in PAGES for block in blocks(page) if block.marker}


def test_every_marked_block_is_run():
    assert {name for name in vars(Runnable) if not name.startswith("_")} == MARKED


@pytest.mark.parametrize("marker", sorted(MARKED))
def test_python_blocks_run(marker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block.text for page in PAGES for block in blocks(page) if block.marker == marker)
    getattr(Runnable(), marker)(code, capsys)


def test_the_terminal_says_of_llama_7b_what_the_page_says(tmp_path, capsys):
    """The sizes that the library's configuration has by default are those of LLaMA-7B."""
    LlamaConfig(architectures=["LlamaForCausalLM"], dtype="float16").save_pretrained(tmp_path)
    flags = ["--base_model", str(tmp_path), "--datasets", "bookcorpus+alpaca", "--mlp_num", "6", "--dry_run"]
    assert call(model_pruning, *flags) == 0
    section = (ROOT / "docs/reproduce.md").read_text().split("## LLaMA-7B on a card of 16 GB\n")[1]
    assert section.split("```\n")[1] in capsys.readouterr().out


def test_other_draws_are_those_on_record():
    said = re.search(
        r"`olica-plus` (\d+\.\d) and (\d+\.\d) on\s+WikiText-2 at 20 %, `olica` (\d+\.\d) and (\d+\.\d)",
        README.read_text(),
    )
    runs = [f"{recipe}_sparsity-0.2_seed-{seed}" for recipe in ("olica-plus", "olica") for seed in (1, 2)]
    results = [measured(f"{of_readme(run)}/evaluation") for run in runs]
    assert list(said.groups()) == [f"{result['perplexity']['wikitext2']['value']:.1f}" for result in results]


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of the table below a heading, by the first one, or by that and the recipe in the second."""
    lines = page.split(f"{heading}\n", 1)[1].split("\n#", 1)[0].splitlines()
    _, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return {" ".join(row[:2]) if row[1].startswith("`") else row[0]: row for row in rows}


def test_sizes_of_runs_are_those_that_can_be_worked_out():
    """LLaMA-7B has 6,738,415,616 parameters, all but 2 x 32,000 x 4,096 + 4,096 of them in its layers."""
    page = (ROOT / "docs/sizing.md").read_text()
    whole, layers = 6_738_415_616, 6_738_415_616 - 2 * 32_000 * 4_096 - 4_096
    for recipe, samples in (("olica", 256), ("olica-plus", 768)):
        memory = rows_of(page, f"### Memory and disk of {recipe}")
        _, _, there, on_host, *_, dense, _, pruned = memory["LLaMA-7B"]
        assert dense == f"{2 * whole / 1e9:.1f}" and float(pruned) == pytest.approx(0.8 * 2 * whole / 1e9, abs=0.06)
        states = 2 * samples * 128 * 4_096 / 1e9  # bfloat16
        # The survey of olica-plus reads half of the samples; of 3 variants of each of 18 groups one in 32 travels too.
        states *= 1 if recipe == "olica" else 0.5 + 3 * 18 / 32
        assert float(there) - float(on_host) == pytest.approx(states, abs=0.11)
        passes = rows_of(page, "## Time")[f"LLaMA-7B `{recipe}`"][2]
        assert float(passes.replace(",", "")) == pytest.approx(2 * layers * samples * 128 / 1e12, abs=0.5)
        cards = rows_of(page, "## What a card can do")
        for model, row in memory.items():
            for card, cell in zip((16, 24, 80), cards[f"{model} `{recipe}`"][2:], strict=True):
                assert cell.startswith("no") == (float(row[3]) > 0.8 * card), (model, card)
