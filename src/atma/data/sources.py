"""Where documents come from: files, folders, records, tables, Hugging Face data sets, the Python standard library.

`documents` turns any of them into one stream of (name, text), in an order that depends on nothing but the source, and
leaves out exact duplicates and empty texts. What it left out it notes, file by file, so that a manifest can say so.
"""

import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atma.data.folders import SAVED, choose_split, files_below
from atma.data.left_out import Document, LeftOut, NoField, readable
from atma.data.records import reader_of, rows_of
from atma.data.streams import COMPRESSED, read_text

__all__ = ["HUB", "STDLIB", "Document", "LeftOut", "describe", "documents", "size_of"]

STDLIB = "stdlib"
HUB = "hf:"
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2", ".tar.zst", ".7z", ".rar")


def documents(
    source: str | Path, field: str = "text", left_out: LeftOut | None = None, split: str | None = None
) -> Iterator[Document]:
    """Every distinct, non-empty document of a source, in a fixed order.

    source: "stdlib"; "hf:NAME[:CONFIG][:SPLIT]" for a data set of the hub (split "train" if left out); a folder written
    by `save_to_disk`; any other folder, read recursively; or a file, see docs/data.md. field: the key or column that
    holds the text, with dots for a key within a key. split: which split, where a source has several.
    left_out: notes what is passed over. ValueError for a source that is missing, empty of text, damaged, binary where
    text was named, or without the field or split.
    """
    left_out = LeftOut() if left_out is None else left_out
    seen: set[bytes] = set()
    for document in _every_document(source, field, left_out, split):
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        reason = "empty" if not document.text.strip() else "duplicate" if digest in seen else None
        if reason:
            left_out.row(reason)
            continue
        seen.add(digest)
        yield document
    if not seen:
        told = left_out.told()
        lacking = next((why for why in left_out.files.values() if why.startswith(("no field", "no column"))), "")
        raise ValueError(f"{source}: no text in it{told and f' (left out: {told})'}{lacking and f'; {lacking}'}")


def describe(source: str | Path) -> str:
    """The source in words for a manifest."""
    if str(source) == STDLIB:
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return readable(str(source))


def size_of(source: str | Path) -> int | None:
    """Bytes of a source's files, of which texts are the most; None where they are compressed, or not files."""
    path = Path(source)
    if str(source) == STDLIB or str(source).startswith(HUB) or not path.exists():
        return None
    files = files_below(path, LeftOut()) if path.is_dir() else [path]
    if any(one.is_dir() or one.name.lower().endswith((*COMPRESSED, *ARCHIVES, ".parquet")) for one in files):
        return None
    return sum(one.stat().st_size for one in files)


def _every_document(source: str | Path, field: str, left_out: LeftOut, split: str | None) -> Iterator[Document]:
    if str(source).startswith(HUB):
        return _hub(str(source), field, left_out, split)
    path = Path(source)
    if str(source) != STDLIB and path.is_dir() and not any((path / name).is_file() for name in SAVED):
        return _folder(path, field, left_out, split)
    if str(source) != STDLIB and path.is_dir():
        return _saved_dataset(path, path.name, field, left_out, split)
    if str(source) != STDLIB and not path.exists():
        raise ValueError(f"{source}: no such file or folder; to mean a Hugging Face dataset write hf:{source}")
    if split is not None:
        raise ValueError(f"{source}: has no splits, so '{split}' cannot be chosen; leave --split out")
    if str(source) == STDLIB:
        return _standard_library(left_out)
    return _file(path, path.name, field, left_out)


def _standard_library(left_out: LeftOut) -> Iterator[Document]:
    """The .py files of the running interpreter's library that are UTF-8, its tests included where installed."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in files_below(root, LeftOut(), ("site-packages", "dist-packages", "__pycache__"), follow=False):
        if path.suffix == ".py":
            yield from _text_or_skip(path, path.relative_to(root).as_posix(), left_out)


def _folder(root: Path, field: str, left_out: LeftOut, split: str | None) -> Iterator[Document]:
    for path in choose_split(root, files_below(root, left_out), split, left_out):
        name = path.relative_to(root).as_posix()
        reader = reader_of(path)
        if path.is_dir():
            yield from _saved_dataset(path, name, field, left_out, split)
        elif reader is None:
            yield from _text_or_skip(path, name, left_out)
        else:
            try:
                yield from reader(path, name, field, left_out)
            except NoField as error:
                why = str(error).partition(": ")[2]
                left_out.file(name, why, f"without '{field}'")


def _file(path: Path, name: str, field: str, left_out: LeftOut) -> Iterator[Document]:
    reader = reader_of(path)
    if reader is not None:
        yield from reader(path, name, field, left_out)
        return
    if name.lower().endswith(ARCHIVES):
        raise ValueError(f"{path}: an archive; unpack it and give the folder")
    text = read_text(path)
    if text is None:
        raise ValueError(f"{path}: not a text file (it is not UTF-8, or holds a NUL byte)")
    if not text:
        raise ValueError(f"{path}: the file is empty")
    yield Document(name, text)


def _text_or_skip(path: Path, name: str, left_out: LeftOut) -> Iterator[Document]:
    if name.lower().endswith(ARCHIVES):
        left_out.file(name, "an archive, which is not unpacked", "archives")
        return
    text = read_text(path)
    if text is None:
        left_out.file(name, "binary")
    elif not text.strip():
        left_out.file(name, "empty")
    else:
        yield Document(name, text)


def _hub(source: str, field: str, left_out: LeftOut, chosen: str | None) -> Iterator[Document]:
    """A dataset of the hub, streamed: nothing of it is kept on the disk."""
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    if chosen is not None and rest:
        raise ValueError(f"{source}: names its split already; leave --split out")
    split = rest[-1] if rest else chosen or "train"
    config = rest[0] if len(rest) == 2 else None
    rows = _loaded(source, lambda library: library.load_dataset(name, config, split=split, streaming=True))
    return rows_of(rows, source, field, left_out)


def _saved_dataset(path: Path, name: str, field: str, left_out: LeftOut, split: str | None) -> Iterator[Document]:
    """The rows of a saved data set; of one with splits, those of `split`, or else "train", and never of the others."""
    dataset = _loaded(path, lambda library: library.load_from_disk(str(path)))
    if not isinstance(dataset, dict):
        if split is not None:
            raise ValueError(f"{path}: has no splits, so '{split}' cannot be chosen; leave --split out")
        yield from rows_of(dataset, name, field, left_out)
        return
    wanted = split or "train"
    if wanted not in dataset:
        known = ", ".join(sorted(dataset))
        raise ValueError(f"{path}: no split '{wanted}'; it has {known}: name one with --split")
    for other in sorted(dataset):
        if other != wanted:
            left_out.file(f"{name}:{other}", f"the split '{other}'", "of another split")
    yield from rows_of(dataset[wanted], f"{name}:{wanted}", field, left_out)


def _loaded(source: str | Path, load: Callable[[Any], Any]) -> Any:
    """What `load` does with the library of data sets. ValueError: there is no library, or it cannot."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{source}: reading Hugging Face datasets needs `pip install 'atma-lm[hf]'`") from None
    try:
        return load(datasets)
    except Exception as error:  # of whatever kind the library and what it reads with may raise for damaged data
        raise ValueError(f"{source}: not a data set that can be read: {type(error).__name__}: {error}") from None
