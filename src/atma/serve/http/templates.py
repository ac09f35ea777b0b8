"""Chats as the model reads them: which template, its rendering in another process, and its tokens.

A message cannot speak for the template: what spells a special token inside a message is encoded as ordinary characters,
and only what the template itself writes becomes special tokens.
"""

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from atma.serve.http.bodies import Message
from atma.serve.http.errors import ApiError
from atma.stop_tokens import read_settings, token_text
from atma.tokenizer import Tokenizer

RENDER_SECONDS = 5.0
START_SECONDS = 30.0
MOST_BYTES = 64 << 20
WORKER = Path(__file__).with_name("template_worker.py")
DEFAULT_STOP = ("\nUser:", "\nAssistant:", "\nSystem:")


TOKEN_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Template(NamedTuple):
    """A template's text, where it is from, what else it may name, the texts that end its answers, and whether a chat
    begins with end-of-text all the same. A template of a folder writes all tokens itself, as in transformers."""

    text: str
    source: str
    names: dict[str, str]
    stop: tuple[str, ...]
    after_end: bool = False


def find_template(folder: Path, chosen: Path | None = None) -> Template:
    """The chosen file, else the folder's own (chat_template.jinja, tokenizer_config.json), else the plain dialogue.

    ValueError for a file that cannot be read.
    """
    settings = read_settings(folder / "tokenizer_config.json")
    names = {name: text for name in TOKEN_NAMES if (text := token_text(settings.get(name)))}
    for path in filter(None, (chosen, folder / "chat_template.jinja")):
        if path == chosen or path.is_file():
            return Template(_text(path), str(path), names, ())
    own = settings.get("chat_template")
    if isinstance(own, list):
        own = next((t.get("template") for t in own if isinstance(t, dict) and t.get("name") == "default"), None)
    if isinstance(own, str):
        return Template(own, str(folder / "tokenizer_config.json"), names, ())
    text = files("atma.serve.http").joinpath("default.jinja").read_text(encoding="utf-8")
    return Template(text, "plain dialogue", {}, DEFAULT_STOP, after_end=True)


class Renderer:
    """Renders one template, one request at a time, in a process that is begun when needed and ended when it is slow."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """ValueError if the template cannot be read."""
        async with self._turn:
            await self._begin()

    async def render(self, messages: Sequence[dict[str, Any]], prompted: bool) -> str:
        """The text of a chat. ApiError if the template does not render it."""
        request = self.template.names | {"messages": messages, "add_generation_prompt": prompted}
        request |= {"tools": None, "documents": None}
        async with self._turn:
            try:
                process = self._process or await self._begin()
                async with asyncio.timeout(RENDER_SECONDS):
                    answer = await _ask(process, request)
            except (TimeoutError, OSError, EOFError):
                await self._end()
                raise _failed("it took too long or too much") from None
            except ValueError as error:
                await self._end()
                raise _failed(str(error)) from None
            except asyncio.CancelledError:
                await self._end()
                raise
        if "error" in answer:
            raise _failed(answer["error"])
        return answer["text"]

    async def close(self) -> None:
        async with self._turn:
            await self._end()

    async def _begin(self) -> asyncio.subprocess.Process:
        pipe, nothing = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        command = [sys.executable, "-I", str(WORKER)]
        environment = {"PATH": os.defpath}
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=nothing, env=environment, start_new_session=True
        )
        answer = {"error": "the process that renders it does not start"}
        try:
            async with asyncio.timeout(START_SECONDS):
                await _told(self._process)
            answer = {"error": "it takes too long or too much to compile"}
            async with asyncio.timeout(RENDER_SECONDS):
                answer = await _ask(self._process, {"template": self.template.text})
        except (TimeoutError, OSError, EOFError):
            pass
        except BaseException:
            await self._end()
            raise
        if "error" in answer:
            await self._end()
            raise ValueError(f"{self.template.source}: the chat template cannot be used: {answer['error']}")
        return self._process

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()


async def chat_tokens(
    renderer: Renderer, tokenizer: Tokenizer, messages: Sequence[Message], prompted: bool = True
) -> list[int]:
    """The tokens of a chat: those that transformers gives, after end-of-text for the plain dialogue."""
    specials = Specials(tokenizer, messages)
    plain = [
        {"role": "system" if m.role == "developer" else m.role, "content": specials.hidden(m.content)}
        | ({"name": specials.hidden(m.name)} if m.name else {})
        for m in messages
    ]
    text = await renderer.render(plain, prompted)
    try:
        tokens = await asyncio.to_thread(specials.tokens, text)
        return [tokenizer.eot, *tokens] if renderer.template.after_end or not tokens else tokens
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"'messages': {error}", "messages") from None


class Specials:
    """Special tokens as they are spelled, and a sign, in no message, that hides them in messages."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        self.tokenizer = tokenizer
        found = tokenizer.backend.get_added_tokens_decoder().items()
        self._names = sorted((token.content for _, token in found if token.special), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        used = set().union(*(set(m.content) | set(m.name or "") for m in messages))
        self._sign = next(c for c in map(chr, range(0xE000, 0x10FFFE)) if c not in used)

    def hidden(self, text: str) -> str:
        """A message that spells no special token."""
        return self._spelled.sub(lambda found: f"{self._sign}{self._names.index(found[0])}{self._sign}", text)

    def tokens(self, text: str) -> list[int]:
        """Of a rendered text: special tokens where it spells them, what was hidden in ordinary characters again."""
        hidden = {f"{self._sign}{number}{self._sign}": name for number, name in enumerate(self._names)}
        return self.tokenizer.encode_rendered(text, hidden)


async def _ask(process: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None
    data = json.dumps(request).encode()
    process.stdin.write(len(data).to_bytes(4, "big") + data)
    await process.stdin.drain()
    return await _told(process)


async def _told(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    size = int.from_bytes(await process.stdout.readexactly(4), "big")
    if size > MOST_BYTES:
        raise ValueError("it is too long")
    return json.loads(await process.stdout.readexactly(size))


def _failed(reason: str) -> ApiError:
    return ApiError(400, "chat_template", f"the chat template does not render these messages: {reason}", "messages")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
