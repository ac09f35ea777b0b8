"""Model folders, written and read as atma.folders has it: the base of training checkpoints too. No pickle.

A model folder holds `config.json`, `model.safetensors`, `tokenizer.json` and `manifest.json` with the size and SHA-256
of each, and beside them what Hugging Face's libraries read (atma.hub_files), which nothing here reads or vouches for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.folders import MANIFEST, Writer, json_writer, read_json, text_writer, verify_folder, write_folder
from atma.hub_files import (
    SHIM,
    SHIM_TEXT,
    SIDE_FILES,
    TEMPLATE,
    TOKENIZER_CONFIG,
    class_keys,
    token_keys,
    tokenizer_settings,
)
from atma.narrow import CODES, SCALE, narrow_layers, width_in
from atma.narrow_file import as_floats, codes_in, put_in, tensors_of, without
from atma.replacing import OURS, recover_folder
from atma.strict import from_dict, to_dict
from atma.talk import talk_of
from atma.tokenizer_file import BEGINNING
from atma.weights import TensorWriter, is_shard, load_weights, weight_files

if TYPE_CHECKING:
    from atma.model import Model
    from atma.tokenizer import Tokenizer

FORMAT = "atma-1"
NARROW_FORMAT = "atma-1-narrow"
"""Of a folder whose large weights are in 8 or 4 bits, which "weights" names: versions that cannot read it refuse it."""
_FILES = ("config.json", "model.safetensors", "tokenizer.json", MANIFEST, *SIDE_FILES, TEMPLATE, *OURS)


def save_model(
    folder: str | Path, model: "Model", tokenizer: "Tokenizer | None", extra: Mapping[str, Any] | None = None
) -> None:
    """Write a model folder, replacing an older one at once. `extra` is JSON data for "extra" in config.json.

    OSError when the disk refuses; the older folder is then untouched. ValueError, before anything is written, when
    `folder` is a file or holds anything that is not of a model: it would be lost. A chat template there stays, and with
    the same tokenizer all that it says of turns and their ends; of an older "extra", such as what `atma export` needs
    of an imported model, only what is given again.
    """
    require_replaceable(Path(folder))
    write_folder(folder, model_files(model, tokenizer, extra) | _talk(Path(folder), tokenizer))


def model_files(
    model: "Model", tokenizer: "Tokenizer | None", extra: Mapping[str, Any] | None = None
) -> dict[str, Writer]:
    """The writers of a model folder's files, for `write_folder`. What is tied, as a head may be, is written once."""
    width = width_in(model)
    told = {"format": FORMAT, **class_keys()} if width is None else {"format": NARROW_FORMAT, "weights": width}
    config = {**told, "model": to_dict(model.config), "extra": dict(extra or {})}
    files: dict[str, Writer] = {"model.safetensors": TensorWriter(_own(model))}
    if width is None:  # transformers reads floats alone
        files[SHIM] = text_writer(SHIM_TEXT)
    if tokenizer is not None:
        config |= token_keys(tokenizer)
        if tokenizer.end_to_record:
            config["end_of_text"] = tokenizer.end_to_record
        if tokenizer.beginning != (tokenizer.eot,):
            config[BEGINNING] = list(tokenizer.beginning)
        files["tokenizer.json"] = lambda path: tokenizer.save(path, begun=True)
        files[TOKENIZER_CONFIG] = json_writer(tokenizer_settings(tokenizer))
    return {"config.json": json_writer(config), **files}


def _talk(folder: Path, tokenizer: "Tokenizer | None") -> dict[str, Writer]:
    """The writers of what a folder says of how it is talked to, which stays when its model is replaced.

    With another tokenizer these are its chat templates alone: what else such files say is of tokens.
    """
    found = talk_of(folder)
    if not found or (tokenizer is not None and _has(folder, tokenizer)):
        return {name: text_writer(text) for name, text in found.items()}
    kept: dict[str, Writer] = {TEMPLATE: text_writer(found[TEMPLATE])} if TEMPLATE in found else {}
    template = read_json(folder / TOKENIZER_CONFIG).get("chat_template") if TOKENIZER_CONFIG in found else None
    if template is not None and tokenizer is not None:
        kept[TOKENIZER_CONFIG] = json_writer({**tokenizer_settings(tokenizer), "chat_template": template})
    return kept


def _has(folder: Path, tokenizer: "Tokenizer") -> bool:
    """Whether a folder's tokenizer is this one; one that cannot be read is not."""
    from atma.tokenizer import load_tokenizer

    try:
        found = load_tokenizer(folder)
    except ValueError:
        return False
    return (found.hash(), found.eot) == (tokenizer.hash(), tokenizer.eot)


def require_replaceable(folder: Path) -> None:
    """ValueError unless `folder` may become a model folder: nothing is there, or nothing but a model's files."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a folder to write to")
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    others = [name for name in found if name not in _FILES and not is_shard(name)]
    if others:
        raise ValueError(f"{folder}: holds something other than a model ('{others[0]}'); name a new folder")


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> "tuple[Model, Tokenizer | None]":
    """The model (on the CPU, in `dtype`) and tokenizer of a model folder, checked against its manifest if it has one.

    Of a folder with narrow weights these are floats too, the numbers that its 8 or 4 bits stand for, to be trained or
    converted; `load_narrow` has them as they are. ValueError names the file and what is wrong with it.
    """
    return _load(folder, dtype, narrow=False)


def load_narrow(folder: str | Path, dtype: torch.dtype = torch.float32) -> "tuple[Model, Tokenizer | None]":
    """`load_model`, but narrow weights stay as narrow as they are saved."""
    return _load(folder, dtype, narrow=True)


def _load(folder: str | Path, dtype: torch.dtype, narrow: bool) -> "tuple[Model, Tokenizer | None]":
    from atma.layers import without_init
    from atma.model import Model
    from atma.tokenizer import load_tokenizer

    folder = Path(folder)
    config = load_config(folder)
    if (folder / MANIFEST).exists():
        verify_folder(folder)
    with without_init():
        model = Model(config).to(dtype)
    tensors, path = load_weights(folder), weight_files(folder)[0]
    codes = codes_in(tensors, {name: value.shape for name, value in _own(model).items()}, path)
    if narrow:
        put_in(model, codes)
    fill_model(model, without(tensors, codes) | ({} if narrow else as_floats(codes)), path)
    path = folder / "tokenizer.json"
    if not path.exists():
        return model, None
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: {tokenizer.vocab_size} tokens, but config.json has vocab_size {config.vocab_size}: "
            "the tokenizer of another model"
        )
    return model, tokenizer


def load_config(folder: str | Path) -> ModelConfig:
    """The model configuration of a model folder."""
    values, where = load_info(folder).get("model"), Path(folder) / "config.json"
    if not isinstance(values, dict):
        raise ValueError(f"{where}: no table 'model': not a model folder of atma")
    try:
        return from_dict(ModelConfig, values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def load_info(folder: str | Path) -> dict[str, Any]:
    """All of config.json: "format", "model" and "extra" (what was saved beside the model)."""
    folder = Path(folder)
    recover_folder(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    values = read_json(folder / "config.json")
    if values.get("format") not in (FORMAT, NARROW_FORMAT):
        found = values.get("format")
        raise ValueError(
            f"{folder / 'config.json'}: format {found!r}, not '{FORMAT}'; import it: `atma import hf:{folder} OUT` if "
            f"it is of transformers, `atma import {folder} OUT` if it is a published one"
        )
    return values


def fill_model(model: "Model", tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors`, read from `path`, into the model; ValueError when a name or shape differs from its config."""
    own = _floats(model)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing:
        raise ValueError(
            f"{path}: tensor '{missing[0]}' is missing ({len(missing)} in all): not the weights of this config"
        )
    if unexpected:
        raise ValueError(
            f"{path}: unexpected tensor '{unexpected[0]}' ({len(unexpected)} in all): weights of another config"
        )
    for name, value in own.items():
        if tensors[name].shape != value.shape:
            found, wanted = tuple(tensors[name].shape), tuple(value.shape)
            raise ValueError(f"{path}: tensor '{name}' is {found}, the config says {wanted}: weights of another config")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{path}: tensor '{name}' is {tensors[name].dtype}, not a floating type")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def _own(model: "Model") -> dict[str, Tensor]:
    """A model's tensors by name, one that has several by its first: a tied head is the embedding."""
    return _floats(model) | tensors_of(model)


def _floats(model: "Model") -> dict[str, Tensor]:
    """Those but for narrow weights."""
    tensors = model.state_dict(keep_vars=True)
    for name in narrow_layers(model):
        del tensors[f"{name}.weight{CODES}"], tensors[f"{name}.weight{SCALE}"]
    names = {id(value): name for name, value in reversed(tensors.items())}
    return {name: value.detach() for name, value in tensors.items() if names[id(value)] == name}
