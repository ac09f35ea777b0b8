"""Folders on disk that are either whole or not there, with a manifest of the size and SHA-256 of each file.

A folder is filled beside its final place, forced to the disk and renamed, so that a crash or a full disk leaves what
was there before. Reading checks everything and says in one line which file is wrong and how.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atma.disk import destination, sync
from atma.hub_files import SIDE_FILES
from atma.replacing import recover_folder, staging_place, swap
from atma.weights import is_part

Writer = Callable[[Path], object]
MANIFEST = "manifest.json"
_VOUCHED = ("config.json", "model.safetensors", "tokenizer.json", "optimizer.safetensors", "state.json")


def write_folder(folder: str | Path, files: Mapping[str, Writer]) -> None:
    """Make `folder` hold exactly `files` (name to the function that writes that path) and a manifest of their hashes.

    Side files are not in the manifest: whoever owns a folder may edit them.

    Until the last rename the old folder stays as it is; a failed write removes the half-made one and raises OSError.
    """
    folder = destination(folder)
    staging = begin_folder(folder)
    with abandoned(staging, folder):
        end_folder(staging, folder, fill_folder(staging, files))


def begin_folder(folder: Path) -> Path:
    """An empty folder in which what will replace `folder` (a `destination`) is to be filled."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    staging = staging_place(folder, "staging")
    _remove(staging)
    staging.mkdir()
    return staging


def fill_folder(staging: Path, files: Mapping[str, Writer]) -> dict[str, dict[str, Any]]:
    """Write files safely to the disk; what the manifest says of each."""
    entries = {}
    for name, write in files.items():
        path = staging / name
        write(path)
        sync(path)
        if name not in SIDE_FILES:
            entries[name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    return entries


def end_folder(staging: Path, folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest, and put the filled folder in the place of `folder`."""
    json_writer({"files": entries})(staging / MANIFEST)
    sync(staging / MANIFEST)
    sync(staging)
    swap(staging, folder)


@contextlib.contextmanager
def abandoned(staging: Path, folder: Path) -> Iterator[None]:
    """Inside, what ends the filling of a folder removes what there is of it. OSError names `folder`."""
    try:
        yield
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
    found = [name for name in _VOUCHED if (folder / name).exists()]
    found += sorted(path.name for path in folder.iterdir() if is_part(path.name))
    unlisted = next((name for name in found if name not in listed), None)
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


def reason(error: OSError) -> str:
    """Why the disk refused, without the name of the file that was being filled, which is gone afterwards."""
    return error.strerror or str(error).rpartition("I/O error: ")[2]


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)
