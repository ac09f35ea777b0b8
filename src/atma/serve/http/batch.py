"""A file of requests answered into a file of answers, a line each, by the routes of the server without a socket.

The lines are those of OpenAI's batches: `custom_id`, `method`, `url`, `body`; an answer has `id`, `custom_id`, and a
`response` (`status_code`, `request_id`, `body`) or an `error` of the line itself. What is in the file of answers is not
asked again, so that a batch that was broken off goes on; a last line that is not whole is cut off. Only requests under
way are in memory, and of each that is done a number of 8 bytes: no answer is kept to go on from.
"""

import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from starlette.types import ASGIApp, Message, Scope

from atma.serve.http.app import create_app
from atma.serve.http.batch_options import KEY, BatchOptions
from atma.serve.http.errors import MESSAGES, RESPONSES, encoded
from atma.serve.http.service import Service

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", RESPONSES, MESSAGES)
AGAIN_SECONDS = 0.2
"""After which a request that was told "not now" is asked again."""
TOLD_SECONDS = 10.0
NOT_NOW = (429, 503)
LONGEST_ID = 512
BEGINNING = b'{"id":"batch_req_'
"""How every answer begins."""


class Line(NamedTuple):
    """A request of a batch."""

    custom_id: str
    url: str
    body: bytes


class Wrong(ValueError):
    """A line that is no request; `custom_id` where it has one."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def answer_batch(model: str, asked: Path, answered: Path, options: BatchOptions) -> "Batch":
    """Answer all lines of a file that are not answered yet; returns the counts. ValueError, OSError: no such files, or
    the file of answers holds something else."""
    if not asked.is_file():
        raise ValueError(f"{asked}: no such file of requests")
    if answered.exists() and asked.samefile(answered):
        raise ValueError(f"{answered} is the file of requests; name another for the answers")
    service = Service(model, options.server())
    done = already(answered)
    with answered.open("ab") as out:
        batch = Batch(service, out, done, options)
        asyncio.run(batch.run(asked))
    return batch


def already(answered: Path) -> set[int]:
    """The requests that a file of answers has, by the hashes of their names. What follows its last whole line goes.

    ValueError for a file that holds no answers.
    """
    if not answered.exists():
        return set()
    done, end = set(), 0
    with answered.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not done or not (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                    raise ValueError(f"{answered}: what would be cut off its end is no answer; name another file")
                break
            name = _name_of(line)
            if name is None:
                raise ValueError(f"{answered}: line {number} is no answer of a batch; name another file")
            done.add(_number(name))
            end += len(line)
        file.truncate(end)
    return done


def _name_of(line: bytes) -> str | None:
    """The name of an answer's request, else the one that `_identity` made of it. None: the line is no answer."""
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or not {"custom_id", "response", "error"} <= told.keys():
        return None
    name = told["custom_id"] if told["custom_id"] is not None else told.get("id")
    return name if isinstance(name, str) else None


def read(line: bytes, most: int) -> Line:
    """A request. Wrong: what is the matter with the line."""
    if len(line) > most:
        raise Wrong(f"the line is longer than the {most:,} bytes that are read of one (--max-body)")
    try:
        given = json.loads(line)
    except (ValueError, RecursionError):
        raise Wrong("the line is not JSON") from None
    name = given.get("custom_id") if isinstance(given, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_ID:
        raise Wrong(f"'custom_id' must be a text of 1 to {LONGEST_ID} characters")
    if given.get("method", "POST") != "POST":
        raise Wrong("'method' must be POST", name)
    if given.get("url") not in URLS:
        raise Wrong(f"'url' must be one of {', '.join(URLS)}", name)
    if not isinstance(given.get("body"), dict):
        raise Wrong("'body' must be an object", name)
    body = _meant(given["url"], given["body"], name)
    try:
        return Line(name, given["url"], encoded(body))
    except (ValueError, RecursionError):
        raise Wrong("'body' has a number that is not finite, such as NaN or 1e400, or is too deep", name) from None


def _meant(url: str, body: dict[str, Any], name: str) -> dict[str, Any]:
    """A body as a batch can mean it. Wrong: it asks for what there is none of in a batch."""
    if body.get("stream"):
        raise Wrong("'stream': answers of a batch are not streamed; leave it out", name)
    if url != RESPONSES:
        return body
    if body.get("background"):
        raise Wrong("'background': the answers of a batch are waited for as it is; leave it out", name)
    if body.get("previous_response_id") is not None:
        told = "a batch keeps no answers, and its lines have no order; give the whole conversation in 'input'"
        raise Wrong(f"'previous_response_id': {told}", name)
    store = body.get("store")
    return body | {"store": False} if store is None or store is True else body


class Batch:
    """One batch on its way, and its counts."""

    def __init__(self, service: Service, out: BinaryIO, done: set[int], options: BatchOptions) -> None:
        self.service, self.options = service, options
        self.answered = self.refused = self.failed = self.skipped = 0
        self._out, self._done = out, done
        self._app = create_app(service)
        self._free = asyncio.Semaphore(options.together)
        self._told = time.monotonic()

    @property
    def counts(self) -> str:
        """What has become of the lines so far."""
        found = f"{self.answered:,} answered, {self.refused:,} refused, {self.failed:,} failed"
        return found + (f"; {self.skipped:,} were done before" if self.skipped else "")

    async def run(self, asked: Path) -> None:
        """Answer every line; at the end, or when it is broken off, kept states go to disk if there is a folder.

        OSError: the answers cannot be written, or the engine has failed.
        """
        await self.service.load()
        try:
            with asked.open("rb") as file:
                async with asyncio.TaskGroup() as group:
                    for line in self._lines(file):
                        await self._free.acquire()
                        group.create_task(self._line(line))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            try:
                os.fsync(self._out.fileno())
            finally:
                await self.service.close(abort=True)

    def _lines(self, file: BinaryIO) -> Iterator[bytes]:
        """The lines that are not empty, each at most a little longer than it may be."""
        most = self.options.server().body_bytes
        while line := file.readline(most + 2):
            while not line.endswith(b"\n") and len(line) > most and (rest := file.readline(1 << 16)):
                if rest.endswith(b"\n"):
                    break
            if line.strip():
                yield line

    async def _line(self, line: bytes) -> None:
        try:
            asked = read(line.strip(), self.options.server().body_bytes)
            if self._taken(asked.custom_id):
                return
            status, headers, body = await self._ask(asked)
            self.answered += status < 400
            self.refused += 400 <= status < 500
            self.failed += status >= 500
            response = {"status_code": status, "request_id": headers.get(b"x-request-id", b"").decode()}
            head = encoded({"id": _identity(line), "custom_id": asked.custom_id, "error": None, "response": response})
            self._write(head[:-2] + b',"body":' + body + b"}}")
        except Wrong as error:
            name, identity = error.custom_id, _identity(line)
            if self._taken(identity if name is None else name):
                return
            self.refused += 1
            told = {"code": "invalid_line", "message": str(error)}
            self._write(encoded({"id": identity, "custom_id": name, "response": None, "error": told}))
        finally:
            self._free.release()

    def _taken(self, name: str) -> bool:
        """Whether a request of this name was answered before, or is being answered: then it is passed over."""
        number = _number(name)
        known = number in self._done
        self._done.add(number)
        self.skipped += known
        return known

    async def _ask(self, asked: Line) -> tuple[int, dict[bytes, bytes], bytes]:
        """The answer to a request, which is asked again while there is no room for it. OSError: the engine has failed,
        which is no answer to it."""
        while True:
            told = await ask(self._app, asked.url, asked.body)
            if told[0] < 500 and told[0] not in NOT_NOW:
                return told
            if self.service.state != "ready":
                raise OSError(f"the model is {self.service.state}; run this again for what is not answered")
            if told[0] not in NOT_NOW:
                return told
            await asyncio.sleep(AGAIN_SECONDS)

    def _write(self, line: bytes) -> None:
        self._out.write(line + b"\n")
        self._out.flush()
        now = time.monotonic()
        if now - self._told > TOLD_SECONDS:
            self._told = now
            print(f"atma: {self.counts}", file=sys.stderr, flush=True)


async def ask(app: ASGIApp, url: str, body: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of the answer that an application gives to JSON that is posted to it."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    told: list[Message] = []

    async def receive() -> Message:
        return unread.pop() if unread else await asyncio.get_running_loop().create_future()

    async def send(message: Message) -> None:
        told.append(message)

    await app(_scope(url), receive, send)
    parts = [message.get("body", b"") for message in told if message["type"] == "http.response.body"]
    return told[0]["status"], dict(told[0]["headers"]), b"".join(parts)


def _scope(url: str) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"authorization", f"Bearer {KEY}".encode())],
        "client": None,
        "server": None,
    }


def _identity(line: bytes) -> str:
    """What its answer is called; a line without a name is known by it when the batch goes on."""
    return f"batch_req_{hashlib.blake2b(line.strip(), digest_size=16).hexdigest()}"


def _number(name: str) -> int:
    """8 bytes of a hash of a name."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "big")
