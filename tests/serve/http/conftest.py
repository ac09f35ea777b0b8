"""A server in this process, over a small model with random weights and bytes as tokens."""

import asyncio
import contextlib
import copy
import dataclasses
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from atma.checkpoint import save_model
from atma.lora import LoraConfig, adapted_layers, attach, save_adapters
from atma.serve.http.options import ServerOptions
from atma.serve.http.server import Process, listening
from atma.serve.http.service import Service
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import random_model

OPTIONS = ServerOptions(model_name="tiny", memory_budget="24MiB", max_rows=8, max_waiting=64, drain_seconds=5)


class Live:
    """A server with its event loop in a thread; `stop` drains it."""

    def __init__(self, folder, options: ServerOptions = OPTIONS) -> None:
        sock = listening("127.0.0.1", 0)
        self.port = sock.getsockname()[1]
        self.service = Service(str(folder), options)
        self.process = Process(self.service)
        self.loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(sock)))
        self._thread.start()
        while self.service.state == "loading" and self._thread.is_alive():
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        if self.loop is not None and self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.process.end)
        self._thread.join(300)
        assert not self._thread.is_alive()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> "Told":
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            kind = {} if data is None else {"content-type": "application/json"}
            connection.request(method, path, data, kind | (headers or {}))
            response = connection.getresponse()
            return Told(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> "Told":
        return self.ask("POST", path, body, headers)

    def raw(self, data: bytes, seconds: float = 20) -> bytes:
        """All that comes back for these bytes until the server closes, or is silent for so long after an answer."""
        told = b""
        wire = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        with wire, contextlib.suppress(ConnectionError, TimeoutError):
            wire.sendall(data)
            while part := wire.recv(65536):
                told += part
        return told

    def stats(self) -> dict[str, Any]:
        assert self.loop is not None
        return asyncio.run_coroutine_threadsafe(self.service.stats(), self.loop).result(300) or {}

    def tasks(self) -> int:
        """Asyncio tasks of the server."""
        assert self.loop is not None
        return len(asyncio.all_tasks(self.loop))

    def settled(self, seconds: float = 300) -> bool:
        """Whether, before long, nothing is under way."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            stats = self.stats()
            if not stats["running"] + stats["waiting"] and not self.process.server.server_state.tasks:
                return True
            time.sleep(0.02)
        return False

    async def _run(self, sock: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        await self.process.run(sock)


class Told:
    """A response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error of a refusal, checked to be one."""
        error = self.json()["error"]
        assert set(error) == ({"message", "type"} if "type" in self.json() else {"message", "type", "param", "code"})
        assert error["message"]
        return error

    def events(self) -> list[Any]:
        """The data of a stream, its end checked and left out."""
        parts = self.body.decode().split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        assert all(part.startswith(("data: ", ":")) for part in parts[:-1])
        return [json.loads(part[6:]) for part in parts[:-2] if part.startswith("data: ")]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder."""
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_model(path, random_model(), byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def live(folder) -> Iterator[Live]:
    server = Live(folder)
    yield server
    server.stop()


TOOL_TEMPLATE = """{%- if tools %}{{ tools | tojson }}<tool_call>{% endif -%}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def full_folders(tmp_path_factory):
    """A model folder whose template knows tools, and an adapter on it."""
    place = tmp_path_factory.mktemp("full")
    model = copy.deepcopy(random_model())
    save_model(place / "tiny", model, byte_tokenizer())
    (place / "tiny" / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    attached = attach(model, LoraConfig(4), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_b.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    save_adapters(place / "poet", model, attached, str(place / "tiny"))
    return place


@pytest.fixture(scope="module")
def full(full_folders) -> Iterator[Live]:
    """A server that does all there is: tools, structure, and an adapter called `poet`."""
    adapter = (f"poet={full_folders / 'poet'}",)
    server = Live(full_folders / "tiny", dataclasses.replace(OPTIONS, adapter=adapter, max_tokens=16))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=300) as opened:
        yield opened
