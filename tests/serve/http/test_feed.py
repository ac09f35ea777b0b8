"""What a feed does with streams that end otherwise than they should."""

import asyncio

import pytest

from atma.serve.http.feed import Feed
from atma.serve.request import Request


class Panic(BaseException):
    """As libraries raise that are written in Rust."""


class _Ending:
    """An engine whose streams end with an error at once."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def stream(self, request: Request):
        await asyncio.sleep(0)
        raise self.error
        yield


@pytest.mark.parametrize("error", [Panic("bug"), asyncio.CancelledError("gone"), ValueError("bug")], ids=repr)
def test_whatever_ends_a_stream_reaches_who_reads_it(error) -> None:
    async def work():
        feed = Feed(_Ending(error), [Request("x")])
        try:
            return await feed.next(2)
        finally:
            await feed.close()

    with pytest.raises((RuntimeError, ValueError), match=r"bug|gone"):
        asyncio.run(work())


def test_a_feed_that_is_closed_while_it_waits_ends_at_once() -> None:
    class Silent:
        async def stream(self, request: Request):
            await asyncio.sleep(60)
            yield

    async def work():
        feed = Feed(Silent(), [Request("x")])
        await asyncio.sleep(0)
        await asyncio.wait_for(feed.close(), 2)
        return [task.cancelled() for task in feed._tasks]

    assert asyncio.run(work()) == [True]
