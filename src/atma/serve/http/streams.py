"""Answers on their way out: whole, or as server-sent events; and what happens when the client leaves."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from atma.serve.http.answers import Answer
from atma.serve.http.bodies import StreamOptions
from atma.serve.http.call import Call
from atma.serve.http.errors import PIECE, ApiError, Body, ClientGone, encoded
from atma.serve.http.feed import Feed, Item
from atma.serve.http.options import PING_SECONDS

LOG = logging.getLogger("atma.serve")
R = TypeVar("R")
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


async def while_there(receive: Receive, work: Awaitable[R]) -> R:
    """The work's result; ClientGone, with the work cancelled, once the client has gone."""
    working, watching = asyncio.ensure_future(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def whole(feed: Feed, answer: Answer, call: Call) -> Response:
    """The answer in one body."""
    try:
        while not feed.done:
            for item in await feed.next():
                call.saw(item)
                answer.add(item)
    finally:
        await feed.close()
        call.count(answer.tally)
    return Body(answer.whole())


async def streamed(
    feed: Feed, answer: Answer, call: Call, options: StreamOptions, kind: "type[EventStream] | None" = None
) -> Response:
    """The answer as events. What is refused at once is refused with a status; what comes late, with an event."""
    try:
        first = await feed.next(PING_SECONDS)
    except BaseException:
        await feed.close()
        raise
    return (kind or EventStream)(feed, answer, call, options, first)


class EventStream(Response):
    """Server-sent events; the feed is closed at its end, whatever that is."""

    ping = PING

    def __init__(self, feed: Feed, answer: Answer, call: Call, options: StreamOptions, first: list[Item]) -> None:
        super().__init__(None, 200, {"x-accel-buffering": "no"}, "text/event-stream")
        del self.headers["content-length"]
        self.feed, self.answer, self.call, self.first = feed, answer, call, first
        self.running = options.continuous_usage_stats
        self.with_usage = options.include_usage or self.running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_there(receive, self._send(send))
        finally:
            await self.feed.close()
            self.call.count(self.answer.tally)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for piece in self._pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            yield self._opening() + (b"" if self.first else self.ping)
            for piece in self._chunks(self.first):
                yield piece
            while not self.feed.done:
                items = await self.feed.next(PING_SECONDS)
                for piece in self._chunks(items):
                    yield piece
                if not items:
                    yield self.ping
        except Exception as error:
            if not isinstance(error, ApiError):
                LOG.exception("id=%s: %s", self.call.id, type(error).__name__)
            self.call.error = error if isinstance(error, ApiError) else ApiError.unforeseen(self.call.id)
            yield self._failure(self.call.error)
            return
        yield self._ending()

    def _opening(self) -> bytes:
        return b"".join(map(self._event, self.answer.openings()))

    def _of(self, item: Item) -> bytes:
        return self._event(self.answer.chunk(item))

    def _ending(self) -> bytes:
        return (self._event(self.answer.usage_chunk()) if self.with_usage else b"") + DONE

    def _failure(self, error: ApiError) -> bytes:
        return b"data: " + encoded(error.body) + b"\n\n" + DONE

    def _chunks(self, items: list[Item]) -> Iterator[bytes]:
        """The events' chunks, as many at once as the connection takes in one piece."""
        piece = bytearray()
        for item in items:
            self.call.saw(item)
            piece += self._of(item)
            if len(piece) >= PIECE:
                yield bytes(piece)
                piece.clear()
        if piece:
            yield bytes(piece)

    def _event(self, chunk: dict) -> bytes:
        if self.with_usage:
            chunk = {"usage": self.answer.tally.body if self.running else None} | chunk
        return b"data: " + encoded(chunk) + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
