"""Events of one or several engine requests as they come, for one HTTP request."""

import asyncio
from collections.abc import Sequence

from atma.serve.asynchronous import AsyncEngine
from atma.serve.http.errors import ApiError
from atma.serve.request import Event, Request, RequestError

Item = tuple[int, Event]


class Feed:
    """Reads all requests at once; `close`, at the latest, aborts what has not ended.

    What nobody takes waits here: at most one event for each token that was asked for.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[Item | RequestError] = asyncio.Queue()
        self._left = sum(request.n for request in requests)
        self._tasks = [asyncio.create_task(self._read(engine, i, request)) for i, request in enumerate(requests)]

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return self._left == 0

    async def next(self, seconds: float | None = None) -> list[Item]:
        """What has come since, at least one event; none if it was silent for so long. ApiError: refused or failed."""
        try:
            async with asyncio.timeout(seconds):
                items = [await self._queue.get()]
        except TimeoutError:
            return []
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        return [self._checked(item) for item in items]

    async def close(self) -> None:
        """Nothing is left behind, neither here nor in the engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, engine: AsyncEngine, index: int, request: Request) -> None:
        events = engine.stream(request)
        try:
            async for event in events:
                self._queue.put_nowait((index, event))
        except RequestError as error:
            self._queue.put_nowait(error)
        finally:
            await events.aclose()

    def _checked(self, item: Item | RequestError) -> Item:
        if isinstance(item, RequestError):
            raise ApiError.of(item)
        event = item[1]
        self._left -= event.finish_reason is not None
        if event.finish_reason == "error":
            raise ApiError.of(event.error or RequestError("failed", "the answer could not be finished"))
        if event.finish_reason == "abort":
            raise ApiError.of(RequestError("closed", "the server is shutting down; ask another one, or again later"))
        return item
