"""Room for answers that are gathered before they are sent, so that these too keep within the memory budget.

A stream's events are taken as they come, but an answer in one body is held until its end, and log-probabilities of an
echoed prompt come all at once. What such answers may come to is set aside before they are begun.
"""

import asyncio
from collections.abc import Sequence

from atma.serve.http.answers import Shape
from atma.serve.http.errors import ApiError
from atma.serve.request import Request, scored_bytes

MENDS = {
    "max_tokens": "stream it, ask for fewer tokens, choices or log-probabilities",
    "input": "ask for fewer texts at once",
}
"""What makes an answer smaller, by the parameter that asks for most of it."""
TEXT_BYTES = 24
"""Of a token's text, with the copies that are made of it."""


ID_BYTES = 44
"""Of a token's id: in an array, as a number of a list, and written out."""


class Room:
    """So many bytes, taken in the order of asking."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    async def take(self, count: int, parameter: str = "max_tokens") -> None:
        """Wait until there is room. ApiError, for one of `MENDS`: there never will be."""
        if count > self.total:
            told = f"this answer could take {count:,} bytes before it is sent, of at most {self.total:,}"
            mend = f"{MENDS[parameter]}, or start with more --memory-budget"
            raise ApiError(400, "answer_too_large", f"{told}; {mend}", parameter)
        async with self._turn:
            while self.held + count > self.total:
                self._freed.clear()
                await self._freed.wait()
            self.held += count

    def give(self, count: int) -> None:
        self.held -= count
        self._freed.set()


def gathered_bytes(requests: Sequence[Request], shape: Shape, whole: bool, longest: int, rows: int, free: int) -> int:
    """The most that answers come to before they are sent, beyond `free` bytes for each of their texts.

    `longest`: positions of a text; `rows`: texts that are read at once, each with the scores of its prompt.
    """
    texts = sum(request.n for request in requests)
    found = 0.0
    for request in requests:
        scored, best = request.logprobs is not None, request.logprobs or 0
        prompt = len(request.prompt) if request.echo else 0
        if whole:
            found += request.n * (prompt + min(request.max_tokens, longest)) * _token_bytes(shape, request.logprobs)
        if scored:
            found += request.n * prompt * scored_bytes(best) * min(1.0, rows / texts)
    return max(0, int(found) - texts * free)


def most_tokens(total: int, shape: Shape, best: int | None, n: int) -> int:
    """Tokens of an answer in one body, of `n` choices with so many best tokens, for which there is room in `total`."""
    return max(1, total // (n * _token_bytes(shape, best)))


def _token_bytes(shape: Shape, best: int | None) -> int:
    """Of a token in an answer in one body; `best` None: without log-probabilities."""
    scored = 0 if best is None else shape.token_bytes(best)
    return shape.copies * (TEXT_BYTES + scored + (ID_BYTES if shape.ids is not None else 0))
