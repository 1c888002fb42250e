"""Models whose files were mutated, each driven through the commands in a process of its own: for test_hammering.py."""

import json
import logging
import math
import os
import random
import resource
import shutil
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from conftest import TEST_DATA, make_tokenizer, save_tiny
from safetensors.torch import save_file
from tiny_families import make_family
from tiny_gguf import GGUF_FAMILIES, GGUF_SIZES, write_gguf

import model_evaluate
import model_export
import model_pruning
from olica.command_line import run_command
from olica.methods.recipes import RECIPES
from olica.model.families import FAMILIES
from olica.sources.gguf_header import read_header

COMMANDS = {"prune": model_pruning, "evaluate": model_evaluate, "export": model_export}
# What a command may take beyond what this process has when it begins.
MEMORY, SECONDS = 4 * 2**30, 120
WORDS = "Old owls read long books of law by candle light, and sleep all day in dusty halls of stone.\n"
TEXT, ROWS, CALIBRATION, SEQLEN = "held.txt", "rows.jsonl", "ids.safetensors", 16
MADE_BY = ["--base_model=tiny", f"--datasets={CALIBRATION}", "--data_dir=data", "--save_dir=out", "--batch_size=4"]
OF_TEXT = [f"--datasets={ROWS}", "--num_samples=6", f"--seqlen={SEQLEN}"]
MEASURING = [f"--ppl={TEXT}", "--ppl_seqlen=16", "--ppl_windows=4", "--output_path=said.json"]
VALUES = [None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -1.5, 1e300, float("nan"), float("inf")]
VALUES += ["", "7", "nonsense", "../..", [], [1, 2], [None], ["x"], {}, {"a": 1}]
# Keys that a configuration is given beside those that it has, with values of the right kind.
ROPES = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0},
    {"type": "dynamic", "factor": -1.0},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 0.0},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]},
    {"rope_type": "unheard of"},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": None},
]
ADDED: dict[str, list] = {
    "rope_scaling": ROPES,
    "rope_parameters": ROPES,
    "layer_shapes": [[], [{"q_rank": 3}], None],
    "block_configs": [[], [{"ffn": {}}]],
    "quantization_config": [{}, {"quant_method": "gptq"}, {"quant_method": 7}, {"quant_method": "fp8"}],
    "dtype": ["float16", "bfloat16", "float64", "int64", "float8_e4m3fn", "complex64", "cuda", 7],
    "torch_dtype": ["float16", "nn", "auto", None],
    "auto_map": [{"AutoConfig": "missing.Config"}, {"AutoModelForCausalLM": 7}, [], "x.y"],
    "sliding_window": [0, -1, 3, 10**9, "7"],
    "layer_types": [["full_attention"], ["sliding_attention"] * 3, ["chunked_attention"] * 3, 7],
    "head_dim": [0, -2, 3, 7, 64, 10**6, 4.0],
    "num_key_value_heads": [0, 2, 7, 10**6, None],
    "tie_word_embeddings": [True, False, None, 1],
    "olica_format": [0, 3, "2", None],
    "model_type": ["llama", "qwen3", "mamba", "gpt2", "olica_llama", "olica_gemma2", "nemotron-nas", ""],
    "architectures": [["GPT2LMHeadModel"], [], [None], "LlamaForCausalLM"],
    "hidden_act": ["relu", "gelu_pytorch_tanh", "unheard of"],
    "pad_token_id": [0, -1, 10**6],
    "attention_dropout": [0.5, 2.0, -1.0],
    "initializer_range": [-1.0, 0],
    "_attn_implementation": ["flash_attention_2", "unheard of"],
    "attn_implementation": ["eager", "flash_attention_2"],
    "max_position_embeddings": [1, 0, -5, 10**12],
    "num_hidden_layers": [0, 1, 2, 4, 10**5],
    "vocab_size": [1, 3, 300, 10**7, 10**12],
    "use_cache": [False, None],
    "rms_norm_eps": [-1.0, 1e30, 0],
}


def place_in(draw: random.Random, value: Any) -> tuple[Any, Any, str]:
    """One of the places in a JSON value, reached from key to key: long lists in it do not hide the rest."""
    path = ""
    while True:
        key = draw.choice([*value] if isinstance(value, dict) else range(len(value)))
        path = f"{path}/{key}"
        if not (isinstance(value[key], dict | list) and value[key]) or draw.random() < 0.3:
            return value, key, path
        value = value[key]


def nested(value: Any) -> list:
    """The parts of a configuration that say most, if it has them."""
    names = ("layer_shapes", "block_configs", "rope_parameters", "rope_scaling")
    found = [value.get(name) for name in names] if isinstance(value, dict) else []
    return [part for part in found if part and isinstance(part, dict | list)]


def alike(draw: random.Random, old: Any) -> list:
    """Other values of the kind of an old one; of a kind without some, of any kind."""
    match old:
        case bool():
            return [not old]
        case int():
            return [0, 1, -1, old + 1, old - 1, 2 * old, old // 2, 10**7, 2**40]
        case float():
            return [0.0, -old, 2 * old, 1e-30, 1e30, float("nan"), float("inf")]
        case str():
            return ["", old + "x", old[:-1], old.upper(), "nonsense"]
        case list() if old:
            return [[], old[:-1], [*old, old[-1]], [None, *old[1:]], draw.sample(old, len(old))]
        case _:
            return VALUES


def mutated_json(draw: random.Random, path: Path, added: dict[str, list]) -> str:
    """Change a JSON file in one to three places; returns what was done."""
    if draw.random() < 0.1:
        return mutated_bytes(draw, path)
    value, done = json.loads(path.read_text()), []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if added and draw.random() < 0.4:
            key = draw.choice([*added])
            value[key] = draw.choice(added[key])
            done.append(f"/{key} = {value[key]!r}")
        elif not value:
            break
        else:
            holder, key, where = place_in(draw, draw.choice([value, *nested(value)]))
            if draw.random() < 0.25:
                del holder[key]
                done.append(f"{where} is gone")
            else:
                old = holder[key]
                holder[key] = draw.choice(alike(draw, old) if draw.random() < 0.6 else VALUES)
                done.append(f"{where} = {holder[key]!r}")
    if draw.random() < 0.03:
        value = draw.choice(VALUES)
        done.append(f"all of it is {value!r}")
    path.write_text(json.dumps(value))
    return f"{path.name}: {', '.join(done)}"


def mutated_bytes(draw: random.Random, path: Path, first: int = 0, last: int | None = None) -> str:
    """Change bytes of a file between two places; returns what was done."""
    content = bytearray(path.read_bytes())
    last = min(len(content), last or len(content))
    how = draw.choice(["flip", "flip", "flip", "cut", "insert", "remove", "zero", "empty", "append"])
    at = draw.randrange(first, max(first + 1, last))
    match how:
        case "flip":
            for _ in range(draw.choice([1, 2, 10])):
                at = draw.randrange(first, max(first + 1, last))
                content[at] ^= 1 << draw.randrange(8)
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = draw.randbytes(draw.randint(1, 9))
        case "remove":
            del content[at : at + draw.randint(1, 9)]
        case "zero":
            content[at : at + 8] = bytes(8)
        case "empty":
            content.clear()
        case "append":
            content += draw.randbytes(draw.randint(1, 99))
    path.write_bytes(content)
    return f"{path.name}: {how} at {at} of {len(content)} bytes"


def mutated_weights(draw: random.Random, path: Path) -> str:
    """Change a file of safetensors; returns what was done."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    name = draw.choice([key for key in header if key != "__metadata__"])
    row = header[name]
    how = draw.choice("bytes header length gone renamed shape dtype offsets value added metadata list".split())
    what: Any = ""
    match how:
        case "bytes":
            return mutated_bytes(draw, path, 0, draw.choice([8, 8 + length, len(content)]))
        case "header":
            return mutated_bytes(draw, path, 8, 8 + length)
        case "length":
            what = draw.choice([0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
            path.write_bytes(struct.pack("<Q", what) + content[8:])
            return f"{path.name}: length of the header is {what}"
        case "gone":
            del header[name]
        case "renamed":
            others = [name + "x", name.replace("weight", "bias"), name.replace("0", "1")]
            what = draw.choice([*others, "lm_head.weight", ""])
            del header[name]
            header[what] = row
        case "shape":
            numbers = row["shape"]
            others = [numbers[::-1], [*numbers, 1], [1, *numbers], [0, *numbers[1:]], numbers[:-1]]
            what = row["shape"] = draw.choice([*others, [-1], [2**40], None])
        case "dtype":
            what = draw.choice(["F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "Q4", None])
            row["dtype"] = what
        case "offsets":
            begin, end = row["data_offsets"]
            others = [[0, 0], [begin + 4, end], [begin, end - 4], [end, begin], [-4, end - 4], [begin, 2**40]]
            what = row["data_offsets"] = draw.choice([*others, [0], None])
        case "value":
            begin, end = row["data_offsets"]
            wide = row["dtype"] == "F32"
            what = draw.choice([float("nan"), float("inf"), 1e38, -1e38, 1e-40, 1e20])
            packed = struct.pack("<f", what) if wide else struct.pack("<f", what)[2:]
            at = begin + draw.randrange((end - begin) // len(packed)) * len(packed)
            data[at : at + len(packed)] = packed
        case "added":
            others = ["model.layers.0.extra.weight", "model.layers.99.mlp.up_proj.weight"]
            name = draw.choice([*others, "lm_head.weight", "x"])
            header[name] = {"dtype": "F32", "shape": [4], "data_offsets": [len(data), len(data) + 16]}
            data += struct.pack("<4f", 1, 2, 3, 4)
        case "metadata":
            what = draw.choice([None, {}, {"format": "tf"}, {"format": 7}, "x", []])
            header["__metadata__"] = what
        case "list":
            header = draw.choice([[], None, "x", 7, {}])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"{path.name}: {how} of {name}: {what!r}"


def mutated_index(draw: random.Random, path: Path) -> str:
    """Change the index of a model's weights; returns what was done."""
    index = json.loads(path.read_text())
    rows = index["weight_map"]
    name, other = draw.choice([*rows]), draw.choice([*rows.values()])
    how = draw.choice(["json", "gone", "elsewhere", "another", "renamed", "file gone", "itself", "map"])
    match how:
        case "json":
            return mutated_json(draw, path, {})
        case "gone":
            del rows[name]
        case "elsewhere":
            rows[name] = draw.choice(["nowhere.safetensors", "../../x.safetensors", "/etc/passwd", "config.json", ""])
        case "another":
            rows[name] = other
        case "renamed":
            rows[name + "x"] = rows.pop(name)
        case "file gone":
            (path.parent / other).unlink()
        case "itself":
            rows[name] = path.name
        case "map":
            index["weight_map"] = draw.choice([[], None, {}, {name: None}, {name: 7}, {name: []}])
    path.write_text(json.dumps(index))
    return f"{path.name}: {how} of {name}: {rows.get(name)!r}"


def mutated_tokenizer(draw: random.Random, folder: Path) -> str:
    """Change a model's tokenizer; returns what was done."""
    how = draw.choice(["settings", "settings", "whole", "whole", "whole", "gone", "beside", "config gone"])
    match how:
        case "settings":
            return mutated_json(draw, folder / "tokenizer_config.json", TOKENIZER_SETTINGS)
        case "whole":
            path = folder / "tokenizer.json"
            return mutated_json(draw, path, {}) if draw.random() < 0.8 else mutated_bytes(draw, path)
        case "gone":
            (folder / "tokenizer.json").unlink()
        case "config gone":
            (folder / "tokenizer_config.json").unlink()
        case "beside":
            beside = {
                "tokenizer.model": b"no pieces",
                "special_tokens_map.json": b'{"bos_token": 7, "eos_token": ["x"]}',
                "added_tokens.json": b'{"<new>": 10000}',
                "chat_template.jinja": b"{% if %}",
                "vocab.json": b"[]",
            }
            how = draw.choice([*beside])
            (folder / how).write_bytes(beside[how])
            if draw.random() < 0.3:
                (folder / "tokenizer.json").unlink()
                how += " in place of tokenizer.json"
    return f"tokenizer: {how}"


TOKENIZER_SETTINGS: dict[str, list] = {
    "tokenizer_class": ["LlamaTokenizer", "PreTrainedTokenizerFast", "BertTokenizer", "Unheard", "", 7, None],
    "bos_token": ["", "<s>", None, {"content": ""}, {"content": "<new>"}, 7],
    "eos_token": ["", "<new>", None, 7],
    "add_bos_token": [True, "x"],
    "model_max_length": [0, -1, 1e30, "x", None],
    "extra_special_tokens": [["<a>"], {"a": "<a>"}, 7, [None]],
    "additional_special_tokens": [["<a>"], 7],
    "added_tokens_decoder": [{"0": {"content": "<x>"}}, {"x": 7}, {"9999999": {"content": "<far>"}}, []],
    "auto_map": [{"AutoTokenizer": ["x.y", None]}, 7],
    "chat_template": ["{% if %}", 7, [{"name": "a"}]],
    "backend": ["tokenizers", "sentencepiece", "mistral-common", 7],
}


def dense(draw: random.Random, folder: Path) -> None:
    """A dense model of any family, its weights in one file or in several."""
    family = draw.choice([*FAMILIES])
    model = make_family(family, grouped=draw.random() < 0.5, tied=draw.random() < 0.3, peculiar=draw.random() < 0.5)
    model.save_pretrained(folder, max_shard_size=draw.choice(["5GB", "100KB"]))
    make_tokenizer().save_pretrained(folder)


def pruned(draw: random.Random, folder: Path) -> None:
    """A pruned checkpoint: one of those that the test has made, or one of the first format, of any family."""
    old = TEST_DATA / "checkpoints" / draw.choice([*FAMILIES])
    source = draw.choice([*sorted(Path("made/out").glob("tiny*")), old])
    shutil.copytree(source, folder)
    if source == old:
        make_tokenizer().save_pretrained(folder)


def recorded(draw: random.Random, folder: Path) -> None:
    """A pruned checkpoint where its command has made it, beside the dense model."""
    shutil.copytree("made", folder.parent, dirs_exist_ok=True)
    folder.symlink_to("out/tiny_sparsity-0.2")


def gguf_file(draw: random.Random, folder: Path) -> None:
    """A GGUF file of any family that transformers reads."""
    family = draw.choice([*GGUF_FAMILIES])
    architecture, own = GGUF_FAMILIES[family]
    folder.mkdir()
    write_gguf(make_family(family, peculiar=False, **GGUF_SIZES | own), architecture, folder / "model.gguf")


def mutate(draw: random.Random, folder: Path, kind: str) -> str:
    """Change one file of the model in a folder; returns what was done."""
    weights, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    match kind:
        case "config":
            return mutated_json(draw, folder / "config.json", ADDED)
        case "weights":
            if index.exists() and draw.random() < 0.25:
                return mutated_index(draw, index)
            return mutated_weights(draw, draw.choice(weights))
        case "tokenizer":
            return mutated_tokenizer(draw, folder)
        case "generation":
            path = folder / "generation_config.json"
            return mutated_json(draw, path, {"do_sample": [7], "temperature": [-1.0], "eos_token_id": [[1, "x"], -1]})
        case "record":
            return mutated_json(draw, folder / "olica_run.json", {})
        case "gguf":
            return mutated_bytes(draw, folder / "model.gguf", 0, draw.choice([64, 2000, 2000, None]))
    raise ValueError(kind)


# How a model is made, what of it is mutated, how often of 20, and what is called of it.
Kind = tuple[Callable[[random.Random, Path], None], str, int, tuple[str, ...]]
KINDS: list[Kind] = [
    (dense, "config", 5, ("prune", "evaluate")),
    (dense, "weights", 4, ("prune", "evaluate")),
    (dense, "tokenizer", 2, ("prune", "evaluate")),
    (dense, "generation", 1, ("prune", "evaluate")),
    (gguf_file, "gguf", 2, ("prune", "evaluate")),
    (pruned, "config", 2, ("evaluate", "export")),
    (pruned, "weights", 2, ("evaluate", "export")),
    (recorded, "record", 2, ("prune", "evaluate", "export")),
]


def by_recipe(name: str) -> list[str]:
    """The flag of a recipe, and what a model of three layers wants of one that corrects MLPs."""
    corrected = ["--mlp_num=1", "--ratio=0.1"] if "mlp_num" in RECIPES[name].parameter_names else []
    return [f"--recipe={name}", *corrected]


def arguments_of(draw: random.Random, what: str, kind: str) -> list[str]:
    """What a command is called with, for the model in the folder `model`."""
    path = "model/model.gguf" if kind == "gguf" else "out/tiny_sparsity-0.2" if kind == "record" else "model"
    match what:
        case "prune" if kind == "record":  # the record says whether a checkpoint is that of the same command
            return [*MADE_BY, *by_recipe("olica"), "--sparsity=0.2,0.1"]
        case "prune":
            text = OF_TEXT if kind in ("tokenizer", "gguf") else []
            return [*MADE_BY, *text, f"--base_model={path}", *by_recipe(draw.choice([*RECIPES]))]
        case "evaluate":
            with_dense = ["--with_dense"] if kind == "record" else []
            return [f"--checkpoint={path}", *MEASURING, *with_dense]
        case "export":
            form = draw.choice(["--layout=dense", "--layout=dense", "--gguf=q8_0", "--gguf=f16"])
            return [path, form, "--output_path=exported" + (".gguf" if "gguf" in form else "")]
    raise ValueError(what)


def fault(what: str, arguments: list[str], status: int, errors: str) -> str | None:
    """What is wrong with how a command ended."""
    if "Traceback" in errors:
        return "traceback"
    checkpoints = [*Path("out").glob("tiny*"), *Path("out").glob("model*"), *Path().glob("exported")]
    match status:
        case 2:
            said = [line for line in errors.splitlines() if ": error: " in line]
            if len(said) != 1 or not errors.endswith(said[0] + "\n"):
                return "not one sentence at the end"
            places = {"prune": "out/model*", "export": "*exported*"}
            if what in places and any(Path().glob(places[what])):
                return "half-written"
        case 0 if what == "evaluate":
            (result, *_) = json.loads(Path("said.json").read_text())["results"].values()
            if not 0 < result["perplexity"][TEXT]["value"] < math.inf:
                return "no finite perplexity"
        case 0 if "--gguf" in " ".join(arguments):
            read_header(Path("exported.gguf"))
        case 0:
            for checkpoint in checkpoints:
                if call("evaluate", [f"--checkpoint={checkpoint}", *MEASURING], Path("later")):
                    later = Path("later").read_text()
                    if "Traceback" in later or "the perplexity is not finite" not in later:
                        return f"{checkpoint} is not sound: {later}"
        case _:
            return f"status {status}"
    return None


def call(command: str, arguments: list[str], errors: Path) -> int:
    """The exit status of a command, whose errors are written to a file."""
    module, own = COMMANDS[command], os.dup(2)
    logging.getLogger().handlers.clear()  # they write to where an earlier command wrote its errors
    with errors.open("w") as said, open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(said):
        os.dup2(said.fileno(), 2)  # what libraries in C say
        try:
            return run_command(module.build_parser(), module.run, arguments)
        except SystemExit as ended:
            return ended.code
        except BaseException:
            traceback.print_exc(file=said)
            return 1
        finally:
            os.dup2(own, 2)
            os.close(own)


def limit_memory_and_time() -> None:
    """No size in a file may take down the machine, or take for ever."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def drive(draw: random.Random, row: Kind, number: int, out: int) -> None:
    """Mutate a model in the current folder and call what is called of it; writes how each command ended to `out`."""
    make, kind, _, commands = row
    folder = Path(str(number)).absolute()
    folder.mkdir()
    make(draw, folder / "model")
    did = mutate(draw, folder / "model", kind)
    for name in (TEXT, ROWS, CALIBRATION):
        shutil.copy(f"made/{name}", folder)
    os.chdir(folder)
    limit_memory_and_time()
    for what in commands:
        arguments = arguments_of(draw, what, kind)
        status = call(what, arguments, Path("errors"))
        errors = Path("errors").read_text(errors="replace")
        report = {"number": number, "case": f"{make.__name__}, {did}", "command": [what, *arguments]}
        report |= {"status": status, "errors": errors, "fault": fault(what, arguments, status, errors)}
        os.write(out, (json.dumps(report) + "\n").encode())


def prepare(folder: str) -> None:
    """Make what all start from: a text, a calibration set, and pruned checkpoints beside their dense model."""
    os.chdir(folder)
    Path(TEXT).write_text(WORDS * 4)
    Path(ROWS).write_text("".join(json.dumps({"text": f"{number} {WORDS}"}) + "\n" for number in range(12)))
    ids = torch.randint(3, 259, (6, SEQLEN), generator=torch.Generator().manual_seed(0))
    save_file({"calibration_ids": ids}, CALIBRATION)
    save_tiny("tiny", num_key_value_heads=2)
    for layout, recipe in (("olica", "olica"), ("deci", "olica-plus"), ("stock", "olica-plus")):
        if call("prune", [*MADE_BY, *by_recipe(recipe), f"--layout={layout}"], Path("errors")):
            raise AssertionError(Path("errors").read_text())


def main(seed: str, count: int, folder: str) -> None:
    """Drive so many mutations, each in a child of its own; `report.jsonl` says how each of their commands ended."""
    os.chdir(folder)
    out = os.open("report.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    rows = [row for row in KINDS for _ in range(row[2])]
    for number in range(count):
        if (child := os.fork()) == 0:
            status = 1
            try:
                drive(random.Random(f"{seed} {number}"), rows[number % len(rows)], number, out)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        if ended := os.waitpid(child, 0)[1]:
            raise AssertionError(f"mutation {number} ended with {os.waitstatus_to_exitcode(ended)}")
        shutil.rmtree(str(number), ignore_errors=True)


if __name__ == "__main__":
    prepare(sys.argv[2]) if sys.argv[1] == "--prepare" else main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
