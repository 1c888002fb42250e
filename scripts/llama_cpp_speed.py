"""Time prefill and greedy decoding of GGUF files in llama.cpp, in turns within one process.

Compare the ratios to the first file: absolute times are the machine's. llama.cpp is that of scripts/llama_cpp.sh.

OLICA_LLAMA_CPP=FOLDER python scripts/llama_cpp_speed.py DENSE.gguf PRUNED.gguf ... --output_path record.json
"""

import argparse
from os.path import expanduser
from pathlib import Path
from statistics import median

import torch
from gguf import GGUFReader
from llama_cpp import ask, read_by

import olica_stopping
from olica.checks import check_record_path
from olica.command_line import run_command
from olica.errors import UsageError
from olica.outputs.records import environment, write_record


def build_parser() -> argparse.ArgumentParser:
    """The files, how much is timed, and where the record goes."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("files", metavar="MODEL.gguf", nargs="+", type=expanduser, help="what is timed, in ratios to the first")
    add("--prompt_tokens", type=int, default=128, help="tokens of the prompt")
    add("--new_tokens", type=int, default=32, help="tokens that it is continued by")
    add("--repeats", type=int, default=9, help="counted rounds, a turn of every model in each")
    add("--threads", type=int, default=1, help="of llama.cpp; no more than cores are free")
    add("--output_path", type=Path, help="file of the record")
    return parser


def run(args: argparse.Namespace) -> None:
    """Time the files, print a table and write the record."""
    for name, least in {"prompt_tokens": 1, "new_tokens": 2, "repeats": 1, "threads": 1}.items():
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)} must be at least {least}")
    missing = [file for file in args.files if not Path(file).is_file()]
    if missing:
        raise UsageError(f"{missing[0]}: there is no such file")
    if args.output_path:
        check_record_path(args.output_path, "--output_path")
    vocabulary = min(len(GGUFReader(file).fields["tokenizer.ggml.tokens"].data) for file in args.files)
    timed = torch.randint(vocabulary, (args.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    request = {"models": [str(Path(file).resolve()) for file in args.files], "timed": timed}
    request |= {"sequences": [], "prompts": [], "texts": []}
    request |= {name: getattr(args, name) for name in ("new_tokens", "repeats", "threads")}
    answer = ask(request)
    rows = []
    for file, found in zip(args.files, answer["models"], strict=True):
        row = {"file": Path(file).name, "bytes": Path(file).stat().st_size}
        for place, stage in enumerate(("prefill", "decode")):
            tokens = args.prompt_tokens if stage == "prefill" else 1
            seconds = median(times[place] for times in found["times"])
            row[stage] = {"median_s": seconds, "tokens_per_s": tokens / seconds}
            row[stage]["ratio"] = seconds / (rows[0][stage]["median_s"] if rows else seconds)
        rows.append(row)
    print(f"{args.prompt_tokens} tokens, continued by {args.new_tokens}, medians of {args.repeats} rounds")
    print(f"{'tokens/s, and the ratio of times':<44}{'prefill':>18}{'decode':>18}")
    for row in rows:
        speeds = (f"{row[stage]['tokens_per_s']:>10.1f}{row[stage]['ratio']:>8.3f}" for stage in ("prefill", "decode"))
        print(f"{row['file']:<44}{''.join(speeds)}")
    if args.output_path:
        settings = {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeats", "threads")}
        record = {"kind": "speed in llama.cpp", "settings": settings, "files": rows, "read_by": read_by(answer)}
        write_record(args.output_path, record | {"environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
