"""What a result was measured with: hashes of weights, tokenizer, data and code, and the settings that move figures."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

import atma
from atma.config import canonical_json
from atma.data.dataset import TokenSet
from atma.eval.loaded import Loaded, check_tokenizer, tokenizer_of
from atma.eval.stream import DEFAULT, Streaming
from atma.model import Model
from atma.ops import backend_for

WEIGHTS = "model.safetensors"
SOURCES = (".py", ".cpp", ".h")


def provenance(loaded: Loaded, token_set: TokenSet, seed: int, streaming: Streaming = DEFAULT) -> dict[str, Any]:
    """Plain JSON data for every result row. ValueError: the data is of another tokenizer than the model's."""
    tokenizer = tokenizer_of(loaded)
    check_tokenizer(token_set, tokenizer, loaded.path)
    if token_set.eot != tokenizer.eot:
        ids = f"id {token_set.eot}, the tokenizer's {tokenizer.eot}"
        raise ValueError(f"the data's end-of-text is {ids}; open the data with the tokenizer's")
    return model_provenance(loaded) | {"data_hash": token_set.hash, "seed": seed} | streaming._asdict()


def model_provenance(loaded: Loaded) -> dict[str, Any]:
    """What concerns the model alone, the code and the machine's arithmetic."""
    weight, config = next(loaded.model.parameters()), loaded.model.config
    return software() | {
        "weights_sha256": weights_hash(loaded.model, loaded.path),
        "model_config_sha256": config_hash(loaded.model),
        "tokenizer_sha256": tokenizer_of(loaded).hash(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": weight.device.type,
        "backend": backend_for(x=weight),
        "truncate": False,
        "model": Path(loaded.path).name if loaded.path else None,
        "core": config.core,
        "memory": config.memory,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
    }


def software() -> dict[str, Any]:
    """Versions, and the threads that computed."""
    return {
        "code_sha256": code_hash(),
        "version": atma.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def config_hash(model: Model) -> str:
    """SHA-256 of the configuration: windows, bounds and caps move figures and are in no weight."""
    return hashlib.sha256(canonical_json(model.config).encode()).hexdigest()


def model_hash(model: Model) -> str:
    """SHA-256 of the weights in memory and the configuration: what a state belongs to."""
    return hashlib.sha256(f"{module_hash(model)} {config_hash(model)}".encode()).hexdigest()


def weights_hash(model: Model, folder: Path | str | None) -> str:
    """SHA-256 of the folder's model.safetensors, or of names, types, shapes and bytes of the state dict without one."""
    if folder is not None and (file := Path(folder) / WEIGHTS).is_file():
        return file_hash(file)
    return module_hash(model)


def module_hash(module: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_hash() -> str:
    """SHA-256 of the names and bytes of this package's Python and C++ files: what ran, whatever its version says."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in SOURCES):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()
