"""The model behind the routes: loaded in a thread of its own, ready, draining, closed."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from atma.checkpoint import load_info
from atma.display import count_text
from atma.loading import base_folder, called, load
from atma.model import Model
from atma.narrow import numbers_in
from atma.serve.adapter_files import read_adapters
from atma.serve.adapter_names import named_folders
from atma.serve.asynchronous import AsyncEngine
from atma.serve.engine import Engine
from atma.serve.http.allocator import give_back
from atma.serve.http.errors import ApiError
from atma.serve.http.options import ServerOptions
from atma.serve.http.sampling import check_model
from atma.serve.http.templates import Renderer, find_template
from atma.serve.http.tokens import TokenNames
from atma.serve.request import Request
from atma.serve.tools.formats import Format, format_of
from atma.stop_tokens import declared
from atma.threads import settle
from atma.tokenizer import Tokenizer

R = TypeVar("R")
State = Literal["loading", "ready", "draining", "failed", "closed"]
RETRY = {"loading": 2, "draining": 5, "failed": 30, "closed": 5}


class Ready(NamedTuple):
    """What a loaded model answers with."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    names: TokenNames
    renderer: Renderer
    longest: int
    """Positions that there is memory for, of one text."""
    ends: tuple[int, ...]
    """Tokens that end the model's turns, besides end-of-text."""
    about: tuple[str, ...]
    """What to tell people of the model: its size, and what it was trained on."""
    form: Format | None = None
    """How it writes calls of tools."""


class Service:
    """One model. Its state is what /health says."""

    def __init__(self, path: str, options: ServerOptions) -> None:
        """ValueError: no such model, or adapters without names of their own."""
        self.path, self.folder, self.options = path, base_folder(path), options
        self.name = options.model_name or _name(self.folder)
        self.adapters = named_folders(options.adapter)
        """Folders of adapters, by the names that clients ask for."""
        if self.name in self.adapters:
            raise ValueError(f"--adapter {self.name}=…: the model itself is called so; name the adapter otherwise")
        self.created = int(time.time())
        self._ready: Ready | None = None
        self._state: State = "loading"

    @property
    def state(self) -> State:
        if self._state == "ready" and self._ready is not None and self._ready.engine.draining:
            return "failed"
        return self._state

    def require(self) -> Ready:
        """The model. ApiError 503 while there is none."""
        if self.state != "ready" or self._ready is None:
            raise self.unavailable()
        return self._ready

    def called(self, asked: str | None) -> str:
        """The name of the model that a request asks for, or of an adapter on it. ApiError: there is none of that."""
        check_model(asked, self.name, self.adapters)
        return self.name if asked is None else asked

    def wearing(self, requests: Sequence[Request], name: str) -> list[Request]:
        """These requests of the model, or adapter, of that name."""
        worn = name if name in self.adapters else None
        return [dataclasses.replace(request, adapter=worn) for request in requests]

    def unavailable(self) -> ApiError:
        return ApiError(503, self.state, f"the server is {self.state}; ask again later", None, RETRY.get(self.state, 1))

    async def load(self) -> None:
        """Load the model off the event loop. ValueError, OSError: it cannot be loaded, or there is no memory for it."""
        engine, about = await _in_thread(self._engine)
        ends = declared(self.folder, engine.tokenizer)
        renderer = Renderer(find_template(self.folder, self.options.chat_template))
        await renderer.start()
        longest = engine.store.longest_text
        names = TokenNames(engine.tokenizer)
        form = format_of(renderer.template.for_tools, self.options.tool_parser)
        give_back()
        self._ready = Ready(AsyncEngine(engine), engine.tokenizer, names, renderer, longest, ends, about, form)
        if self._state == "loading":
            self._state = "ready"

    async def stats(self) -> dict | None:
        """The engine's, if there is one."""
        return None if self._ready is None or self._state == "closed" else await self._ready.engine.stats()

    def drain(self) -> None:
        """Take no more requests; those under way go on."""
        self._state = "draining"

    async def close(self, abort: bool = False) -> None:
        """End the engine: once all is answered, or at once. Kept states go to disk if there is a folder."""
        self._state = "draining"
        if self._ready is not None:
            await (self._ready.engine.shutdown() if abort else self._ready.engine.drain())
            await self._ready.renderer.close()
        self._state = "closed"

    def _engine(self) -> tuple[Engine, tuple[str, ...]]:
        """And what to tell of the model."""
        options = self.options
        threads = settle(options.threads)
        loaded = load(self.path, getattr(torch, options.dtype), options.select, options.weights)
        if loaded.tokenizer is None:
            raise ValueError(f"{loaded.path}: no tokenizer.json; put the one that the model was trained with there")
        about = tuple(_about(loaded.model, self.folder))
        worn = read_adapters(self.adapters, self.path, loaded.model)
        engine = Engine(loaded.model, loaded.tokenizer, options.engine_config(), False, worn)
        logging.getLogger("atma.serve").info("%s", threads)
        return engine, about


async def _in_thread(work: Callable[[], R]) -> R:
    """The work's result; its thread ends with the process, so that nothing waits for it when all is to end."""
    future: Future[R] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="atma-load", daemon=True).start()
    return await asyncio.wrap_future(future)


def _about(model: Model, folder: Path) -> Iterator[str]:
    yield f"{count_text(numbers_in(model))} parameters"
    extra = load_info(folder).get("extra")
    length, tokens = _inside(extra, "recipe", "train", "length"), _inside(extra, "tokens")
    if isinstance(length, int):
        yield f"trained on rows of {length:,} tokens"
    if isinstance(tokens, int):
        yield f"{count_text(tokens)} tokens read in training"


def _inside(values: Any, *names: str) -> Any:
    """What lies in dictionaries under these names; None where it does not, for anybody may write `extra`."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _name(folder: Path) -> str:
    """What a model is called, as an answer can hold it."""
    return called(folder).encode("utf-8", "replace").decode() or "model"
