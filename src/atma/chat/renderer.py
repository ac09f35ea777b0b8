"""Renders one chat template, a chat at a time, in a process of its own (worker.py), and waits for it.

The server has a renderer of its own beside this one, which does not wait (atma.serve.http.templates).
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atma.chat.template import WORKER, Template

RENDER_SECONDS = 10.0
START_SECONDS = 60.0
MOST_BYTES = 1 << 30


class Renderer:
    """A template's process, to be closed: use it with `with`. ValueError if the template cannot be read."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._process: subprocess.Popen[bytes] | None = None
        self._begin()

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        process.wait()

    def render(self, messages: Sequence[Mapping[str, Any]], prompted: bool, marks: tuple[str, str] = ("", "")) -> str:
        """The text of a chat; `prompted` with the beginning of an answer behind it. `marks` go around what the template
        says to learn. ValueError if the template does not render it; a new process renders the next chat."""
        request: dict[str, Any] = self.template.names | {"messages": messages, "add_generation_prompt": prompted}
        request |= {"tools": None, "documents": None, "generation_begin": marks[0], "generation_end": marks[1]}
        if self._process is None:
            self._begin()
        with self._ended_by_errors("the chat template does not render it"):
            answer = self._ask(request)
        if "error" in answer:
            raise ValueError(f"the chat template does not render it: {answer['error']}")
        return answer["text"]

    def _begin(self) -> None:
        command, pipe, nothing = [sys.executable, "-I", str(WORKER)], subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=nothing,
            env={"PATH": os.defpath},
            start_new_session=True,
            bufsize=0,
        )
        with self._ended_by_errors(f"{self.template.source}: the chat template cannot be used"):
            self._told(START_SECONDS)
            answer = self._ask({"template": self.template.text})
            if "error" in answer:
                raise ValueError(answer["error"])

    @contextlib.contextmanager
    def _ended_by_errors(self, problem: str) -> Iterator[None]:
        """End the process with whatever goes wrong, Ctrl-C too: what it still writes would be taken for the answer to
        the next request. ValueError, behind `problem`, where the process or the template is at fault."""
        try:
            yield
        except (OSError, EOFError, ValueError) as error:
            self.close()
            raise ValueError(f"{problem}: {error}") from None
        except BaseException:
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        data = json.dumps(request).encode()
        self._process.stdin.write(len(data).to_bytes(4, "big"))
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) or 0 :]
        return self._told(RENDER_SECONDS)

    def _told(self, seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds
        size = int.from_bytes(self._read(4, until), "big")
        if size > MOST_BYTES:
            raise ValueError("it is too long")
        return json.loads(self._read(size, until))

    def _read(self, count: int, until: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        handle, data = self._process.stdout.fileno(), b""
        while len(data) < count:
            if not select.select([handle], [], [], max(0.0, until - time.monotonic()))[0]:
                raise OSError("it takes too long")
            part = os.read(handle, min(count - len(data), 1 << 20))
            if not part:
                raise EOFError("it ended, for it takes too much memory, or opens what it may not")
            data += part
        return data
