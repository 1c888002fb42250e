"""Files of tensors, written as other files are."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file of safetensors, readable for whom the umask says.

    safetensors itself makes files that only their owner reads, and puts one in the place of what is there.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)
