"""Prune a dense model by a package of other people, as it ships, within the package's own environment.

Run by benchmarks/peers.sh. Nothing of Olica is imported here, since no environment but ours has it; a package is used
by its documented calls alone. All of them thin the MLPs only, every layer to the same width, which brings the whole
model to the sparsity asked for. A peer gets the dense model and token ids; what it makes is written as a folder that
transformers reads.

L layers, D hidden size, F intermediate channels, N samples of T tokens
"""

import argparse
import json
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = "calibration_ids"  # the tensor of a token file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Task:
    """What a peer is asked for.

    Attributes:
        dense: folder of the dense model.
        ids: the calibration set (N, T), int64.
        width: channels that every MLP is to keep.
        batch_size: samples at a time.
    """

    dense: Path
    ids: torch.Tensor
    width: int
    batch_size: int

    def batches(self) -> tuple[torch.Tensor, ...]:
        """The calibration set in batches (B, T)."""
        return self.ids.split(self.batch_size)


@dataclass(frozen=True)
class Peer:
    """A pruner of other people.

    Attributes:
        package: which is recorded with its version, by the name that pip knows.
        prune: what returns the pruned model, which is given unless the peer reads it itself.
        sees_text: whether it is given the calibration set.
    """

    package: str
    prune: Callable[[PreTrainedModel, Task], PreTrainedModel]
    sees_text: bool


def optipfair(model: PreTrainedModel, task: Task, dataloader: DataLoader | None = None) -> PreTrainedModel:
    """Its recommended score: range of the weights of a channel's gate and up rows; with text times activation norms."""
    from optipfair import prune_model

    dense = model.config.intermediate_size
    return prune_model(
        model=model,
        pruning_type="MLP_GLU",
        neuron_selection_method="MAW",
        pruning_percentage=100 * (dense - task.width) / dense,
        dataloader=dataloader,
        show_progress=False,
    )


def optipfair_data(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """The same with a data loader of the calibration set."""
    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in task.ids]
    return optipfair(model, task, DataLoader(rows, batch_size=task.batch_size))


def torch_pruning(model: PreTrainedModel, task: Task, importance: Callable) -> PreTrainedModel:
    """Groups of a gate row, an up row and a down column, from its dependency graph.

    All layers but those that begin such a group are ignored: with grouped heads it does not come to an end else (its
    issue 527).
    """
    import torch_pruning as tp

    firsts = [layer.mlp.gate_proj for layer in model.model.layers]
    seconds = [layer.mlp.up_proj for layer in model.model.layers]
    others = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not any(module is one for one in firsts + seconds)
    ]
    ratio = 1 - (task.width + 0.001) / model.config.intermediate_size  # what stays is rounded down
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=task.ids[:1, :16],
        importance=importance,
        pruning_ratio_dict=dict.fromkeys(firsts, ratio),
        ignored_layers=others,
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    model.config.intermediate_size = firsts[0].out_features
    return model


def torch_pruning_magnitude(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Group norms of the weights, as it takes them by default."""
    import torch_pruning as tp

    return torch_pruning(model, task, tp.importance.GroupMagnitudeImportance())


def torch_pruning_activation(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Its norms of activations, which want no labels."""
    import torch_pruning as tp

    importance = tp.importance.ActivationImportance()
    with torch.no_grad(), importance.compute_importance(model):
        for batch in task.batches():
            model(batch, use_cache=False)
    return torch_pruning(model, task, importance)


def modelopt(model: PreTrainedModel, task: Task, hook_of: Callable[[nn.Linear], Callable]) -> PreTrainedModel:
    """Its scores of channels, read off the down projections; the cut is ours."""
    hooks = [hook_of(layer.mlp.down_proj) for layer in model.model.layers]
    handles = [
        layer.mlp.down_proj.register_forward_hook(hook) for layer, hook in zip(model.model.layers, hooks, strict=True)
    ]
    with torch.no_grad():
        for batch in task.batches():
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, hook in zip(model.model.layers, hooks, strict=True):
        keep_channels(layer.mlp, hook.accumulate().topk(task.width).indices.sort().values)
    model.config.intermediate_size = task.width
    return model


def keep_channels(mlp: nn.Module, kept: torch.Tensor) -> None:
    """Leave an MLP with the channels `kept` (width,): rows of gate (F, D) and up (F, D), columns of down (D, F)."""
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = getattr(mlp, name).weight.detach().index_select(axis, kept).contiguous()
        thinner = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        thinner.weight = nn.Parameter(weight)
        setattr(mlp, name, thinner)


def modelopt_independent(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Norm of a column of the down projection times the channel's mean absolute activation."""
    from modelopt.torch.prune.importance_hooks import base_hooks

    return modelopt(model, task, base_hooks.IndependentChannelContributionHook)


def modelopt_iterative(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Norm of the output's change when a channel goes, the least going with every batch; ranks are the scores."""
    from modelopt.torch.prune.importance_hooks import base_hooks

    settings = {"validation_full_iters": len(task.batches())}
    return modelopt(model, task, lambda layer: base_hooks.IterativeChannelContributionHook(layer, settings))


def fmchisel_osscar(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """OSSCAR with its defaults, on MLPs alone: greedy choice and least squares of the down projections."""
    from datasets import Dataset
    from fmchisel.pruning.osscar.base import OSSCARModifier
    from fmchisel.pruning.osscar.utils.helpers import cleanup_after_prune, pack
    from llmcompressor import oneshot
    from transformers import PreTrainedTokenizerFast

    gone = model.config.intermediate_size - task.width
    rows = {"input_ids": task.ids.tolist(), "attention_mask": torch.ones_like(task.ids).tolist()}
    dense = str(task.dense.resolve())
    with TemporaryDirectory() as work, chdir(work):  # it leaves logs where it runs
        oneshot(
            model=model,
            tokenizer=PreTrainedTokenizerFast(tokenizer_file=f"{dense}/tokenizer.json"),  # wanted, not used
            dataset=Dataset.from_dict(rows),
            recipe=OSSCARModifier(num_drop_mlp_neuron=gone, num_drop_attn_group=0),
            num_calibration_samples=len(task.ids),
            max_seq_length=task.ids.shape[1],
            save_compressed=True,
            output_dir="pruned",
        )
        # As its example does: up to here channels are zeros.
        pack("pruned", gone, 0, dense)
        cleanup_after_prune("pruned")
        return AutoModelForCausalLM.from_pretrained("pruned", torch_dtype=torch.float32)


PEERS = {
    "optipfair-static": Peer("optipfair", optipfair, sees_text=False),
    "optipfair-data": Peer("optipfair", optipfair_data, sees_text=True),
    "torch-pruning-magnitude": Peer("torch-pruning", torch_pruning_magnitude, sees_text=False),
    "torch-pruning-activation": Peer("torch-pruning", torch_pruning_activation, sees_text=True),
    "modelopt-independent": Peer("nvidia-modelopt", modelopt_independent, sees_text=True),
    "modelopt-iterative": Peer("nvidia-modelopt", modelopt_iterative, sees_text=True),
    "fmchisel-osscar": Peer("fmchisel", fmchisel_osscar, sees_text=True),
}


class Stages:
    """Minutes of the steps, and the greatest resident size of this process up to their ends, as our records have them.

    Attributes:
        rows: by the names of the steps.
    """

    def __init__(self):
        self.rows: dict[str, dict] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        start = time.perf_counter()
        yield
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # which Linux gives in KiB
        self.rows[name] = {
            "minutes": (time.perf_counter() - start) / 60,
            "host_bytes": peak,
            "device_bytes": None,
        }


def width_for(model: PreTrainedModel, sparsity: float, of: str) -> int:
    """Channels of every MLP that leave 1 - `sparsity` of the model's parameters, or of its layers': to the nearest.

    Every channel of all MLPs holds 3 L D parameters.

    Raises:
        ValueError: thinner MLPs cannot save so much.
    """
    counted = model if of == "model" else model.model.layers
    config = model.config
    gone = sparsity * sum(parameter.numel() for parameter in counted.parameters())
    width = round(config.intermediate_size - gone / (3 * config.num_hidden_layers * config.hidden_size))
    if width < 1:
        raise ValueError(f"MLPs alone cannot lose {sparsity:.0%} of the parameters")
    return width


def check_widths(model: PreTrainedModel, width: int) -> None:
    """Raise ValueError if a layer has not the width that was asked for."""
    found = {layer.mlp.down_proj.in_features for layer in model.model.layers}
    if found != {width}:
        raise ValueError(f"asked for MLPs of {width} channels, got {', '.join(map(str, sorted(found)))}")


def build_parser() -> argparse.ArgumentParser:
    """The peer, the model, the tokens and the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--tokens", type=Path, required=True, help="token file, as --datasets of model_pruning.py")
    parser.add_argument("--sparsity", type=float, required=True, help="share of the parameters that goes")
    parser.add_argument("--sparsity_of", default="model", choices=["model", "layers"], help="of what it is a share")
    parser.add_argument("--batch_size", type=int, default=16, help="samples at a time")
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the pruned model and its record")
    return parser


def main(args: argparse.Namespace) -> None:
    """Prune, check the widths, and write the model and, last, its record."""
    torch.manual_seed(0)
    peer, stages = PEERS[args.peer], Stages()
    ids = load_file(args.tokens)[IDS].long()
    with stages.stage("read"):
        model = AutoModelForCausalLM.from_pretrained(args.dense).eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    task = Task(args.dense, ids, width_for(model, args.sparsity, args.sparsity_of), args.batch_size)
    with stages.stage("prune"):
        model = peer.prune(model, task)
    check_widths(model, task.width)
    with stages.stage("write"):
        model.save_pretrained(args.output_path)
    for name in TOKENIZER_FILES:
        if (args.dense / name).is_file():
            shutil.copy(args.dense / name, args.output_path / name)
    source = {"name": args.tokens.name, "fingerprint": sha256(args.tokens.read_bytes()).hexdigest()}
    packages = {name: metadata.version(name) for name in ("torch", "transformers", peer.package)}
    record = {
        "kind": "pruning by a peer",
        "settings": {"recipe": args.peer, "sparsity": args.sparsity, "sparsity_of": args.sparsity_of},
        "package": f"{peer.package} {packages[peer.package]}",
        "intermediate_size": task.width,
        "parameters": {"before": before, "after": sum(parameter.numel() for parameter in model.parameters())},
        "calibration": {"ids": list(ids.shape), "sources": [source]} if peer.sees_text else None,
        "stages": stages.rows,
        "environment": {
            "python": platform.python_version(),
            "packages": packages,
            "platform": platform.platform(),
            "device": "cpu",
            "cpu_threads": torch.get_num_threads(),
        },
    }
    (args.output_path / "peer_run.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(build_parser().parse_args())
