"""Writing weights: the one place that calls safetensors' and the libraries' writers.

safetensors makes its files under a temporary name that only the owner may read, and leaves that mode in place (0600,
whatever the umask says), so colleagues and inference servers could not read a trained network.
"""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a .safetensors file with the mode of any other new file. Raises OSError on a full disk."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    give_usual_modes(path)


def save_pretrained(module: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a network of diffusers or transformers as its folder: config.json and .safetensors files."""
    module.save_pretrained(folder, safe_serialization=True)
    give_usual_modes(*Path(folder).glob("*.safetensors"))


def give_usual_modes(*paths: Path) -> None:
    """Gives files, all of one folder, the mode that a new file gets there, by the umask or the folder's default ACL.

    A new file is made to see that mode: asking for the umask means setting it, for all threads of the process.
    """
    if not paths:
        return
    probe = paths[0].with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        probe.touch()
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)
    for path in paths:
        path.chmod(mode)
