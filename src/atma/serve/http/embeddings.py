"""Vectors of texts, in the words of OpenAI's API: the last hidden state after the final norm, or the mean of all.

Texts are read by the engine beside all others, a few at a time, so that rows are left for chats. They keep no states:
many texts that are read once would push out those of conversations.
"""

import array
import asyncio
import base64
import contextlib
import math
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from atma.serve.asynchronous import AsyncEngine
from atma.serve.http.bodies import Body
from atma.serve.http.errors import ApiError, encoded
from atma.serve.http.fields import INPUT_SCHEMA, TOKEN, Prompt, Short, inputs
from atma.serve.http.options import Pooling
from atma.serve.http.service import Ready
from atma.serve.request import Event, Request, RequestError

NUMBER_BYTES = 16
"""Of one number in an answer, as float32 and written out."""


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: Annotated[str, Field(max_length=256)] | None = None
    input: Annotated[Any, PlainValidator(inputs), WithJsonSchema(INPUT_SCHEMA)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, lt=TOKEN)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=TOKEN)] | None = None
    add_special_tokens: bool = True
    normalize: bool = True
    cache_salt: Short = ""


class Embedder:
    """Reads texts for their vectors, at most `together` of all requests at once."""

    def __init__(self, together: int) -> None:
        self._places = asyncio.Semaphore(together)

    async def vectors(self, ready: Ready, asked: Sequence[Request]) -> list[Event]:
        """The last event of each, in their order. ApiError: one is refused or fails; the others are then given up."""
        for request in asked:
            _check_length(request, ready.longest)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._read(ready.engine, request)) for request in asked]
        except* ApiError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _read(self, engine: AsyncEngine, request: Request) -> Event:
        async with self._places, contextlib.aclosing(engine.stream(request)) as events:
            try:
                return await _last(events)
            except RequestError as error:
                raise ApiError.of(error.renamed("prompt", "input")) from None


async def requests_of(body: EmbeddingBody, ready: Ready, pooling: Pooling) -> list[Request]:
    """A request for each text, its tokens cut to those asked for. ApiError for what is no text or no size."""
    width = ready.engine.engine.served.config.width
    if body.dimensions not in (None, width):
        told = f"'dimensions': vectors of this model have {width} numbers and are not shortened, not {body.dimensions}"
        raise ApiError(400, "invalid_value", told, "dimensions")
    if body.truncate_prompt_tokens == 0:
        told = "'truncate_prompt_tokens' must be at least 1, or -1 for what there is room for, not 0"
        raise ApiError(400, "invalid_value", told, "truncate_prompt_tokens")
    prompts = await asyncio.to_thread(_tokens, body, ready)
    return [Request(tokens, max_tokens=0, embed=pooling, cache=False, salt=body.cache_salt) for tokens in prompts]


def answer_bytes(count: int, width: int) -> int:
    """About what the vectors take until they are sent."""
    return count * width * NUMBER_BYTES


def answer(body: EmbeddingBody, events: Sequence[Event], model: str) -> list[bytes]:
    """The body of the response, in pieces."""
    pieces = [b'{"object":"list","data":[']
    for i, event in enumerate(events):
        vector = encoded_vector(event, body)
        pieces.append(b"," * (i > 0) + b'{"object":"embedding","index":%d,"embedding":' % i + vector + b"}")
    count = sum(event.usage.prompt for event in events if event.usage)
    rest = {"model": model, "usage": {"prompt_tokens": count, "total_tokens": count}}
    return [*pieces, b"]," + encoded(rest)[1:]]


def encoded_vector(event: Event, body: EmbeddingBody) -> bytes:
    """The vector of an event as JSON: a list of numbers that read back as the same float32, or little-endian base64."""
    assert event.embedding is not None
    vector = event.embedding.double()
    if body.normalize:
        vector = vector / max(math.sqrt(float(vector @ vector)), 1e-12)
    numbers = array.array("f", vector.tolist())
    if body.encoding_format == "float":
        return b"[" + ",".join(map("%.9g".__mod__, numbers)).encode() + b"]"
    if sys.byteorder == "big":
        numbers.byteswap()
    return b'"' + base64.b64encode(numbers.tobytes()) + b'"'


async def _last(events: AsyncIterator[Event]) -> Event:
    """The event that ends a request. ApiError if it is no vector."""
    async for event in events:
        if event.embedding is not None:
            return event
        if event.finish_reason == "abort":
            raise ApiError.of(RequestError("closed", "the server is shutting down; ask another one, or again later"))
        if event.finish_reason is not None:
            raise ApiError.of(event.error or RequestError("failed", "the vector could not be computed"))
    raise ApiError.of(RequestError("failed", "the vector could not be computed"))


def _check_length(request: Request, longest: int) -> None:
    if len(request.prompt) > longest:
        told = f"{len(request.prompt):,} tokens of 'input' are more than the {longest:,} that there is memory for"
        mend = "shorten it, or ask for its last tokens with 'truncate_prompt_tokens'"
        raise ApiError(400, "context_length_exceeded", f"{told}; {mend}", "input")


def _tokens(body: EmbeddingBody, ready: Ready) -> list[list[int]]:
    """The tokens of each text, the last of them where that is asked for."""
    given: Prompt = body.input
    several = isinstance(given, list) and not isinstance(given[0], int)
    texts: Any = given if several else [given]
    tokenizer, most = ready.tokenizer, body.truncate_prompt_tokens
    beginning = tokenizer.beginning if body.add_special_tokens else ()
    try:
        found = [[*beginning, *tokenizer.encode(text)] if isinstance(text, str) else text for text in texts]
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"'input': {error}", "input") from None
    most = ready.longest if most == -1 else most
    return [(tokens or [tokenizer.eot])[-(most or len(tokens) or 1) :] for tokens in found]
