"""Files of tensors: safetensors, read and written with errors of one line, and which of a folder's hold its weights.

A folder has one `model.safetensors`, or, as transformers writes large models, several files and an index that names
the file of each tensor.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PART = re.compile(r"[a-z]+-\d{5}-of-\d{5}\.safetensors")


def is_shard(name: str) -> bool:
    """Whether a file of this name is a part of a model's weights, or the index of the parts."""
    return name == INDEX or _SHARD.fullmatch(name) is not None


def is_part(name: str) -> bool:
    """Whether a file of this name is a part of any tensors, or the index of the parts of weights."""
    return name == INDEX or _PART.fullmatch(name) is not None


def part_name(stem: str, number: int, count: int) -> str:
    """The file name of a part, numbered from 0: `model-00001-of-00004.safetensors`."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder; `model.safetensors`, though it be missing, where no index says more.

    ValueError: an index that cannot be read, or names what is no part.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of weights, truncated or damaged: {error!r}") from None
    bad = next((name for name in names if not isinstance(name, str) or not _SHARD.fullmatch(name)), None)
    if bad is not None or not names:
        raise ValueError(f"{index}: names {bad!r}, which is no part of a model's weights")
    return [folder / name for name in names]


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU; ValueError when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weights, whole or in shards. ValueError as for `weight_files` and `load_tensors`."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_tensors(file).items()}


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file, from its head alone; ValueError when missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


class TensorWriter(NamedTuple):
    """Writes tensors as safetensors; a refusal of the disk becomes an OSError that names the file."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str] | None = None

    def __call__(self, path: Path) -> None:
        whole = {name: value.detach().to("cpu").contiguous() for name, value in self.tensors.items()}
        try:
            save_file(whole, path, None if self.notes is None else dict(self.notes))
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None
