"""The processes that tokenise for a preparation: each is told how once, then answers a batch of documents with its ids.

They are started as `python -m atma.data.worker` and speak through their standard input and output, so that a script
without a `__main__` guard can prepare, a signal from the keyboard ends only who began them, and one whose input closes
ends, however its master did. Each uses one thread. A message is the lengths of its parts, then the parts.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import numpy as np

from atma.data.encoders import Encoded, Encoding, encode_batch
from atma.data.left_out import Document

Batch = Sequence[tuple[Document, bool]]
"""Documents, each with whether it is for validation."""
DONE, REFUSED = b"done", b"refused"
AHEAD = 1
"""Batches beyond one a process that are read before they are asked for."""


class Workers:
    """So many processes that encode in one way. Use them with `with`."""

    def __init__(self, encoding: Encoding, dtype: np.dtype, count: int) -> None:
        self._told, self._dtype, self.count = encoding.told(), dtype, count
        self._free: SimpleQueue[subprocess.Popen[bytes] | None] = SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Workers":
        for _ in range(self.count):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()
        self._threads.shutdown()
        for process in self._all:
            process.kill()  # of those that began meanwhile
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def encode(self, batches: Iterable[Batch]) -> Iterator[Encoded]:
        """What becomes of each batch, in order; few are held at a time. ValueError: a document that is refused."""
        waiting: deque[Future[Encoded]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._ask, batch))
            if len(waiting) > self.count + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, batch: Batch) -> Encoded:
        process = self._free.get()
        try:
            process = process or self._begin()
            request = json.dumps([(document.name, document.text, mark) for document, mark in batch]).encode()
            kind, *parts = _exchange(process, request)
        finally:
            self._free.put(process)
        return _encoded(kind, parts)

    def _begin(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        command, pipe = [sys.executable, "-P", "-m", "atma.data.worker"], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)
        self._all.append(process)
        kind, *parts = _exchange(process, self._told, self._dtype.str.encode())
        _encoded(kind, parts)
        return process


def _exchange(process: subprocess.Popen[bytes], *parts: bytes) -> list[bytes]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        _send(process.stdin, *parts)
        if answer := _receive(process.stdout):
            return answer
    code = process.wait()
    raise ValueError(f"a process that tokenises ended ({code}), maybe for want of memory; try fewer with --workers")


def _encoded(kind: bytes, parts: list[bytes]) -> Encoded:
    if kind == REFUSED:
        raise ValueError(parts[0].decode("utf-8", "surrogatepass"))
    ids, answers, records, left_out = parts or (b"", b"", b"", b"[{}, {}]")
    return Encoded(ids, answers, records, *json.loads(left_out))


def _send(file: IO[bytes], *parts: bytes) -> None:
    file.write(np.array([len(parts), *map(len, parts)], "<u8").tobytes())
    for part in parts:
        file.write(part)
    file.flush()


def _receive(file: IO[bytes]) -> list[bytes]:
    """The parts of the next message; none where the other side has ended."""
    head = file.read(8)
    if len(head) < 8:
        return []
    sizes = np.frombuffer(file.read(8 * int.from_bytes(head, "little")), "<u8")
    return [file.read(size) for size in sizes.tolist()]


def _answers(requests: IO[bytes], answers: IO[bytes]) -> None:
    if not (told := _receive(requests)):
        return
    dtype = np.dtype(told[1].decode())
    with Encoding.heard(told[0]).writer() as writer:
        _send(answers, DONE)
        while batch := _receive(requests):
            documents = [(Document(name, text), mark) for name, text, mark in json.loads(batch[0])]
            try:
                ids, told_answers, records, counts, characters = encode_batch(writer, documents, dtype)
            except ValueError as error:
                _send(answers, REFUSED, str(error).encode("utf-8", "surrogatepass"))
                continue
            _send(answers, DONE, ids, told_answers, records, json.dumps([counts, characters]).encode())


def main() -> None:
    """Answer until the input ends. What is printed otherwise goes to the standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        try:
            _answers(sys.stdin.buffer, answers)
        except ValueError as error:
            _send(answers, REFUSED, str(error).encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    main()
