"""START HERE. The routes: what is asked, in the words of OpenAI's API, and what the engine makes of it."""

import asyncio
import dataclasses
import datetime
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

import atma
from atma.serve.http import affinity
from atma.serve.http import embeddings as vectors
from atma.serve.http.answers import Answer, ChatShape, TextShape
from atma.serve.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    SamplingBody,
    StreamOptions,
    TokenizeBody,
)
from atma.serve.http.call import Call
from atma.serve.http.errors import MESSAGES, RESPONSES, ApiError, Body, json_response
from atma.serve.http.feed import Feed
from atma.serve.http.front import moved
from atma.serve.http.guard import Guard
from atma.serve.http.messages import Messages
from atma.serve.http.metrics import TYPE, Metrics
from atma.serve.http.page import page
from atma.serve.http.refusals import told
from atma.serve.http.responses.routes import Responses
from atma.serve.http.responses.schemas import DeletedAnswer, ItemsAnswer, ResponseAnswer
from atma.serve.http.room import Room, gathered_bytes, most_tokens
from atma.serve.http.sampling import chat_request, completion_requests
from atma.serve.http.schemas import (
    MESSAGE_REFUSALS,
    REFUSALS,
    STREAMED,
    ChatAnswer,
    CountAnswer,
    DetokenizeAnswer,
    EmbeddingAnswer,
    HealthAnswer,
    MessageAnswer,
    ModelAnswer,
    ModelsAnswer,
    TextAnswer,
    TokenizeAnswer,
    TokenizerAnswer,
    describe,
)
from atma.serve.http.service import Ready, Service
from atma.serve.http.streams import EventStream, streamed, while_there, whole
from atma.serve.http.templates import PLAIN, chat_tokens
from atma.serve.http.tokens import tokenizer_info
from atma.serve.http.tooling import Tooling, ToolShape, judge
from atma.serve.request import Request as EngineRequest
from atma.serve.request import RequestError
from atma.serve.tools.formats import knows_tools
from atma.serve.tools.grammar import special

MOST_TOGETHER = 128
COUNT = f"{MESSAGES}/count_tokens"


def create_app(service: Service, metrics: Metrics | None = None) -> Guard:
    """The server as an ASGI application."""
    metrics = metrics or Metrics(service.name)
    app = FastAPI(title="atma", version=atma.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    routes = Routes(service, metrics)
    responses = Responses(routes)
    post, get = ["POST"], ["GET"]
    others = {"/health": REFUSALS | {503: {"model": HealthAnswer}}}
    others |= dict.fromkeys(("/v1/chat/completions", "/v1/completions", RESPONSES), REFUSALS | STREAMED)
    others |= {MESSAGES: MESSAGE_REFUSALS | STREAMED, COUNT: MESSAGE_REFUSALS}
    for path, route, methods, answer in (
        ("/v1/chat/completions", routes.chat, post, ChatAnswer),
        ("/v1/completions", routes.completions, post, TextAnswer),
        ("/v1/embeddings", routes.embeddings, post, EmbeddingAnswer),
        ("/v1/models", routes.models, get, ModelsAnswer),
        ("/v1/models/{name:path}", routes.model, get, ModelAnswer),
        (RESPONSES, responses.create, post, ResponseAnswer),
        (RESPONSES + "/{response_id}", responses.told, get, ResponseAnswer),
        (RESPONSES + "/{response_id}", responses.forget, ["DELETE"], DeletedAnswer),
        (RESPONSES + "/{response_id}/input_items", responses.items, get, ItemsAnswer),
        (MESSAGES, Messages(routes).answer, post, MessageAnswer),
        (COUNT, Messages(routes).count, post, CountAnswer),
        ("/tokenize", routes.tokenize, post, TokenizeAnswer),
        ("/detokenize", routes.detokenize, post, DetokenizeAnswer),
        ("/tokenizer_info", routes.tokenizer_info, get, TokenizerAnswer),
        ("/health", routes.health, get, HealthAnswer),
    ):
        refused = others.get(path, REFUSALS)
        app.add_api_route(path, route, methods=methods, response_model=answer, responses=refused)
    app.add_api_route("/metrics", routes.metrics_text, methods=get, response_class=PlainTextResponse)
    app.add_api_route("/", routes.page, methods=get, include_in_schema=False)
    describe(app)
    for kind in (RequestValidationError, HTTPException, ApiError, Exception):
        app.add_exception_handler(kind, told)
    return Guard(app, metrics, service.options)


class Routes:
    """Every route is a method."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.room = Room(service.options.answer_bytes)
        self.embedder = vectors.Embedder(max(1, service.options.max_rows // 2))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        asked, shape, name = await self.asked(body, request)
        return await self.answered(
            [asked], Answer(shape, self.service.called(body.model), 1, body.n), body, request, name
        )

    async def asked(self, body: ChatBody, request: Request, copies: int = 0) -> tuple[EngineRequest, ChatShape, str]:
        """A conversation as the engine is asked it, its answer's shape, and the conversation's name; `copies`: how
        often the answer is in memory at its end, 0: once, and only if it is not streamed."""
        ready = self.ready(body)
        template, form = ready.renderer.template, body.response_format or body.structured_outputs
        tooling = Tooling(body, ready.form, knows_tools(template.for_tools), ready.tokenizer)
        structure = tooling.structure(form)
        tokens = await while_there(request.receive, self.rendered(body, tooling))
        shape = ChatShape(ready.names, body.logprobs, [tokens] if body.return_token_ids else None, body.begun)
        if tooling.form is not None:
            fits = await while_there(request.receive, judge(ready.engine, tooling.either(form)))
            shape = ToolShape.of(tooling, tooling.form, shape, fits)
        most = max(1, ready.longest - len(tokens) + 1)
        shape.copies = copies or 1
        if copies or not body.stream:
            most = min(most, most_tokens(self.room.total, shape, body.best, body.n))
        lengths = most, self.service.options.max_tokens
        asked = chat_request(body, tokens, template.stop, ready.ends, *lengths)
        asked = dataclasses.replace(asked, structure=structure, spelled=tooling.spelled)
        return asked, shape, affinity.of_messages(body.messages, body.cache_salt)

    async def rendered(self, body: ChatBody, tooling: Tooling | None = None) -> list[int]:
        """The tokens of a conversation, of which the template is told the tools."""
        ready = self.ready(body)
        if tooling is None:
            tooling = Tooling(body, ready.form, knows_tools(ready.renderer.template.for_tools), ready.tokenizer)
        rendering = body.rendering._replace(tools=tooling.given)
        return await chat_tokens(ready.renderer, ready.tokenizer, body.messages, rendering)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """Continue one or several texts."""
        ready = self.ready(body)
        requests = completion_requests(body, ready.ends)
        if len(requests) * body.n > MOST_TOGETHER:
            together = f"{len(requests)} prompts with {body.n} choices each"
            raise ApiError(400, "invalid_value", f"{together} are more than {MOST_TOGETHER} answers", "n")
        spelled = not body.skip_special_tokens or (body.echo and not isinstance(requests[0].prompt, str))
        ids = await asyncio.to_thread(prepared, ready, requests) if body.return_token_ids else None
        shape = TextShape(ready.names, body.logprobs is not None, body.echo, spelled, ids)
        name = affinity.of_prompt(body.prompt, body.cache_salt)
        answer = Answer(shape, self.service.called(body.model), len(requests), body.n)
        return await self.answered(requests, answer, body, request, name)

    async def embeddings(self, body: vectors.EmbeddingBody, request: Request) -> Response:
        """A vector for each text."""
        call, ready = request.state.call, self.ready(body)
        call.model = self.service.called(body.model)
        asked = await vectors.requests_of(body, ready, self.service.options.pooling)
        asked = self.service.wearing(asked, call.model)
        width = ready.engine.engine.served.config.width
        size = vectors.answer_bytes(len(asked), width)
        await while_there(request.receive, call.hold(self.room, size, "input"))
        events = await while_there(request.receive, self.embedder.vectors(ready, asked))
        call.sizes = sum(event.usage.prompt for event in events if event.usage), 0, 0
        return Body(await asyncio.to_thread(vectors.answer, body, events, call.model))

    async def models(self) -> Response:
        """The model, and adapters on it."""
        names = (self.service.name, *self.service.adapters)
        pages = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
        return json_response({"object": "list", "data": [self._model(name) for name in names]} | pages)

    async def model(self, name: str) -> Response:
        """The model, or an adapter on it, by its name."""
        return json_response(self._model(self.service.called(name)))

    async def tokenize(self, body: TokenizeBody, request: Request) -> Response:
        """Tokens of a text, as a completion reads it, or of messages, as a chat does.

        What is nothing but the name of a special token, and nothing to be added, is that token: so clients that know
        tokens by name learn their ids.
        """
        ready = self.ready(body)
        if body.messages is None:
            text = body.prompt or ""
            try:
                tokens = await asyncio.to_thread(ready.tokenizer.encode, text)
            except ValueError as error:
                raise ApiError(400, "invalid_value", f"'prompt': {error}", "prompt") from None
            alone = None if body.add_special_tokens else special(text, ready.tokenizer)
            tokens = tokens if alone is None else [alone]
            tokens = [*ready.tokenizer.beginning, *tokens] if body.add_special_tokens else tokens
        else:
            rendering = body.rendering._replace(tools=[tool.given for tool in body.tools] or None)
            work = chat_tokens(ready.renderer, ready.tokenizer, body.messages, rendering)
            tokens = await while_there(request.receive, work)
        return json_response({"count": len(tokens), "max_model_len": ready.longest, "tokens": tokens})

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """The text of tokens."""
        ready = self.ready(body)
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

    async def page(self, request: Request) -> Response:
        """The chat page."""
        return moved(request.scope) or page()

    def ready(self, body: SamplingBody | TokenizeBody | DetokenizeBody | vectors.EmbeddingBody) -> Ready:
        """The model that a body asks for. ApiError: there is none, or not now."""
        self.service.called(body.model)
        return self.service.require()

    async def answered(
        self,
        requests: list[EngineRequest],
        answer: Answer,
        body: SamplingBody,
        request: Request,
        name: str,
        kind: type[EventStream] = EventStream,
    ) -> Response:
        """The engine's answer, whole or as a stream of that kind; `name` is the conversation's."""
        call: Call = request.state.call
        ready, config = self.service.require(), self.service.options.engine_config()
        call.model = self.service.called(body.model)
        requests = self.service.wearing(requests, call.model)
        sizes = ready.longest, config.max_rows, config.unread_bytes
        gathered = gathered_bytes(requests, answer.shape, answer.gathers or not body.stream, *sizes)
        await while_there(request.receive, call.hold(self.room, gathered))
        feed = Feed(ready.engine, requests)
        if body.stream:
            work = streamed(feed, answer, call, body.stream_options or StreamOptions(), kind)
        else:
            work = whole(feed, answer, call)
        response = await while_there(request.receive, work)
        response.headers[affinity.HEADER] = affinity.given(request.headers.get(affinity.HEADER)) or name
        return response

    def _model(self, name: str) -> dict[str, Any]:
        service = self.service
        begun = datetime.datetime.fromtimestamp(service.created, datetime.UTC).isoformat()
        model = {"id": name, "object": "model", "created": service.created, "owned_by": "atma"}
        model |= {"type": "model", "display_name": name, "created_at": begun}
        model |= {"parent": service.name} if name in service.adapters else {}
        if service.state != "ready":
            return model
        ready = service.require()
        told = {"chat_template": ready.renderer.template.source != PLAIN, "description": list(ready.about)}
        return model | {"max_model_len": ready.longest} | told


def prepared(ready: Ready, requests: list[EngineRequest]) -> list[list[int]]:
    """The tokens of each prompt. ApiError: one is refused."""
    try:
        return [ready.engine.engine.prepare(request) for request in requests]
    except RequestError as error:
        raise ApiError.of(error) from None
