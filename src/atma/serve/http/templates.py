"""Chats as the model reads them: the rendering of their template (atma.chat) in another process, and their tokens."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from atma.chat.template import PLAIN, WORKER, Specials, Template, find_template
from atma.serve.http.bodies import Message
from atma.serve.http.errors import ApiError
from atma.serve.http.rendering import Rendering, hidden_in, texts_in
from atma.tokenizer import Tokenizer

RENDER_SECONDS = 5.0
START_SECONDS = 30.0
MOST_BYTES = 64 << 20
DEFAULT = Rendering()


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

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        prompted: bool,
        named: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The text of a chat; `named`: what else the template is given. ApiError if it does not render it."""
        request = {**(named or {}), **self.template.names, "messages": messages, "add_generation_prompt": prompted}
        request |= {"tools": tools, "documents": None}
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
                texts = {"template": self.template.text, "tool_use": self.template.tool_use}
                answer = await _ask(self._process, texts)
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
    renderer: Renderer, tokenizer: Tokenizer, messages: Sequence[Message], how: Rendering = DEFAULT
) -> list[int]:
    """The tokens of a chat: those that transformers gives, after end-of-text for the plain dialogue."""
    try:
        how.check(renderer.template.names)
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"'chat_template_kwargs': {error}", "chat_template_kwargs") from None
    turns = [_turn(message) for message in messages]
    specials = Specials(tokenizer, [*texts_in(turns), *how.texts])
    plain = [hidden_in(turn, specials) | {"role": turn["role"]} for turn in turns]
    if how.continued:
        plain[-1]["content"] += specials.mark
    text = await renderer.render(plain, how.prompted, how.hidden(specials), hidden_in(how.tools, specials))
    if how.continued:
        text = _open(text, specials.mark)
    try:
        tokens = await asyncio.to_thread(specials.tokens, text)
        return [tokenizer.eot, *tokens] if renderer.template.after_end or not tokens else tokens
    except ValueError as error:
        raise ApiError(400, "invalid_value", f"'messages': {error}", "messages") from None


def _turn(message: Message) -> dict[str, Any]:
    """A message as a template has it."""
    turn = {"role": "system" if message.role == "developer" else message.role, "content": message.content}
    given = {"name": message.name, "tool_calls": message.tool_calls, "tool_call_id": message.tool_call_id}
    return turn | {key: value for key, value in given.items() if value}


def _open(text: str, mark: str) -> str:
    """A rendered chat up to the end of its last message, where the mark stands."""
    end = text.rfind(mark)
    if end < 0:
        told = "'continue_final_message': the chat template does not show the last message as it is"
        raise ApiError(400, "chat_template", told, "continue_final_message")
    return text[:end]


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


__all__ = ["PLAIN", "Renderer", "Specials", "Template", "chat_tokens", "find_template"]
