"""The files of a checkpoint of transformers: config.json, weights whole or in shards, and what its tokenizer says."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from atma.folders import read_json
from atma.weights import INDEX, WEIGHTS, load_tensors, tensor_shapes

OLDER = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_COMPUTED = ".rotary_emb.inv_freq"
"""The end of names that older files have beside the weights, and that are computed."""


class Checkpoint(NamedTuple):
    """What a folder holds."""

    config: dict[str, Any]
    files: dict[str, str]
    """The file of each tensor."""
    tensors: dict[str, Tensor]
    """Each as it is stored."""


def read_checkpoint(folder: Path) -> Checkpoint:
    """A folder of transformers. ValueError: no such folder, a missing or damaged file, weights of no safetensors."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one with config.json and model.safetensors")
    config = read_json(folder / "config.json")
    files = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        found = load_tensors(folder / file)
        tensors |= {name: tensor for name, tensor in found.items() if not name.endswith(_COMPUTED)}
    if missing := files.keys() - tensors.keys():
        raise ValueError(f"{folder / files[min(missing)]}: lacks '{min(missing)}', which {INDEX} says is in it")
    if unlisted := tensors.keys() - files.keys():
        raise ValueError(f"{folder / INDEX}: does not list '{min(unlisted)}', which one of its files has")
    return Checkpoint(config, files, tensors)


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
    if (folder / WEIGHTS).is_file():
        names = tensor_shapes(folder / WEIGHTS)
        return {name: WEIGHTS for name in names if not name.endswith(_COMPUTED)}
    older = next((name for name in OLDER if (folder / name).exists()), None)
    if older:
        raise ValueError(
            f"{folder / older}: weights as a pickle, which atma does not read; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise ValueError(f"{folder / WEIGHTS}: missing, and no {INDEX} either")


__all__ = ["Checkpoint", "read_checkpoint"]
