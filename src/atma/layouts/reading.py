"""The files of a checkpoint of transformers: config.json, weights whole or in shards, and what its tokenizer says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from atma.checkpoint import read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLDER = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_COMPUTED = ".rotary_emb.inv_freq"
"""The end of names that older files have beside the weights, and that are computed."""


class Checkpoint(NamedTuple):
    """What a folder holds."""

    config: dict[str, Any]
    files: dict[str, str]
    """The file of each tensor."""
    tensors: dict[str, Tensor]
    """Each as it is stored, mapped from its file and read when it is used."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """A folder of transformers. ValueError: no such folder, a missing or damaged file, weights of no safetensors."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one with config.json and model.safetensors")
    config = read_json(folder / "config.json")
    files = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        tensors |= dict(_tensors(folder / file))
    missing = sorted(files.keys() - tensors.keys())
    if missing:
        raise ValueError(f"{folder / files[missing[0]]}: lacks '{missing[0]}', which {INDEX} says is in it")
    return Checkpoint(config, {name: files[name] for name in tensors}, tensors)


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor; of a file without an index every one that it has."""
    if (folder / INDEX).exists():
        found = read_json(folder / INDEX).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError(f"{folder / INDEX}: no table 'weight_map'")
        for file in sorted(set(found.values())):
            if Path(file).name != file:
                raise ValueError(f"{folder / INDEX}: names '{file}', which is no file of this folder")
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file}: missing, though {INDEX} names it; copy every shard")
        return {name: file for name, file in found.items() if not name.endswith(_COMPUTED)}
    if (folder / WHOLE).is_file():
        return {name: WHOLE for name, _ in _tensors(folder / WHOLE)}
    older = next((name for name in OLDER if (folder / name).exists()), None)
    if older:
        raise ValueError(
            f"{folder / older}: weights as a pickle, which atma does not read; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{folder / WHOLE}: missing, and no {INDEX} either")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.endswith(_COMPUTED):
                    yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


__all__ = ["INDEX", "WHOLE", "Checkpoint", "read_checkpoint"]
