"""Token shards that lie elsewhere (s3://, gs://, hf://, memory://…), read by ranges into a bounded cache on the disk.

What is small is fetched whole and must have the hash that the manifest says: the tokenizer, the indices of documents,
the masks of answers, the chat template. A shard is fetched in blocks when a batch first needs them, those of a batch
together, and kept; where the cache is full the oldest go. What a batch holds depends on its step alone, as of any
folder, so a run resumes from a cold cache to the same bits. `verify` reads shards whole and compares their hashes.

The cache is ATMA_CACHE (by default the user's cache folder), of ATMA_CACHE_GIB (by default 32).
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atma.data.shards import HEADER_BYTES, layout_of

BLOCK = 1 << 18
"""Bytes of a block: a few rows of training."""
TRIES, PAUSE = 4, 0.5
"""Times that a read is tried, and seconds before the second try, twice as many before each later one."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_remote(name: str | Path) -> bool:
    """Whether data of this name lie elsewhere."""
    return isinstance(name, str) and "://" in name


class Remote:
    """One folder elsewhere. ValueError, in one line: no fsspec or store for it, no such object, no access."""

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/")
        protocol = name.partition("://")[0]
        try:
            import fsspec
        except ImportError:
            raise ValueError(f"{name}: reading data from elsewhere needs `pip install 'atma-lm[remote]'`") from None
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.name)
        except ImportError as error:
            needed = PACKAGES.get(protocol, "what it asks for")
            raise ValueError(f"{name}: needs `pip install {needed}`: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: not a place that can be read: {error}") from None

    def read(self, file: str) -> bytes:
        """A whole file."""
        return self._tried(file, lambda: self._files.cat_file(self._path(file)))

    def size(self, file: str) -> int:
        """Its bytes."""
        return self._tried(file, lambda: self._files.size(self._path(file)))

    def ranges(self, file: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of a file, fetched together. ValueError where one is shorter than it should be."""
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        paths = [self._path(file)] * len(spans)
        found = self._tried(file, lambda: self._files.cat_ranges(paths, starts, ends, on_error="raise"))
        if any(len(data) != end - start for data, (start, end) in zip(found, spans, strict=True)):
            raise ValueError(f"{self.name}/{file}: shorter than it was: changed since its manifest was written")
        return found

    def whole(self, file: str, folder: Path, digest: str) -> None:
        """Fetch a file into a folder unless it is there. ValueError if it has not this SHA-256."""
        path = folder / file
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            return
        data = self.read(file)
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{self.name}/{file}: not the SHA-256 that its manifest says: changed since, or damaged")
        put(path, data)

    def _path(self, file: str) -> str:
        return f"{self._root.rstrip('/')}/{file}"

    def _tried(self, file: str, read: Callable[[], Any]) -> Any:
        """What `read` gives; failures of the network are tried again, those that will not pass are not."""
        for number in range(TRIES):
            try:
                return read()
            except (FileNotFoundError, IsADirectoryError, KeyError):
                raise ValueError(
                    f"{self.name}/{file}: no such object; is the name right, and is it prepared?"
                ) from None
            except Exception as error:  # of whatever kind the store's own library raises
                kind = f"{type(error).__name__}: {error}"
                if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
                    told = "no access to it; set the credentials as its store wants them"
                    raise ValueError(f"{self.name}/{file}: {told} ({kind})") from None
                if number == TRIES - 1:
                    raise ValueError(f"{self.name}/{file}: not read in {TRIES} tries: {kind}") from None
                time.sleep(PAUSE * 2**number)
        raise AssertionError


class Cache:
    """Blocks of shards on the disk, `most` bytes of them; the oldest give way. Several processes may use one."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        folder.mkdir(parents=True, exist_ok=True)
        self._held = sum(size for _, size, _ in self._blocks())

    def get(self, name: str, size: int) -> bytes | None:
        """A block of that size; None where it is not there."""
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        return data if len(data) == size else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a block."""
        put(self.folder / name, data)
        self._held += len(data)
        if self._held > self.most:
            self._make_room()

    def _make_room(self) -> None:
        blocks = sorted(self._blocks())
        self._held = sum(size for _, size, _ in blocks)
        for _, size, path in blocks:
            if self._held <= 0.9 * self.most:
                return
            path.unlink(missing_ok=True)
            self._held -= size

    def _blocks(self) -> Iterable[tuple[float, int, Path]]:
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                yield about.st_mtime, about.st_size, path


class RemoteShard:
    """The tokens of a shard, of which slices are arrays (n,); their blocks are fetched when they are asked for."""

    def __init__(self, remote: Remote, cache: Cache, entry: dict[str, Any]) -> None:
        """entry: what the manifest says of it. ValueError: it is no shard, or another."""
        self._remote, self._cache, self._entry = remote, cache, entry
        self._file: str = entry["file"]
        name, size = f"{remote.name}/{self._file}", remote.size(entry["file"])
        head = remote.ranges(self._file, [(0, min(size, HEADER_BYTES))])[0]
        self.layout, tokens = layout_of(name, head, size)
        if tokens != entry["tokens"]:
            told = f"{tokens:,} tokens, but its manifest says {entry['tokens']:,}"
            raise ValueError(f"{name}: {told}: changed since it was written")
        self._size = size

    def __len__(self) -> int:
        return self._entry["tokens"]

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        low, high = (HEADER_BYTES + self._width * place for place in (start, max(start, stop)))
        first, last = low // BLOCK, max(low, high - 1) // BLOCK
        data = b"".join(self._fetched(range(first, last + 1)))
        return np.frombuffer(data[low - first * BLOCK : high - first * BLOCK], self.layout.dtype)

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetch at once what these spans of tokens need."""
        places: set[int] = set()
        for start, stop in spans:
            low, high = (HEADER_BYTES + self._width * place for place in (start, stop))
            places.update(range(low // BLOCK, (high - 1) // BLOCK + 1))
        for few in _in_parts(sorted(places), 256):
            self._fetched(few)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the whole file."""
        digest = hashlib.sha256()
        for places in _in_parts(range(-(-self._size // BLOCK)), 64):
            for data in self._remote.ranges(self._file, [self._span(place) for place in places]):
                digest.update(data)
        return digest.hexdigest()

    @property
    def _width(self) -> int:
        return self.layout.dtype.itemsize

    def _span(self, place: int) -> tuple[int, int]:
        return place * BLOCK, min((place + 1) * BLOCK, self._size)

    def _fetched(self, places: Sequence[int]) -> list[bytes]:
        names = {place: f"{self._entry['sha256'][:32]}-{place}" for place in places}
        sizes = {place: self._span(place)[1] - self._span(place)[0] for place in places}
        found = {place: self._cache.get(names[place], sizes[place]) for place in places}
        lacking = [place for place, data in found.items() if data is None]
        if lacking:
            fetched = self._remote.ranges(self._file, [self._span(place) for place in lacking])
            for place, data in zip(lacking, fetched, strict=True):
                found[place] = data
                self._cache.put(names[place], data)
        return [data for data in found.values() if data is not None]


def cache_place() -> tuple[Path, int]:
    """The folder that what is fetched goes to, and how many bytes of blocks are kept. ValueError: no such number."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder, told = (
        Path(os.environ.get("ATMA_CACHE") or Path(home) / "atma" / "remote"),
        os.environ.get("ATMA_CACHE_GIB"),
    )
    try:
        return folder, int(float(told or 32) * 2**30)
    except ValueError:
        raise ValueError(f"ATMA_CACHE_GIB={told}: not a number of GiB") from None


def put(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_bytes(data)
    beside.replace(path)


def _in_parts(places: Sequence[int], count: int) -> Iterable[Sequence[int]]:
    return (places[first : first + count] for first in range(0, len(places), count))
