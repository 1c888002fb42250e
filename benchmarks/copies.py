"""What the benchmarks of choices share: copies of a model, pruned in several ways and measured on the same windows."""

import argparse
import copy
from dataclasses import asdict
from os.path import expanduser
from pathlib import Path

import torch

from olica.checks import check_record_path
from olica.errors import UsageError
from olica.evaluation.perplexity import perplexity, token_windows
from olica.machine import DEVICES, BatchSize, pick_device
from olica.methods.recipe import Findings, Method
from olica.methods.sizes import Budget, Sizes
from olica.model.skeleton import count_parameters
from olica.outputs.records import environment, flags_of, write_record
from olica.pruning.layers import prune_layers
from olica.pruning.options import PruningOptions, Work
from olica.pruning.progress import Progress, SurveyProgress
from olica.pruning.survey import survey_layers
from olica.sources.calibration_set import Draw, build_calibration_set
from olica.sources.configuration import describe_source, read_config, refuse_unprunable
from olica.sources.dense_model import DenseModel
from olica.sources.locate import locate
from olica.sources.text_sources import evaluation_text
from olica.sources.tokenizers import read_tokenizer
from olica.sources.weights import DTYPES, read_model

BATCH_SIZE = 16


def add_flags(parser: argparse.ArgumentParser, one_text: bool = True) -> None:
    """The flags that every such benchmark has; with `one_text` also those of its calibration set."""
    parser.add_argument("--base_model", default="smollm2", help="dense model: name, hub id, folder or .gguf file")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder searched first for texts")
    if one_text:
        parser.add_argument("--datasets", required=True, help="calibration texts joined by +, or one token file")
        parser.add_argument("--num_samples", type=int, default=128, help="samples drawn from each text")
    parser.add_argument("--ppl", required=True, help="texts of the perplexity, names or paths joined by commas")
    parser.add_argument("--ppl_windows", type=int, default=256, help="windows of 128 tokens, of each text")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="to run in; auto: as stored")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to run")
    parser.add_argument("--output_path", type=Path, help="file of the record")


class Copies:
    """Pruned copies of a model that is in memory.

    Attributes:
        sizes: of all dense layers.
        record: of everything measured so far.
    """

    def __init__(self, kind: str, args: argparse.Namespace):
        """Open the model that `args` name and draw the calibration set, if they name one; see `add_flags`.

        Raises:
            UsageError: a flag names what cannot be read or written.
        """
        if args.output_path:
            check_record_path(args.output_path, "--output_path")
        self._path = args.output_path
        location, self._device = locate(args.base_model), pick_device(args.device)
        config, tokenizer = read_config(location), read_tokenizer(location)
        refuse_unprunable(config, location)
        if tokenizer is None:
            raise UsageError(f"--base_model {args.base_model}: the folder has no tokenizer, which the windows need")
        self.sizes = Sizes.of_all(config)
        self._data_dir, self._tokenizer, self._vocabulary = args.data_dir, tokenizer, config.vocab_size
        calibration = self.calibrate_on(args.datasets, Draw(args.num_samples)) if "datasets" in args else {}
        self._windows = {}
        for name in args.ppl.split(","):
            text, _ = evaluation_text(expanduser(name), args.data_dir, flag="--ppl")
            self._windows[Path(name).name] = token_windows(tokenizer, text, 128, args.ppl_windows)
        self._options = PruningOptions(BatchSize(BATCH_SIZE), self._device, self._device)
        self._dense = read_model(location, args.dtype)
        self.record = {
            "kind": kind,
            "settings": flags_of(args),
            "model": describe_source(location, config),
            "calibration": calibration,
            "dense": {"parameters": count_parameters(self._dense)},
            "points": [],
            "environment": environment(self._device),
        }

    def calibrate_on(self, datasets: str, draw: Draw) -> dict:
        """Draw another calibration set; returns what is said of it in records.

        Raises:
            UsageError: a text cannot be read.
        """
        self._calibration = build_calibration_set(
            datasets,
            self._tokenizer,
            draw,
            data_dir=self._data_dir,
            cache_dir=self._data_dir / "calibration",
            vocab_size=self._vocabulary,
        )
        drawn = self._calibration
        return {"sources": drawn.sources, "token_hash": drawn.token_hash, "ids": list(drawn.ids.shape)}

    def measure_dense(self) -> None:
        """Measure the dense model, for the record."""
        self.record["dense"]["perplexity"] = self._measure(self._dense)
        self._dense.to("cpu")

    @property
    def parameters(self) -> dict[str, int]:
        """Of the dense model: `total`, and those of its `decoder_layers`."""
        return self.record["dense"]["parameters"]

    @property
    def dense(self) -> dict[str, dict]:
        """Perplexities of the dense model, when they are measured."""
        return self.record["dense"]["perplexity"]

    def survey(self, method: Method) -> list[Findings]:
        """The findings of a method whose survey, if it has one, reads no plan."""
        if method.survey is None:
            return [{} for _ in self.sizes]
        work = Work(DenseModel(self._dense), self._calibration.ids, method, self._options)
        return survey_layers(work, None, SurveyProgress())

    def prune_and_measure(self, method: Method, budget: Budget, findings: list[Findings], **about) -> dict:
        """Prune a copy; returns, and adds to the record, what is said `about` it, its sizes and its perplexities."""
        plan = method.allocate(self.sizes, budget, findings)
        model = copy.deepcopy(self._dense)
        prune_layers(Work(DenseModel(model), self._calibration.ids, method, self._options), plan, findings, Progress())
        point = about | {
            "plan": [shape.to_dict() for shape in plan],
            "parameters": count_parameters(model),
            "perplexity": self._measure(model),
        }
        self.record["points"].append(point)
        if self._path:  # after every point: the next one may be stopped
            write_record(self._path, self.record)
        return point

    @property
    def names(self) -> list[str]:
        """The texts that are measured."""
        return list(self._windows)

    @torch.no_grad()
    def _measure(self, model) -> dict[str, dict]:
        """Perplexity of every text, each with the negative log-likelihood of every window."""
        model = model.to(self._device)
        return {name: asdict(perplexity(model, ids, BATCH_SIZE)) for name, ids in self._windows.items()}
