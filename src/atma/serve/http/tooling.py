"""Chats with tools: what the model is held to, and the calls in what it writes."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atma.serve.asynchronous import AsyncEngine
from atma.serve.http.answers import ChatShape
from atma.serve.http.bodies import ChatBody, Message
from atma.serve.http.errors import ApiError
from atma.serve.http.neutral import shown
from atma.serve.http.tool_fields import Chosen
from atma.serve.request import Event, RequestError
from atma.serve.structure import Structure
from atma.serve.tools.formats import NAMES, Format
from atma.serve.tools.grammar import Tool, calls, calls_or, freely, special
from atma.serve.tools.reading import CallReader, Piece
from atma.tokenizer import Tokenizer


class Tooling:
    """What a request asks of tools, in a form that the model writes. ApiError: it writes none, or it is wrong."""

    def __init__(self, body: ChatBody, form: Format | None, known: bool, tokenizer: Tokenizer) -> None:
        """`known`: whether the chat template does something with tools."""
        check_calls(body.messages)
        chosen = body.tool_choice or Chosen()
        self.tools: list[Tool] = [] if chosen.mode == "none" else body.tools
        names = {tool.name for tool in body.tools}
        strange = next((name for name in chosen.names if name not in names), None)
        if strange is not None or (chosen.mode == "required" and not names):
            told = "there are no tools to choose from" if strange is None else f"no tool is called '{strange}'"
            raise ApiError(400, "invalid_value", f"'tool_choice': {told}", "tool_choice")
        if self.tools and not known:
            told = "the chat template of this model knows no tools: serve one that does with --chat-template"
            raise ApiError(400, "no_tools", f"'tools': {told}, or leave them out", "tools")
        if self.tools and form is None:
            told = f"how this model writes calls is not known; start with --tool-parser {', '.join(NAMES)}"
            raise ApiError(400, "no_tools", f"'tools': {told}", "tools")
        self.form, self._tokenizer, self._mode = form if self.tools else None, tokenizer, chosen.mode
        self.some = [tool for tool in self.tools if not chosen.names or tool.name in chosen.names]
        """Those that may be called."""
        self.several = body.parallel_tool_calls and not chosen.alone

    @property
    def given(self) -> list[Mapping[str, Any]] | None:
        """What the template is told of the tools."""
        return [tool.given for tool in self.tools] or None

    @property
    def spelled(self) -> tuple[int, ...]:
        """The signs of calls that are special tokens, which the text must show."""
        found = (special(sign, self._tokenizer) for sign in (self.form.signs if self.form else ()))
        return tuple(token for token in found if token is not None)

    def structure(self, asked: Structure | None) -> Structure | None:
        """What the answer is held to, where `asked` is what the request says of it besides. ApiError."""
        form, several = self.form, self.several
        if form is None:
            return asked
        try:
            if asked is not None and asked.kind not in ("json", "json_object"):
                raise ValueError(f"'{asked.parameter}': beside tools, also by 'tool_choice', it must be JSON")
            if self._mode == "auto" and asked is None:
                return self._free(form)
            if self._mode == "auto" and asked is not None:
                return calls_or(asked, form, self.some, self._tokenizer, several)
            # An answer that is calls alone says nothing that could have a form of its own.
            return calls(form, self.some, self._tokenizer, several, "tools")
        except ValueError as error:
            raise ApiError(400, "invalid_value", str(error), "tools") from None

    def either(self, asked: Structure | None) -> Structure | None:
        """A single call, where nothing but its form tells it from the JSON that the answer else is; None if anything
        does."""
        form = self.form
        if form is None or not form.bare or asked is None or self._mode != "auto":
            return None
        return calls(form, self.some, self._tokenizer, False, asked.parameter)

    def _free(self, form: Format) -> Structure | None:
        """What calls in any text are held to: strict tools, and those of several that are allowed. ApiError."""
        limited = len(self.some) < len(self.tools)
        if limited and form.bare:
            told = "'tool_choice': free answers of this model cannot be held to some of the tools"
            mend = "make the mode 'required', or leave out the other tools"
            raise ApiError(400, "invalid_value", f"{told}; {mend}", "tool_choice")
        held = limited or (not form.bare and any(tool.strict for tool in self.some))
        return freely(form, self.some, self._tokenizer, self.several) if held else None


async def judge(engine: AsyncEngine, call: Structure | None) -> Callable[[str], bool] | None:
    """What tells whether a text is a call of that form. ApiError: it cannot be compiled."""
    try:
        return None if call is None else await engine.judge(call)
    except RequestError as error:
        raise ApiError.of(error) from None


def check_calls(messages: Sequence[Message]) -> None:
    """ApiError for a result of a tool that no earlier message called."""
    known: set[str] = set()
    for i, message in enumerate(messages):
        known |= {call["id"] for call in message.tool_calls if "id" in call}
        if message.tool_calls and message.role != "assistant":
            raise _wrong(i, "only an assistant's message has 'tool_calls'")
        if message.role == "tool" and message.tool_call_id not in known:
            given = f", not {shown(message.tool_call_id)}" if message.tool_call_id else ""
            raise _wrong(i, f"its 'tool_call_id' must be that of a call before it{given}")


def _wrong(index: int, problem: str) -> ApiError:
    return ApiError(400, "invalid_value", f"'messages.{index}': {problem}", "messages")


class ToolShape(ChatShape):
    """A chat.completion of which the calls of tools are told apart from what is said."""

    form: Format
    several: bool
    """Whether more calls than one are told."""
    fits: Callable[[str], bool] | None
    """Whether an object is a call, where it could be another answer."""
    _names: frozenset[str]
    _readers: dict[int, CallReader]

    @classmethod
    def of(
        cls, tooling: Tooling, form: Format, shape: ChatShape, fits: Callable[[str], bool] | None = None
    ) -> "ToolShape":
        """The same chat, with calls of these tools written so."""
        made = cls(shape.names, shape.scored, shape.ids, shape.begun)
        made.form, made.several, made.fits, made._readers = form, tooling.several, fits, {}
        made._names = frozenset(tool.name for tool in tooling.tools)
        return made

    def choice(self, text: str, end: str | None) -> dict[str, Any]:
        reader = self._reader()
        pieces = self._told([*reader.push(text), *reader.finish()])
        content, found = self.begun + "".join(one.content for one in pieces), self._begun(pieces)
        for call in found:
            own = (one.arguments for one in pieces if one.index == call["index"])
            call["function"]["arguments"] = "".join(own)
        whole = [{key: value for key, value in call.items() if key != "index"} for call in found]
        message = {"role": "assistant", "content": content or (None if found else ""), "refusal": None}
        message |= {"tool_calls": whole} if whole else {}
        return {"message": message, "finish_reason": self._end(end, reader)}

    def delta(self, event: Event) -> dict[str, Any]:
        pieces = self.read(event)
        content = "".join(one.content for one in pieces)
        begun = {call["index"]: call for call in self._begun(pieces)}
        parts = []
        for one in pieces:
            if one.name is not None and one.index is not None:
                parts.append(begun[one.index])
            elif one.index is not None and parts and parts[-1]["index"] == one.index:
                parts[-1]["function"]["arguments"] += one.arguments
            elif one.index is not None:
                parts.append({"index": one.index, "function": {"arguments": one.arguments}})
        delta: dict[str, Any] = {"content": content} if content else {}
        delta |= {"tool_calls": parts} if parts else {}
        return {"delta": delta, "finish_reason": self._end(event.finish_reason, self._readers[event.index])}

    def read(self, event: Event) -> list[Piece]:
        reader = self._readers.setdefault(event.index, self._reader())
        pieces = reader.push(event.text)
        return self._told(pieces + (reader.finish() if event.finish_reason is not None else []))

    def called(self, index: int = 0) -> bool:
        return self._readers[index].count > 0

    def call_id(self, prefix: str = "call_") -> str:
        return uuid.uuid4().hex[:9] if self.form.short_ids else super().call_id(prefix)

    def _reader(self) -> CallReader:
        return CallReader(self.form, self._names, self.fits)

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        return [one for one in pieces if self.several or not one.index]

    def _begun(self, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        return [
            {
                "index": one.index,
                "id": self.call_id(),
                "type": "function",
                "function": {"name": one.name, "arguments": ""},
            }
            for one in pieces
            if one.name is not None
        ]

    def _end(self, end: str | None, reader: CallReader) -> str | None:
        return "tool_calls" if end == "stop" and reader.count else end
