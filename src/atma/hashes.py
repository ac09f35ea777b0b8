"""What a model, a file and this code are told by: SHA-256 of their bytes, in hexadecimal."""

import functools
import hashlib
from pathlib import Path

import torch
from torch import nn

from atma.config import canonical_json
from atma.folders import file_hash
from atma.model import Model

WEIGHTS = "model.safetensors"
SOURCES = (".py", ".cpp", ".h")


def config_hash(model: Model) -> str:
    """Of the configuration and of a selection policy: windows, bounds and caps move figures and are in no weight."""
    selection = "" if model.selection is None else f" {model.selection}"
    return hashlib.sha256(f"{canonical_json(model.config)}{selection}".encode()).hexdigest()


def model_hash(model: Model) -> str:
    """Of the weights in memory and the configuration: what a state belongs to."""
    return hashlib.sha256(f"{module_hash(model)} {config_hash(model)}".encode()).hexdigest()


def weights_hash(model: Model, folder: Path | str | None) -> str:
    """Of the folder's model.safetensors, or of names, types, shapes and bytes of the state dict without one."""
    if folder is not None and (file := Path(folder) / WEIGHTS).is_file():
        return file_hash(file)
    return module_hash(model)


def module_hash(module: nn.Module) -> str:
    """Of the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@functools.cache
def code_hash() -> str:
    """Of the names and bytes of this package's Python and C++ files: what ran, whatever its version says."""
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in SOURCES):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
