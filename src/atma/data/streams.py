"""Files as bytes or text, whatever they are compressed with and whatever byte-order mark they begin with."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

COMPRESSED = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".lzma": "xz", ".bz2": "bz2"}
MOST_WINDOW = 1 << 31
"""Bytes that a .zst file may look back (`zstd --long=31`); the decoder takes no more memory than a file asks for."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def inner_name(path: Path) -> str:
    """The name of a file in lower case, without the ending of what it is compressed with."""
    name = path.name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def read_text(path: Path) -> str | None:
    """The text of a whole file; None if it is not UTF-8, UTF-16 or UTF-32 with its mark, or holds a NUL."""
    with open_bytes(path) as file:
        data = file.read()
    try:
        text = data.decode(encoding_of(data[:4]))
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A file to read line by line. ValueError, while it is read too, says what is wrong with it."""
    with open_bytes(path) as file:
        buffered = io.BufferedReader(file)  # pyright: ignore[reportArgumentType]
        encoding = encoding_of(buffered.peek(4)[:4])
        yield io.TextIOWrapper(buffered, encoding=encoding, newline=newline)


def encoding_of(head: bytes) -> str:
    """The encoding that a byte-order mark says; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file. ValueError, while they are read too: damaged, cut, or no such compression."""
    name = path.name.lower()
    kind = next((kind for ending, kind in COMPRESSED.items() if name.endswith(ending)), "")
    try:
        with _opened(path, kind) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path}: not a whole {_NAMES[kind]} file: {error}") from None
    except OSError as error:
        if error.errno is None and kind == "bz2":  # how the bz2 module says that the data are no such stream
            raise ValueError(f"{path}: not a whole bzip2 file: {error}") from None
        raise


_NAMES = {"gz": "gzip", "xz": "xz", "bz2": "bzip2", "zst": "zstd", "": "plain"}


def _opened(path: Path, kind: str) -> Any:
    if kind == "gz":
        return gzip.open(path, "rb")
    if kind == "xz":
        return lzma.open(path, "rb")
    if kind == "bz2":
        return bz2.open(path, "rb")
    return _Zstandard(path) if kind == "zst" else path.open("rb")


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
        if self._frame is None:
            self._frame = self._zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW).decompressobj()
        try:
            self._ready, self._input = self._frame.decompress(self._input), b""
        except self._zstandard.ZstdError as error:
            if "memory" in str(error).lower():
                raise ValueError(f"{self._path}: its zstd window does not fit this machine's memory: {error}") from None
            raise ValueError(f"{self._path}: not a zstd file: {error}") from None
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
