"""Where documents come from: files, folders, jsonl, parquet, Hugging Face datasets, the Python standard library.

`documents` turns any of them into one stream of (name, text), in an order that depends on nothing but the source, and
leaves out exact duplicates and empty texts. What it left out it counts, so that a manifest can say so.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STDLIB = "stdlib"
HUB = "hf:"


class Document(NamedTuple):
    """One text and where it is from."""

    name: str
    text: str


def documents(source: str | Path, field: str = "text", skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Every distinct, non-empty document of a source, in a fixed order.

    source: "stdlib"; "hf:NAME[:CONFIG][:SPLIT]" for a dataset of the hub (split "train" if left out); a folder written
    by `Dataset.save_to_disk`; any other folder, read recursively; or a file: .jsonl, .jsonl.gz, .jsonl.zst, .parquet,
    anything else as one text. field: the key or column that holds the text.
    skipped: counts "binary" files of a folder, "duplicate" and "empty" documents.
    ValueError for a source that is missing, empty of text, binary where text was named, or without the field.
    """
    skipped = Counter() if skipped is None else skipped
    seen: set[bytes] = set()
    for document in _every_document(source, field, skipped):
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        reason = "empty" if not document.text.strip() else "duplicate" if digest in seen else None
        if reason:
            skipped[reason] += 1
            continue
        seen.add(digest)
        yield document
    if not seen:
        left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise ValueError(f"{source}: no text in it" + (f" (left out: {left_out})" if left_out else ""))


def describe(source: str | Path) -> str:
    """The source in words for a manifest."""
    if str(source) == STDLIB:
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return str(source)


def _every_document(source: str | Path, field: str, skipped: Counter[str]) -> Iterator[Document]:
    if str(source) == STDLIB:
        return _standard_library(skipped)
    if str(source).startswith(HUB):
        return _hub(str(source), field)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{source}: no such file or folder; to mean a Hugging Face dataset write hf:{source}")
    if path.is_file():
        return _file(path, path.name, field)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_dataset(path, field)
    return _folder(path, field, skipped)


def _standard_library(skipped: Counter[str]) -> Iterator[Document]:
    """The .py files of the running interpreter's library that are UTF-8, its tests included where installed."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, ("site-packages", "dist-packages", "__pycache__")):
        if path.suffix == ".py":
            yield from _text_or_skip(path, path.relative_to(root).as_posix(), skipped)


def _folder(root: Path, field: str, skipped: Counter[str]) -> Iterator[Document]:
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        if _reader(path):
            yield from _file(path, name, field)
        else:
            yield from _text_or_skip(path, name, skipped)


def _files(root: Path, left_out: tuple[str, ...] = ()) -> list[Path]:
    """Regular files below a folder, in the order of their names; hidden files and folders are left out."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _raise(error: OSError) -> None:
    raise error


def _file(path: Path, name: str, field: str) -> Iterator[Document]:
    reader = _reader(path)
    if reader is not None:
        yield from reader(path, name, field)
        return
    data = path.read_bytes()
    text = _decode(data)
    if not data:
        raise ValueError(f"{path}: the file is empty")
    if text is None:
        raise ValueError(f"{path}: not a text file (it is not UTF-8, or holds a NUL byte)")
    yield Document(name, text)


def _text_or_skip(path: Path, name: str, skipped: Counter[str]) -> Iterator[Document]:
    text = _decode(path.read_bytes())
    if text is None:
        skipped["binary"] += 1
    else:
        yield Document(name, text)


def _decode(data: bytes) -> str | None:
    """The text of a file, without a byte-order mark; None if it is not UTF-8 or holds a NUL byte."""
    if b"\0" in data:
        return None
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        return None


def _reader(path: Path) -> Callable[[Path, str, str], Iterator[Document]] | None:
    """The reader of a file of many documents, by its ending; None for a file that is one text."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _parquet
    return _json_lines if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")) else None


def _json_lines(path: Path, name: str, field: str) -> Iterator[Document]:
    number = 0
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{name}:{number}", _field(json.loads(line), field, f"{path}, line {number}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}, after line {number}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: not a whole gzip file: {error}") from None


def _open_lines(path: Path) -> io.TextIOBase:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8")  # pyright: ignore[reportReturnType]
    if path.name.lower().endswith(".zst"):
        return io.TextIOWrapper(io.BufferedReader(_Zstandard(path)), encoding="utf-8")
    return path.open(encoding="utf-8")  # pyright: ignore[reportReturnType]


class _Zstandard(io.RawIOBase):
    """Decompressed bytes of a .zst file; a damaged or cut one is a ValueError that names it."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: reading .zst needs `pip install 'atma-lm[zstd]'`") from None
        self._zstandard = zstandard
        self._path = path
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._frame is None:
                    return 0
                raise ValueError(f"{self._path}: not a whole zstd file: it ends inside a frame")
            self._advance()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _advance(self) -> None:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready, self._input = self._frame.decompress(self._input), b""
        except self._zstandard.ZstdError as error:
            raise ValueError(f"{self._path}: not a zstd file: {error}") from None
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _parquet(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs `pip install 'atma-lm[parquet]'`") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                raise ValueError(f"{path}: no column '{field}'; it has {', '.join(table.schema_arrow.names)}")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(f"{name}:{number}", _text(value, field, f"{path}, row {number}"))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _hub(source: str, field: str) -> Iterator[Document]:
    """A dataset of the hub, streamed: nothing of it is kept on the disk."""
    name, *rest = source.removeprefix(HUB).split(":")
    if not name or len(rest) > 2:
        raise ValueError(f"{source}: write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    split = rest[-1] if rest else "train"
    rows = _datasets(source).load_dataset(name, rest[0] if len(rest) == 2 else None, split=split, streaming=True)
    return _rows(rows, source, field)


def _saved_dataset(path: Path, field: str) -> Iterator[Document]:
    dataset = _datasets(path).load_from_disk(str(path))
    if isinstance(dataset, dict):
        for split in sorted(dataset):
            yield from _rows(dataset[split], f"{path.name}:{split}", field)
    else:
        yield from _rows(dataset, path.name, field)


def _datasets(source: str | Path) -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{source}: reading Hugging Face datasets needs `pip install 'atma-lm[hf]'`") from None
    return datasets


def _rows(rows: Iterable[Any], name: str, field: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        yield Document(f"{name}:{number}", _field(row, field, f"{name}, row {number}"))


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or field not in row:
        has = f"it has {', '.join(map(str, row))}" if isinstance(row, dict) else f"it is a {type(row).__name__}"
        raise ValueError(f"{where}: no field '{field}'; {has}")
    return _text(row[field], field, where)


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{field}' must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise ValueError(f"{where}: '{field}' holds half a character ({half!r}), which is no text") from None
    return value
