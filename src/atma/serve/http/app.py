"""START HERE. The routes: what is asked, in the words of OpenAI's API, and what the engine makes of it."""

import asyncio
import dataclasses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import atma
from atma.serve.http import affinity
from atma.serve.http import embeddings as vectors
from atma.serve.http.answers import Answer, ChatShape, Shape, TextShape
from atma.serve.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    SamplingBody,
    StreamOptions,
    TokenizeBody,
)
from atma.serve.http.call import Call
from atma.serve.http.errors import ApiError, Body, ClientGone, Silence, json_response
from atma.serve.http.feed import Feed
from atma.serve.http.guard import LOG, Guard
from atma.serve.http.metrics import TYPE, Metrics
from atma.serve.http.page import page
from atma.serve.http.room import Room, gathered_bytes, most_tokens
from atma.serve.http.sampling import chat_request, check_model, completion_requests
from atma.serve.http.service import Ready, Service
from atma.serve.http.streams import streamed, while_there, whole
from atma.serve.http.templates import chat_tokens
from atma.serve.http.tokens import tokenizer_info
from atma.serve.http.tooling import Tooling, ToolShape
from atma.serve.request import Request as EngineRequest
from atma.serve.request import RequestError
from atma.serve.tools.formats import knows_tools

NAMES = {404: ("not_found", "there is no such route"), 405: ("method_not_allowed", "the route has other methods")}
MOST_TOGETHER, LONGEST_NAME = 128, 64


def create_app(service: Service, metrics: Metrics | None = None) -> Guard:
    """The server as an ASGI application."""
    metrics = metrics or Metrics()
    app = FastAPI(title="atma", version=atma.__version__, docs_url=None, redoc_url=None)
    routes = Routes(service, metrics)
    post, get = ["POST"], ["GET"]
    app.add_api_route("/v1/chat/completions", routes.chat, methods=post)
    app.add_api_route("/v1/completions", routes.completions, methods=post)
    app.add_api_route("/v1/embeddings", routes.embeddings, methods=post)
    app.add_api_route("/v1/models", routes.models, methods=get)
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=get)
    app.add_api_route("/tokenize", routes.tokenize, methods=post)
    app.add_api_route("/detokenize", routes.detokenize, methods=post)
    app.add_api_route("/tokenizer_info", routes.tokenizer_info, methods=get)
    app.add_api_route("/health", routes.health, methods=get)
    app.add_api_route("/metrics", routes.metrics_text, methods=get)
    app.add_api_route("/", routes.page, methods=get, include_in_schema=False)
    for kind in (RequestValidationError, HTTPException, ApiError, Exception):
        app.add_exception_handler(kind, _told)
    return Guard(app, metrics, service.options)


class Routes:
    """Every route is a method."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.room = Room(service.options.answer_bytes)
        self.embedder = vectors.Embedder(max(1, service.options.max_rows // 2))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        ready = self._ready(body)
        template = ready.renderer.template
        tooling = Tooling(body, ready.form, knows_tools(template.text), ready.tokenizer)
        structure = tooling.structure(body.response_format or body.structured_outputs)
        rendering = body.rendering._replace(tools=tooling.given)
        work = chat_tokens(ready.renderer, ready.tokenizer, body.messages, rendering)
        tokens = await while_there(request.receive, work)
        shape = ChatShape(ready.names, body.logprobs, [tokens] if body.return_token_ids else None, body.begun)
        shape = shape if tooling.form is None else ToolShape.of(tooling.form, body.parallel_tool_calls, shape)
        most = max(1, ready.longest - len(tokens) + 1)
        if not body.stream:
            most = min(most, most_tokens(self.room.total, shape, body.best, body.n))
        lengths = most, self.service.options.max_tokens
        asked = chat_request(body, tokens, template.stop, ready.ends, *lengths)
        asked = dataclasses.replace(asked, structure=structure, special=asked.special or tooling.spelled)
        name = affinity.of_messages(body.messages, body.cache_salt)
        return await self._answered([asked], shape, body, request, name)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue one or several texts."""
        ready = self._ready(body)
        requests = completion_requests(body, ready.ends)
        if len(requests) * body.n > MOST_TOGETHER:
            together = f"{len(requests)} prompts with {body.n} choices each"
            raise ApiError(400, "invalid_value", f"{together} are more than {MOST_TOGETHER} answers", "n")
        spelled = not body.skip_special_tokens or (body.echo and not isinstance(requests[0].prompt, str))
        ids = await asyncio.to_thread(prepared, ready, requests) if body.return_token_ids else None
        shape = TextShape(ready.names, body.logprobs is not None, body.echo, spelled, ids)
        name = affinity.of_prompt(body.prompt, body.cache_salt)
        return await self._answered(requests, shape, body, request, name)

    async def embeddings(self, body: vectors.EmbeddingBody, request: Request) -> Response:
        """A vector for each text."""
        call, ready = request.state.call, self._ready(body)
        asked = await vectors.requests_of(body, ready, self.service.options.pooling)
        width = ready.engine.engine.served.config.width
        await while_there(request.receive, call.hold(self.room, vectors.answer_bytes(len(asked), width)))
        events = await while_there(request.receive, self.embedder.vectors(ready, asked))
        call.sizes = sum(event.usage.prompt for event in events if event.usage), 0, 0
        return Body(await asyncio.to_thread(vectors.answer, body, events, self.service.name))

    async def models(self) -> Response:
        """The one model."""
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model by its name."""
        check_model(name, self.service.name)
        return json_response(self._model())

    async def tokenize(self, body: TokenizeBody, request: Request) -> Response:
        """Tokens of a text, as a completion reads it, or of messages, as a chat does."""
        ready = self._ready(body)
        if body.messages is None:
            try:
                tokens = await asyncio.to_thread(ready.tokenizer.encode, body.prompt or "")
            except ValueError as error:
                raise ApiError(400, "invalid_value", f"'prompt': {error}", "prompt") from None
            tokens = [*ready.tokenizer.beginning, *tokens] if body.add_special_tokens else tokens
        else:
            rendering = body.rendering._replace(tools=[tool.given for tool in body.tools] or None)
            work = chat_tokens(ready.renderer, ready.tokenizer, body.messages, rendering)
            tokens = await while_there(request.receive, work)
        return json_response({"count": len(tokens), "max_model_len": ready.longest, "tokens": tokens})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of tokens."""
        ready = self._ready(body)
        try:
            return json_response({"prompt": await asyncio.to_thread(ready.tokenizer.decode, body.tokens)})
        except ValueError as error:
            raise ApiError(400, "invalid_value", f"'tokens': {error}", "tokens") from None

    async def tokenizer_info(self) -> Response:
        """What the tokenizer and the chat template are."""
        ready = self.service.require()
        return json_response(tokenizer_info(ready.tokenizer, ready.renderer.template, ready.ends, ready.longest))

    async def health(self) -> Response:
        """200 when requests are taken."""
        state = self.service.state
        ok = state == "ready"
        headers = {} if ok else {"retry-after": str(self.service.unavailable().retry_after)}
        return json_response({"status": state, "model": self.service.name}, 200 if ok else 503, headers)

    async def metrics_text(self) -> Response:
        """For Prometheus."""
        return Response(self.metrics.text(await self.service.stats()), media_type=TYPE)

    async def page(self) -> Response:
        """The chat page."""
        return page()

    def _ready(self, body: SamplingBody | TokenizeBody | DetokenizeBody | vectors.EmbeddingBody) -> Ready:
        check_model(body.model, self.service.name)
        return self.service.require()

    async def _answered(
        self, requests: list[EngineRequest], shape: Shape, body: SamplingBody, request: Request, name: str
    ) -> Response:
        call: Call = request.state.call
        ready, config = self.service.require(), self.service.options.engine_config()
        sizes = ready.longest, config.max_rows, config.unread_bytes
        gathered = gathered_bytes(requests, shape, not body.stream, *sizes)
        await while_there(request.receive, call.hold(self.room, gathered))
        feed = Feed(ready.engine, requests)
        answer = Answer(shape, self.service.name, len(requests), body.n)
        if body.stream:
            work = streamed(feed, answer, call, body.stream_options or StreamOptions())
        else:
            work = whole(feed, answer, call)
        response = await while_there(request.receive, work)
        response.headers[affinity.HEADER] = affinity.given(request.headers.get(affinity.HEADER)) or name
        return response

    def _model(self) -> dict[str, Any]:
        service = self.service
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "atma"}
        return model | ({"max_model_len": service.require().longest} if service.state == "ready" else {})


def prepared(ready: Ready, requests: list[EngineRequest]) -> list[list[int]]:
    """The tokens of each prompt. ApiError: one is refused."""
    try:
        return [ready.engine.engine.prepare(request) for request in requests]
    except RequestError as error:
        raise ApiError.of(error) from None


async def _told(request: Request, error: Exception) -> Response:
    call: Call = request.state.call
    if isinstance(error, ClientGone):
        return Silence()
    known = isinstance(error, ApiError | RequestValidationError | HTTPException)
    if not known:
        LOG.error("id=%s: %s", call.id, type(error).__name__, exc_info=error)
    call.error = _api_error(error) if known else ApiError.unforeseen(call.id)
    return call.error.response()


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    assert isinstance(error, HTTPException)
    code, message = NAMES.get(error.status_code, ("invalid_request", str(error.detail)))
    told = ApiError(error.status_code, code, message)
    told.allow = (error.headers or {}).get("Allow")
    return told


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", "the body is not JSON")
    place = [part for part in first["loc"] if part != "body"]
    name = ".".join(map(str, place))
    message = first["msg"].removeprefix("Value error, ")
    message = f"'{name}': {message}" if name else message
    field = getattr(first.get("ctx", {}).get("error"), "parameter", None)
    return ApiError(400, "invalid_value", message, _sayable(str(place[0]) if place else field))


def _sayable(name: str | None) -> str | None:
    """The beginning of a name that a client gave."""
    return None if name is None else name[:LONGEST_NAME]
