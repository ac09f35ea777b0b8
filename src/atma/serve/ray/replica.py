"""One replica: the server's application in an actor of Ray, from loading to draining."""
# pyright: reportMissingImports=false

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

from ray import serve  # pyright: ignore[reportAttributeAccessIssue] (where ray is not there)
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atma.serve.http.app import create_app
from atma.serve.http.logs import logs
from atma.serve.http.metrics import Metrics
from atma.serve.http.options import ServerOptions
from atma.serve.http.service import Service
from atma.serve.ray.forward import Forwarding


class Replica:
    """Ready once it is made; unhealthy, so that Ray starts another, when its engine has failed."""

    async def __init__(self, model: str, options: ServerOptions, forwarded: int | None) -> None:
        """`forwarded`: requests that may be passed on to other replicas at once, as `Forwarding` has it."""
        self._open = contextlib.ExitStack()
        self._open.enter_context(logs(options.access_log))
        self._service = Service(model, _own_folder(options))
        await self._service.load()
        self._metrics = Metrics(self._service.name)
        self._guard = create_app(self._service, self._metrics)
        self._guard.app = Forwarding(self._guard.app, forwarded, options.api_key is None)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            await self._guard(scope, receive, _without_id(send))

        return application

    async def check_health(self) -> None:
        """RuntimeError: the engine has failed."""
        if self._service.state != "ready":
            raise RuntimeError(f"the engine is {self._service.state}")

    async def metrics(self) -> tuple[str, bytes]:
        """This replica's name and metrics."""
        return serve.get_replica_context().replica_tag, self._metrics.text(await self._service.stats())

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """The response to a request that another replica passed on, as ASGI messages; closing this ends the request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self._answer(scope, body, messages))
        try:
            while (message := await messages.get()) is not None:
                ready = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    ready.append(message)
                yield ready
                if message is None:
                    break
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def __del__(self) -> None:
        """Called by Ray once no request is under way: kept states go to disk if there is a folder."""
        await self._service.close(abort=True)
        self._open.close()

    async def _answer(self, scope: Scope, body: bytes, messages: "asyncio.Queue[Message | None]") -> None:
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return unread.pop() if unread else await asyncio.get_running_loop().create_future()

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        try:
            await self._guard(scope, receive, send)
        finally:
            messages.put_nowait(None)


def _own_folder(options: ServerOptions) -> ServerOptions:
    """A folder of kept states has one engine: each replica takes that of its rank, which outlives it."""
    if options.cache_dir is None:
        return options
    rank = serve.get_replica_context().rank.rank
    return dataclasses.replace(options, cache_dir=options.cache_dir / f"replica-{rank}")


def _without_id(send: Send) -> Send:
    """Ray's proxy puts the request's id on every response."""

    async def without(message: Message) -> None:
        if message["type"] == "http.response.start":
            del MutableHeaders(scope=message)["x-request-id"]
        await send(message)

    return without
