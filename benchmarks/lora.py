r"""A short LoRA of a dense or pruned model, the same for all, merged into a checkpoint that loads as the model's own.

    python benchmarks/lora.py --checkpoint pruned_models/smollm2_sparsity-0.33_of-layers_olica-plus \
        --datasets bookcorpus+alpaca --output_path retrained

Every linear layer but the head gets an adapter, those of factorised and narrowed projections and of corrections too.
One sample in sixteen is held back: its loss before and after says what the training was worth. peft is needed, which
requirements-dev.txt lists. Some ten minutes on 2 cores for SmolLM2 and 256 samples of 128 tokens, seconds on a GPU.
"""

import argparse
import shutil
import time
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import olica_stopping
from olica.checks import check_room
from olica.command_line import run_command
from olica.errors import UsageError
from olica.evaluation.perplexity import perplexity
from olica.machine import DEVICES, pick_device
from olica.model.skeleton import count_parameters
from olica.outputs.output_path import in_place_of
from olica.outputs.records import (
    PRUNING_RECORD,
    environment,
    flags_of,
    keep_vocabulary_record,
    read_pruning_record,
    write_record,
)
from olica.sources.calibration_set import Draw, build_calibration_set
from olica.sources.configuration import describe_source, read_config
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import read_model

RECORD = "lora_run.json"
# The same for every model, so that what is compared is the models. The learning rate falls to zero in a line.
RANK, ALPHA, LEARNING_RATE, BATCH_SIZE, LARGEST_GRADIENT = 8, 16, 5e-4, 8, 1.0
# One sample in so many is not trained on.
HELD_BACK = 16


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="model: a folder, name, hub id or .gguf file")
    parser.add_argument("--datasets", required=True, help="texts joined by +, or one token file")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder searched first for texts")
    parser.add_argument("--num_samples", type=int, default=128, help="samples of 128 tokens drawn from each text")
    parser.add_argument("--add_bos_token", action="store_true", help="begin every sample with the start token (Gemma)")
    parser.add_argument("--epochs", type=int, default=2, help="times that every sample is trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, the adapters and the order of samples")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the checkpoint that is written")
    return parser


def divided(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The samples (N, T) to train on, and those that are held back, some of every text.

    Raises:
        UsageError: there are too few to do both.
    """
    is_held_back = torch.arange(len(ids)) % HELD_BACK == 0
    if is_held_back.all():
        raise UsageError("--num_samples: give at least 2, of which one is held back")
    return ids[~is_held_back], ids[is_held_back]


def train(model: nn.Module, ids: Tensor, epochs: int, seed: int) -> int:
    """Train the weights of `model` that want gradients on `ids` (N, T), each sample `epochs` times; returns the steps.

    Raises:
        UsageError: the loss is not finite.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    order = [rows for _ in range(epochs) for rows in torch.randperm(len(ids), generator=generator).split(BATCH_SIZE)]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(order))
    for rows in tqdm(order, desc="train", unit="step"):
        batch = ids[rows].to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        if not loss.isfinite():
            raise UsageError("--checkpoint: the loss is not finite; the checkpoint yields NaN or infinite logits")
        loss.backward()
        nn.utils.clip_grad_norm_(weights, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    return len(order)


def trained(model: PreTrainedModel, ids: Tensor, epochs: int, seed: int) -> tuple[PreTrainedModel, dict]:
    """The model with its adapters trained and merged, and what the record says of the training."""
    training, held_back = divided(ids)
    before = perplexity(model, held_back, BATCH_SIZE).mean_nll
    torch.manual_seed(seed)  # of the adapters' first weights
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapters, _ = adapted.get_nb_trainable_parameters()
    start = time.perf_counter()
    steps = train(adapted, training, epochs, seed)
    merged = adapted.merge_and_unload()
    seconds = time.perf_counter() - start
    after = perplexity(merged, held_back, BATCH_SIZE).mean_nll
    return merged, {
        "seconds": seconds,
        "steps": steps,
        "samples": {"trained": list(training.shape), "held_back": list(held_back.shape)},
        "parameters_of_adapters": adapters,
        "loss_held_back": {"before": before, "after": after},  # nats per predicted token
    }


def run(args: argparse.Namespace) -> None:
    """Draw the samples, train, and write the checkpoint with both records."""
    if args.epochs < 1:
        raise UsageError(f"--epochs {args.epochs} must be at least 1")
    if args.output_path.exists() or args.output_path.is_symlink():
        raise UsageError(f"--output_path {args.output_path} exists already; give another name")
    location, device = locate(args.checkpoint, "--checkpoint"), pick_device(args.device)
    config, tokenizer = read_config(location), read_tokenizer(location)
    pruning = read_pruning_record(location.path)
    calibration = build_calibration_set(
        args.datasets,
        tokenizer,
        Draw(args.num_samples, seed=args.seed, add_bos_token=args.add_bos_token),
        data_dir=args.data_dir,
        cache_dir=args.data_dir / "calibration",
        vocab_size=config.vocab_size,
    )
    divided(calibration.ids)  # too few are refused before any weight is read
    model = read_model(location, "float32")  # small steps are lost in half precision
    stored = torch.float32 if location.gguf_file else config.dtype or torch.float32
    check_room(args.output_path, model.get_memory_footprint(return_buffers=False), "--output_path", "the checkpoint")
    merged, training = trained(model.to(device), calibration.ids, args.epochs, args.seed)
    record = {
        "kind": "lora",
        "settings": flags_of(args),
        "model": describe_source(location, config),
        "parameters": count_parameters(merged),
        "adapters": {
            "rank": RANK,
            "alpha": ALPHA,
            "learning_rate": LEARNING_RATE,
            "samples_per_step": BATCH_SIZE,
            "largest_gradient": LARGEST_GRADIENT,
        },
        "texts": {"sources": calibration.sources, "token_hash": calibration.token_hash},
        **training,
        "environment": environment(device) | {"peft": peft.__version__},
    }
    with in_place_of(args.output_path) as partial:
        merged.to(stored).save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if pruning:
            shutil.copy(Path(location.path) / PRUNING_RECORD, partial)
        keep_vocabulary_record(location.path, partial)
        write_record(partial / RECORD, record)
    losses = training["loss_held_back"]
    print(
        f"{training['steps']} steps in {training['seconds']:.0f} s; loss on the {training['samples']['held_back'][0]} "
        f"samples held back: {losses['before']:.3f} -> {losses['after']:.3f}\nwrote {args.output_path}"
    )


if __name__ == "__main__":
    olica_stopping.end_with(lambda: run_command(build_parser(), run))
