"""What a preparation has tokenised so far, on the disk beside its folder, so that one that was killed can go on.

Three files grow: the ids of all documents, which of them are answers, and a record of each document. A fourth, the
journal, says on its first line what is prepared and how, then a line a batch: what was read, how far the files reach
with it, and a hash of what it added. The files are forced to the disk before the lines that vouch for them, so whatever
is in the journal is in the files; and every hash is checked before it is believed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atma.data.encoders import RECORD, Encoded
from atma.disk import destination, lock, sync
from atma.replacing import unfinished_place

COMMIT_SECONDS = 5.0
"""Between two times that the disk is waited for: the most that a kill costs."""
FILES = ("spool", "answers", "records")
JOURNAL = "journal"
Say = Callable[[str], None]


class Spool:
    """The unfinished preparation of a folder. Use it with `with`: an interrupt leaves it, an error or success does not.

    `batches` are the journal's lines that hold. What follows them in the files is gone once the first is appended.
    """

    def __init__(self, out: Path, key: Mapping[str, Any], restart: bool, say: Say) -> None:
        """key: what decides the bytes, as JSON can hold it; one of another key, or any to `restart`, is begun anew."""
        self.folder = unfinished_place(destination(out))
        self._out, self._key, self._restart, self._say = out, json.loads(json.dumps(key)), restart, say
        self.batches: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> "Spool":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.folder, os.O_RDONLY)
        if lock(self._handle) is False:
            os.close(self._handle)
            raise ValueError(f"{self._out}: another process prepares it; wait for it, or name another folder")
        try:
            self._begin()
        except BaseException:
            os.close(self._handle)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        try:
            if stopped and (self.batches or self._waiting):
                self._commit()
        finally:
            for file in self._files:
                with contextlib.suppress(OSError):  # of a full disk, which was told
                    file.close()
            if not stopped or not self.batches:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._handle)

    def append(self, read: str, encoded: Encoded) -> None:
        """Add a batch; `read` is a hash of what it is of."""
        parts = (encoded.ids, encoded.answers, encoded.records)
        for place, (file, part) in enumerate(zip(self._files, parts, strict=True)):
            file.write(part)
            self._ends[place] += len(part)
        counts: dict[str, Any] = {"counts": dict(encoded.counts), "characters": dict(encoded.characters)}
        counts["documents"] = len(encoded.records) // RECORD.itemsize
        self._waiting.append({"read": read, "ends": [*self._ends], "hash": _hash(*parts)} | counts)
        if time.monotonic() - self._last >= COMMIT_SECONDS:
            self._commit()

    def keep(self, count: int) -> None:
        """Keep the first batches alone: what was read after them is no longer what it was."""
        if count < len(self.batches):
            self._say("the source has changed since: what follows is tokenised anew")
            for file in self._files:
                file.close()
            self._cut(count)

    def records(self) -> np.ndarray:
        """Of every document (n,) RECORD."""
        self._flush()
        return np.fromfile(self._path("records"), RECORD)

    def stream(self, dtype: np.dtype, name: str = "spool") -> np.ndarray:
        """The ids of all documents, or which are answers, mapped from the disk."""
        self._flush()
        return np.memmap(self._path(name), dtype, "r")

    def _begin(self) -> None:
        self.batches = [] if self._restart else list(self._found())
        if not self.batches:
            for name in (*FILES, JOURNAL):
                self._path(name).unlink(missing_ok=True)
            self._path(JOURNAL).write_text(json.dumps(self._key) + "\n", encoding="utf-8")
        self._cut(len(self.batches))
        sync(self.folder)
        sync(self.folder.parent)

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _flush(self) -> None:
        for file in self._files:
            file.flush()

    def _commit(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        with self._path(JOURNAL).open("ab") as journal:
            journal.write("".join(json.dumps(line) + "\n" for line in self._waiting).encode())
            journal.flush()
            os.fsync(journal.fileno())
        self.batches += self._waiting
        self._waiting, self._last = [], time.monotonic()

    def _cut(self, count: int) -> None:
        """Leave `count` batches, in the journal first, and open the files behind them."""
        journal = self._path(JOURNAL)
        lines = journal.read_bytes().splitlines(keepends=True)[: count + 1]
        os.truncate(journal, sum(map(len, lines)))
        sync(journal)
        self.batches, self._last = self.batches[:count], time.monotonic()
        self._ends: list[int] = [*self.batches[-1]["ends"]] if count else [0, 0, 0]
        self._files = [self._path(name).open("ab" if count else "wb") for name in FILES]
        for name, end in zip(FILES, self._ends, strict=True):
            if count:
                os.truncate(self._path(name), end)

    def _found(self) -> Iterator[dict[str, Any]]:
        """The batches that an earlier process finished, as far as they hold."""
        try:
            first, *lines = self._path(JOURNAL).read_bytes().splitlines(keepends=True)
            files = [self._path(name).open("rb") for name in FILES]
        except (FileNotFoundError, ValueError):
            return
        try:
            if not self._same(first):
                return
            for line in lines:
                batch = _batch(line)
                if batch is None or _hash(*_parts(files, batch["ends"])) != batch["hash"]:
                    return
                yield batch
        finally:
            for file in files:
                file.close()

    def _same(self, line: bytes) -> bool:
        """Whether a journal's first line says what is to be done now; says what differs if not."""
        try:
            key = json.loads(line)
        except ValueError:
            return False
        changed = sorted(name for name in self._key if not isinstance(key, dict) or key.get(name) != self._key[name])
        if changed:
            self._say(f"an unfinished preparation had another {', '.join(changed)}: begun anew")
        return not changed


def _batch(line: bytes) -> dict[str, Any] | None:
    """A line of the journal; None for one that was not written to its end."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _parts(files: list[Any], ends: list[int]) -> list[bytes]:
    """What the files hold up to the ends, from where they stand."""
    return [file.read(max(0, end - file.tell())) for file, end in zip(files, ends, strict=True)]


def _hash(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
