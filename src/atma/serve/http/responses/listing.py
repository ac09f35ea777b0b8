"""The items that an answer was asked with, as OpenAI's API lists them: pages of a conversation.

They are made of the messages that are kept for a next turn: earlier turns with their answers come first, texts in parts
are one, and ids are of this list alone.
"""

import hashlib
from collections.abc import Sequence
from itertools import count
from typing import Any, Literal

from atma.serve.http.errors import ApiError
from atma.serve.http.neutral import shown
from atma.serve.http.responses.items import Item, Message

MOST = 100
"""Items of a page."""
Order = Literal["asc", "desc"]


def listed(identity: str, talk: Sequence[Message]) -> list[Item]:
    """The items of the answer `identity`, the oldest first; `talk`: the messages before it."""
    numbers, found = count(), list[Item]()
    for message in talk:
        for prefix, fields in _items(message):
            own = hashlib.blake2b(f"{identity} {next(numbers)}".encode(), digest_size=16).hexdigest()
            found.append({"id": f"{prefix}_{own}", "status": "completed"} | fields)
    return found


def page(items: Sequence[Item], limit: int, order: Order, after: str) -> dict[str, Any]:
    """So many items in that order, behind the one of the id `after`. ApiError: there is none of that id."""
    ordered = items if order == "asc" else items[::-1]
    begin = 0
    if after:
        begin = 1 + next((i for i, item in enumerate(ordered) if item["id"] == after), -1)
        if not begin:
            raise ApiError(400, "invalid_value", f"'after': no item of this answer is {shown(after)}", "after")
    found = list(ordered[begin : begin + limit])
    ends = (found[0]["id"], found[-1]["id"]) if found else (None, None)
    told = {"object": "list", "data": found, "first_id": ends[0], "last_id": ends[1]}
    return told | {"has_more": begin + limit < len(ordered)}


def _items(message: Message) -> list[tuple[str, Item]]:
    """Of a message, each with the beginning of its id."""
    if message["role"] == "tool":
        output = {"call_id": message["tool_call_id"], "output": message["content"]}
        return [("fco", {"type": "function_call_output"} | output)]
    calls = message.get("tool_calls", ())
    found = [("msg", _said(message))] if message["content"] or not calls else []
    return found + [("fc", {"type": "function_call", "call_id": call["id"]} | call["function"]) for call in calls]


def _said(message: Message) -> Item:
    part: dict[str, Any] = {"type": "input_text", "text": message["content"]}
    if message["role"] == "assistant":
        part |= {"type": "output_text", "annotations": [], "logprobs": []}
    return {"type": "message", "role": message["role"], "content": [part]}
