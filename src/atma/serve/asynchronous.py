"""The engine in a thread of its own, for callers with an event loop: a server streams from it.

    async for event in engine.stream(Request("def main():")):
        print(event.text, end="")

The thread alone touches the engine. Closing the generator, or cancelling whoever reads it, aborts the request.
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import threading
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from atma.serve.engine import Engine
from atma.serve.guides import Prepared
from atma.serve.handle import Handle, Output
from atma.serve.request import Event, Request, RequestError, Usage
from atma.serve.structure import Structure

R = TypeVar("R")


LOG = logging.getLogger("atma.serve")


class _Reader:
    """Events of one request on their way to the loop that reads them, and how many bytes of them wait there.

    The engine's thread alone adds to `sent`, the loop alone to `taken`. A reader for whom more than `room` bytes wait
    is paused by the one and resumed by the other once half of it is free; the one that pauses looks again after saying
    so, lest both wait.
    """

    def __init__(self, room: int) -> None:
        self.loop, self.room = asyncio.get_running_loop(), room
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.sent = self.taken = 0
        self.paused = False

    @property
    def full(self) -> bool:
        return self.sent - self.taken > self.room

    @property
    def drained(self) -> bool:
        return self.sent - self.taken <= self.room // 2

    async def next(self) -> Event:
        event = await self.queue.get()
        self.taken += event.bytes
        return event


class AsyncEngine:
    """Give it an engine that nobody else uses. `drain` or `shutdown` ends its thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.draining = False
        self._readers: dict[str, _Reader] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._compiling = ThreadPoolExecutor(1, "atma-compile")
        """Structures are compiled one after the other: no other request waits for them."""
        self._thread = threading.Thread(target=self._run, name="atma-engine", daemon=True)
        self._thread.start()

    async def stream(self, request: Request) -> AsyncGenerator[Event, None]:
        """Events as the steps bring them, until every choice has ended. RequestError before the first if refused."""
        self._require_open()
        loop, compiles = asyncio.get_running_loop(), request.structure is not None
        tokens = await loop.run_in_executor(self._compiling if compiles else None, self._prepare, request)
        identity = uuid.uuid4().hex if request.id is None else request.id
        request = dataclasses.replace(request, id=identity)
        reader, left = _Reader(request.n * self.engine.config.unread_bytes), request.n
        opened = self._call(lambda: self._open(request, tokens, reader))
        try:
            await asyncio.wrap_future(opened)
            while left:
                event = await reader.next()
                if reader.paused and reader.drained:
                    self._call(lambda: self._resume(identity, reader))
                left -= event.finish_reason is not None
                yield event
        finally:
            if left:
                self._call(lambda: self._abandon(identity, reader))

    async def judge(self, structure: Structure) -> Callable[[str], bool]:
        """What tells whether a text is a whole answer by a structure. It is compiled where those of requests are, and
        held, so that nothing is compiled when it tells. RequestError: it cannot be compiled."""
        self._require_open()
        loop, guides = asyncio.get_running_loop(), self.engine.guides
        compiled = await loop.run_in_executor(self._compiling, guides.compiled, structure)
        return functools.partial(guides.allows, compiled)

    async def generate(self, request: Request) -> list[Output]:
        """The whole answer: one output for each choice."""
        handle = Handle("", request.n)
        async for event in self.stream(request):
            handle.take(event)
        return handle.outputs

    async def abort(self, identity: str) -> None:
        """End a request; its stream ends with the reason "abort"."""
        await asyncio.wrap_future(self._call(lambda: self.engine.abort(identity)))

    async def stats(self) -> dict[str, Any]:
        """`Engine.stats` between two steps."""
        return await asyncio.wrap_future(self._call(self.engine.stats))

    async def drain(self) -> None:
        """Take no more requests, finish those under way, keep states on disk if there is a folder, and end."""
        self.draining = True
        await asyncio.to_thread(self._stop)

    async def shutdown(self) -> None:
        """As `drain`, but what is under way is aborted."""
        self.draining = True
        self._call(lambda: [self.engine.abort(identity) for identity in list(self._readers)])
        await asyncio.to_thread(self._stop)

    def _stop(self) -> None:
        self._compiling.shutdown(wait=False)  # those that wait there find it draining
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _call(self, work: Callable[[], R]) -> "Future[R]":
        """Run `work` in the engine's thread between two steps."""
        future: Future[R] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        with self._wake:
            ended = self._ended
            if not ended:
                self._inbox.append(run)
                self._wake.notify()
        if ended:
            run()
        return future

    def _require_open(self) -> None:
        if self.draining:
            raise RequestError("closed", "the engine is shutting down")

    def _prepare(self, request: Request) -> Prepared:
        """`Engine.prepare` in another thread, unless the engine has begun to end while the request waited for it."""
        self._require_open()
        return self.engine.prepare(request)

    def _open(self, request: Request, tokens: Prepared, reader: _Reader) -> None:
        self._require_open()
        handle = self.engine.submit(request, tokens, keep=False)
        self._readers[handle.id] = reader

    def _abandon(self, identity: str, reader: _Reader) -> None:
        if self._readers.get(identity) is reader:
            del self._readers[identity]
            self.engine.abort(identity)

    def _resume(self, identity: str, reader: _Reader) -> None:
        if reader.paused and self._readers.get(identity) is reader:
            reader.paused = False
            self.engine.resume(identity)

    def _hold(self, identity: str, reader: _Reader) -> None:
        """Pause a request whose reader is behind."""
        reader.paused = True
        self.engine.pause(identity)
        if reader.drained:  # it has caught up meanwhile, and may not have seen that it was paused
            self._resume(identity, reader)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self.engine.busy or (self._stopping and not self.engine.answers.handles)):
                    self._wake.wait()
                work = list(self._inbox)
                self._inbox.clear()
                if not work and self._stopping and not self.engine.answers.handles:
                    self._ended = True
                    break
            for run in work:
                run()
            if self.engine.busy:
                self._dispatch(self._step())
        try:
            self._dispatch(self.engine.close())
        except Exception as error:  # nobody waits any more; what could not be kept is told
            LOG.exception("the engine did not close well: %s", type(error).__name__)

    def _step(self) -> list[Event]:
        try:
            return self.engine.step()
        except BaseException as error:  # a fault of the engine itself, or a panic in it: nobody is left waiting for it
            LOG.exception("the engine failed: %s", type(error).__name__)
            self.draining = True
            reason, none = RequestError("failed", f"the engine failed: {error!r}"), Usage(0, 0, 0)
            self.engine.scheduler.clear()
            ends = self.engine.answers.forget()
            return [Event(name, index, (), "", None, "error", none, reason) for name, index in ends]

    def _dispatch(self, events: list[Event]) -> None:
        """Hand events to the loops of their readers, all of a loop in one call."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}
        for event in events:
            reader = self._readers.get(event.id)
            if reader is not None:
                reader.sent += event.bytes
                by_loop.setdefault(reader.loop, []).append((reader.queue, event))
        for identity in [identity for identity in self._readers if identity not in self.engine.answers.handles]:
            del self._readers[identity]
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # a loop that is closed has no readers
                loop.call_soon_threadsafe(_put, pairs)
        for identity, reader in list(self._readers.items()):
            if reader.full and not reader.paused:
                self._hold(identity, reader)


def _put(pairs: "list[tuple[asyncio.Queue[Event], Event]]") -> None:
    for queue, event in pairs:
        queue.put_nowait(event)
