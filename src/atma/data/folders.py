"""The files below a folder, links to folders followed without running in circles, in the order of their names."""

import os
import re
from pathlib import Path

from atma.data.left_out import LeftOut
from atma.data.records import reader_of

SAVED = ("dataset_dict.json", "dataset_info.json")
"""Either marks a folder that a Hugging Face data set was saved to."""
_SPLITS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev)(?:ing)?(?=[-_./]|$)")


def files_below(root: Path, left_out: LeftOut, ignored: tuple[str, ...] = (), follow: bool = True) -> list[Path]:
    """Regular files, and folders of saved data sets, below a folder. Folders of an ignored name are not entered.

    Hidden files, links to nothing, links that lead in a circle and what is no regular file are noted as left out.
    """
    found: list[Path] = []
    seen: set[Path] = set()
    waiting = [root]
    while waiting:
        links: list[Path] = []
        for top in waiting:
            if top is not root and not _enter(top, root, seen, left_out):
                continue
            _walk(top, root, (seen, found, links), left_out, ignored)
        waiting = sorted(links) if follow else []  # folders that are here themselves are read under their own names
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def choose_split(root: Path, files: list[Path], split: str | None, left_out: LeftOut) -> list[Path]:
    """Where files of records are named by splits: those of one split, "train" if there is none asked for.

    ValueError: the split asked for is not there.
    """
    named = {path: found for path in files if (found := _split_of(path.relative_to(root).as_posix(), path))}
    if split is None and "train" not in named.values():
        return files
    wanted = _SPLITS.get(split or "train", split)
    if wanted not in named.values() and not any(path.is_dir() for path in files):
        known = ", ".join(sorted(set(named.values()))) or "none"
        raise ValueError(f"{root}: no files of a split '{split}'; splits by the names of files: {known}")
    for path, found in named.items():
        if found != wanted:
            left_out.file(_name(path, root), f"the split '{found}'", "of another split")
    return [path for path in files if named.get(path, wanted) == wanted]


def _walk(
    top: Path,
    root: Path,
    noted: tuple[set[Path], list[Path], list[Path]],
    left_out: LeftOut,
    ignored: tuple[str, ...],
) -> None:
    """Note the folders seen below `top`, its files, and its links to folders, which are not followed here."""
    seen, found, links = noted
    for folder, folders, names in os.walk(top, onerror=_raise):
        here = Path(folder)
        seen.add(here.resolve())
        if here != root and any(name in names for name in SAVED):
            found.append(here)
            folders.clear()
            continue
        for name in (name for name in [*folders, *names] if name.startswith(".")):
            left_out.file(_name(here / name, root), "hidden")
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ignored]
        links += [here / name for name in folders if (here / name).is_symlink()]
        for path in (here / name for name in names if not name.startswith(".")):
            if path.is_file():
                found.append(path)
            else:
                left_out.file(_name(path, root), "a link to nothing" if path.is_symlink() else "no regular file")


def _enter(link: Path, root: Path, seen: set[Path], left_out: LeftOut) -> bool:
    target = link.resolve()
    if root.resolve().is_relative_to(target):
        left_out.file(_name(link, root), "a link to a folder that it lies in", "links to folders that are read already")
    elif target in seen:
        left_out.file(_name(link, root), "a link to a folder that is read", "links to folders that are read already")
    else:
        return True
    return False


def _split_of(name: str, path: Path) -> str | None:
    if path.is_dir() or reader_of(path) is None:
        return None
    found: list[str] = _SPLIT.findall(name.lower())
    return _SPLITS.get(found[-1], "validation") if found else None


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error
