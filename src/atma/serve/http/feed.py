"""Events of one or several engine requests as they come, for one HTTP request."""

import asyncio
from collections.abc import Sequence

from atma.serve.asynchronous import AsyncEngine
from atma.serve.http.errors import ApiError
from atma.serve.request import Event, Request, RequestError

Item = tuple[int, Event]
FEW = 16


class Feed:
    """Reads all requests at once; `close`, at the latest, aborts what has not ended.

    A few events wait here, the rest in the engine's own readers, which pause what is too far ahead.
    """

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request]) -> None:
        self._queue: asyncio.Queue[Item | Exception] = asyncio.Queue(FEW)
        self._left = sum(request.n for request in requests)
        self._tasks = [asyncio.create_task(self._read(engine, i, request)) for i, request in enumerate(requests)]

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return self._left == 0

    async def next(self, seconds: float | None = None) -> list[Item]:
        """What has come since, at least one event; none if it was silent for so long. ApiError: refused or failed.

        What was not foreseen is raised as it is: the request is answered by whoever asked, and the log has it.
        """
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
                await self._queue.put((index, event))
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a library's panic, too, or a cancellation of what it waits for
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # by `close`: nobody reads any more
                raise
            await self._queue.put(error if isinstance(error, Exception) else _broken(error))
        finally:
            await events.aclose()

    def _checked(self, item: Item | Exception) -> Item:
        if isinstance(item, Exception):
            raise ApiError.of(item) if isinstance(item, RequestError) else item
        event = item[1]
        self._left -= event.finish_reason is not None
        if event.finish_reason == "error":
            raise ApiError.of(event.error or RequestError("failed", "the answer could not be finished"))
        if event.finish_reason == "abort":
            raise ApiError.of(RequestError("closed", "the server is shutting down; ask another one, or again later"))
        return item


def _broken(error: BaseException) -> RuntimeError:
    """What is no Exception, as one."""
    broken = RuntimeError(f"the request was broken off by {type(error).__name__}: {error}")
    broken.__cause__ = error
    return broken
