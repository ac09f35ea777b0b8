"""Folders on disk that are either whole or not there: models, and the base of training checkpoints.

A model folder holds `config.json`, `model.safetensors`, `tokenizer.json` and `manifest.json` with the size and SHA-256
of each, and beside them what Hugging Face's libraries read (atma.hub_files), which nothing here reads or vouches for.
It is written beside its final place, forced to the disk and renamed, so that a crash or a full disk leaves what was
there before. Reading checks everything and says in one line which file is wrong and how. No pickle.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atma.config import ModelConfig
from atma.disk import destination, sync
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
from atma.replacing import OURS, recover_folder, staging_place, swap
from atma.strict import from_dict, to_dict
from atma.talk import talk_of
from atma.tokenizer_file import BEGINNING
from atma.weights import is_shard, load_weights, tensor_writer, weight_files

if TYPE_CHECKING:
    from atma.model import Model
    from atma.tokenizer import Tokenizer

Writer = Callable[[Path], object]
FORMAT = "atma-1"
MANIFEST = "manifest.json"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", MANIFEST, *SIDE_FILES, TEMPLATE, *OURS)
_VOUCHED = (*_FILES[:3], "optimizer.safetensors", "state.json")


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
    config = {"format": FORMAT, **class_keys(), "model": to_dict(model.config), "extra": dict(extra or {})}
    files = {"model.safetensors": tensor_writer(_own(model)), SHIM: text_writer(SHIM_TEXT)}
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

    ValueError names the file and what is wrong with it.
    """
    from atma.layers import without_init
    from atma.model import Model
    from atma.tokenizer import load_tokenizer

    folder = Path(folder)
    config = load_config(folder)
    if (folder / MANIFEST).exists():
        verify_folder(folder)
    with without_init():
        model = Model(config).to(dtype)
    fill_model(model, load_weights(folder), weight_files(folder)[0])
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
    if values.get("format") != FORMAT:
        found = values.get("format")
        raise ValueError(
            f"{folder / 'config.json'}: format {found!r}, not '{FORMAT}'; import it: `atma import hf:{folder} OUT` if "
            f"it is of transformers, `atma import {folder} OUT` if it is a published one"
        )
    return values


def fill_model(model: "Model", tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors`, read from `path`, into the model; ValueError when a name or shape differs from its config."""
    own = _own(model)
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
    tensors = model.state_dict(keep_vars=True)
    names = {id(value): name for name, value in reversed(tensors.items())}
    return {name: value.detach() for name, value in tensors.items() if names[id(value)] == name}


def write_folder(folder: str | Path, files: Mapping[str, Writer]) -> None:
    """Make `folder` hold exactly `files` (name to the function that writes that path) and a manifest of their hashes.

    Side files are not in the manifest: whoever owns a folder may edit them.

    Until the last rename the old folder stays as it is; a failed write removes the half-made one and raises OSError.
    """
    folder = destination(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    staging = staging_place(folder, "staging")
    _remove(staging)
    staging.mkdir()
    try:
        _fill(staging, files)
        swap(staging, folder)
    except OSError as error:
        _remove(staging)
        raise OSError(f"{folder}: cannot be written, what was there stays as it was: {reason(error)}") from error
    except BaseException:
        _remove(staging)
        raise


def verify_folder(folder: Path) -> None:
    """Compare files with the folder's manifest; ValueError names one that is unlisted, missing, short or changed."""
    listed = read_json(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        raise ValueError(f"{folder / MANIFEST}: no table 'files'")
    unlisted = next((name for name in _VOUCHED if name not in listed and (folder / name).exists()), None)
    if unlisted is not None:
        raise ValueError(f"{folder / unlisted}: {MANIFEST} does not list it, so nothing vouches for it")
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {MANIFEST} lists it")
        if path.stat().st_size != entry.get("bytes"):
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, {MANIFEST} says {entry.get('bytes')}: truncated or replaced"
            )
        if file_hash(path) != entry.get("sha256"):
            raise ValueError(f"{path}: contents differ from the SHA-256 in {MANIFEST}: damaged or replaced")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError when it is missing, unreadable or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, truncated or damaged: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_writer(text: str) -> Writer:
    """A writer of a text."""
    return lambda path: path.write_text(text, encoding="utf-8")


def json_writer(values: Mapping[str, Any]) -> Writer:
    """A writer of `values` as indented JSON."""
    return text_writer(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _fill(staging: Path, files: Mapping[str, Writer]) -> None:
    entries = {}
    for name, write in files.items():
        path = staging / name
        write(path)
        sync(path)
        if name not in SIDE_FILES:
            entries[name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    json_writer({"files": entries})(staging / MANIFEST)
    sync(staging / MANIFEST)
    sync(staging)


def reason(error: OSError) -> str:
    """Why the disk refused, without the name of the file that was being filled, which is gone afterwards."""
    return error.strerror or str(error).rpartition("I/O error: ")[2]


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
