"""Changes to one file of a model, drawn at random: what test_hammering.py has commands meet."""

import json
import random
import struct
from pathlib import Path
from typing import Any

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
