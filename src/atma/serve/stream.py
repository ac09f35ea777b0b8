"""The text of one request as it is written: an iterator that may be left at any time."""

from collections import deque
from threading import RLock
from types import TracebackType
from typing import Self

from atma.serve.completion import Completion
from atma.serve.engine import Engine
from atma.serve.guides import Prepared
from atma.serve.handle import Handle
from atma.serve.request import Request


class Steps:
    """An engine that several callers, also of several threads, move on in turn."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.lock = engine, RLock()
        self._left: deque[str] = deque()

    def submit(self, request: Request, tokens: Prepared) -> Handle:
        """Queue a prepared request. RequestError: the engine is closed."""
        with self.lock:
            return self.engine.submit(request, tokens)

    def step(self) -> None:
        """One step for everybody, without those who have left."""
        with self.lock:
            while self._left:
                self.engine.abort(self._left.popleft())
            self.engine.step()

    def leave(self, identity: str) -> None:
        """Take a request out with the next step. Does nothing else, so that it may be called from anywhere."""
        self._left.append(identity)

    def abort(self, identity: str) -> None:
        """Take a request out now, and free what it holds."""
        with self.lock:
            self.leave(identity)
            self.step()


class CompletionStream:
    """The pieces of a text, whole characters each, to be read with `for`.

    The model writes only while somebody reads: to break off, leave the loop. `close`, or `with`, then frees what it
    held at once; a stream that is only let go of is freed by the next call of its model. `completion` is the whole
    answer once it has ended.
    """

    def __init__(self, steps: Steps, request: Request, tokens: Prepared) -> None:
        self._steps, self._request, self._tokens = steps, request, tokens
        self._handle: Handle | None = None
        self._shown, self._closed = 0, False

    @property
    def completion(self) -> Completion | None:
        """The whole answer; None while it is being written, and if it was broken off."""
        done = self._handle is not None and self._handle.done and not self._closed
        return Completion.of(self._handle.outputs[0]) if done and self._handle is not None else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece. RequestError: the request could not go on."""
        if self._closed:
            raise StopIteration
        self._handle = self._handle or self._steps.submit(self._request, self._tokens)
        output = self._handle.outputs[0]
        while len(output.text) == self._shown and not self._handle.done:
            self._steps.step()
        piece, self._shown = output.text[self._shown :], len(output.text)
        if piece:
            return piece
        if output.error is not None:
            raise output.error
        raise StopIteration

    def close(self) -> None:
        """Break off; nothing more comes. Has no effect on a text that has ended."""
        if self._handle is not None and not self._handle.done:
            self._closed = True
            self._steps.abort(self._handle.id)
        elif self._handle is None:
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and not handle.done:
            self._steps.leave(handle.id)
