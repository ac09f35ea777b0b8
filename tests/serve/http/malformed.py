"""Requests that are nearly right: bodies for every route, and what is done to them before they are sent."""

import json
import random
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tests.serve.http.nearly_right import BODIES, GRAMMARS, REGEXES, SCHEMAS

DEEP: Any = 0
for _ in range(50):
    DEEP = [DEEP]
STRANGE = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, -0.0, 1e-320, "", "x", "\ud800", "\0", "😀" * 50, [], {}]
STRANGE += [[[]], [None], [1, "x"], {"a": {}}, ["x"] * 200, "9" * 400, [2**70], {"type": "text"}, {"65": "1"}]
STRANGE += [
    float("nan"),
    float("inf"),
    10**300,
    1.5,
    "null",
    "true",
    "none",
    "auto",
    "required",
    "\u202eabc",
    "e\u0301",
]
STRANGE += ["http://127.0.0.1:1/", "file:///etc/passwd", "../../x", "<|endoftext|>", "<tool_call>", "{{ 1 / 0 }}", "%s"]
STRANGE += [DEEP, ["\ud83d"] * 20, {"\ud800": "\udfff"}, {"": {"": ""}}, {"$ref": "#"}, {"type": "function"}]
STRANGE += [{"type": "tool_use", "id": "t"}, {"role": "tool", "content": "x"}, ["x" * 5000], "y" * 9000, [0] * 5000]
STRANGE += [{str(i): i for i in range(1500)}, {"type": "message", "role": "user", "content": []}, [{"type": "x"}] * 99]
KEYS = ["", "tools", "user", "\ud800", "x" * 300, "tool_choice", "response_format", "previous_response_id", "stream"]
KEYS += ["structured_outputs", "logprobs", "n", "best_of", "model", "__class__", "$ref", "messages", "prompt", "input"]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"]
KINDS = ["application/json; charset=utf-8", "APPLICATION/JSON", "text/plain", "application/json; charset=utf-7", "x"]
KINDS += ["application/jsonl", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "", "/", "*/*"]
NAMES = [
    "tiny",
    "poet",
    "",
    "x",
    "%00",
    "%ff",
    "..",
    "%2e%2e%2f",
    "a/b",
    "%f0%9f%98%80",
    "x" * 3000,
    "resp_",
    "resp__x",
]
NAMES += [
    "resp_" + "0" * 32,
    "%ed%a0%80",
    "poet?x=1",
    "a%20b",
    "\xe4",
    "#",
    "?stream=true",
    "x?stream=\xff",
    "%",
    "%zz",
]
WAYS = ["/v1/responses/", "/v1/models/", "/v1/responses", "/tokenizer_info/", "/tokenizer_info?", "/v1/messages/", "//"]


class Sent(NamedTuple):
    """A request with its body as bytes."""

    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str] = MappingProxyType({})


def mutated(value: Any, dice: random.Random) -> Any:
    """A JSON value with something in it replaced, removed, doubled or added."""
    if dice.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return dice.choice(STRANGE)
    if isinstance(value, list):
        i = dice.randrange(len(value))
        return [*value[:i], mutated(value[i], dice), *value[i + dice.randrange(2) :]]
    key, kind = dice.choice(list(value)), dice.randrange(4)
    if kind == 0:
        return {k: v for k, v in value.items() if k != key}
    if kind == 1:
        return value | {dice.choice([*KEYS, key.upper()]): dice.choice(STRANGE)}
    return value | {key: mutated(value[key], dice)}


OWN = dict.fromkeys(("schema", "parameters", "input_schema", "json"), SCHEMAS)
OWN |= {"regex": REGEXES, "grammar": GRAMMARS}
"""Fields with a language of their own, and what is wrong or too much in it."""


def provoked(value: Any, dice: random.Random) -> Any:
    """A body whose fields with a language of their own hold something else."""
    if isinstance(value, list):
        return [provoked(part, dice) for part in value]
    if not isinstance(value, dict):
        return value
    return {k: dice.choice(OWN[k]) if k in OWN else provoked(part, dice) for k, part in value.items()}


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Bytes cut, doubled, turned over or replaced."""
    at, kind = dice.randrange(len(data) + 1), dice.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + dice.randbytes(dice.randrange(1, 9)) + data[at:]
    if kind == 2:
        return data[:at] + data[at : at + 20] * dice.randrange(2, 50) + data[at:]
    if kind == 3:
        return data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    return data[at:] + data[:at]


def doubled(value: Any, dice: random.Random) -> bytes:
    """An object as JSON with one of its names a second time."""
    again = json.dumps({dice.choice(list(value)): dice.choice(STRANGE)}).encode()
    first = json.dumps(value).encode()
    return first[:-1] + b", " + again[1:] if dice.random() < 0.5 else again[:-1] + b", " + first[1:]


def requests(dice: random.Random, identity: str) -> Iterator[Sent]:
    """Without end; `identity`: an answer that is kept, from which some go on."""
    while True:
        route = dice.choice(list(BODIES))
        body = dice.choice(BODIES[route])
        if route == "/v1/responses" and dice.random() < 0.3:
            body = body | {"previous_response_id": identity}
        kind = dice.random()
        if kind < 0.1:
            yield Sent("POST", route, json.dumps(provoked(body, dice)).encode(), JSON)
        elif kind < 0.7:
            for _ in range(dice.randrange(1, 3)):
                body = mutated(body, dice)
            yield Sent("POST", route, json.dumps(body).encode(), JSON)
        elif kind < 0.75:
            yield Sent("POST", route, doubled(body, dice), JSON)
        elif kind < 0.85:
            yield Sent("POST", route, damaged(json.dumps(body).encode(), dice), JSON)
        elif kind < 0.88:
            yield Sent("POST", dice.choice(list(BODIES)), json.dumps(body).encode(), JSON)
        elif kind < 0.92:
            yield Sent("POST", route, json.dumps(body).encode(), {"content-type": dice.choice(KINDS)})
        elif kind < 0.95:
            yield Sent(dice.choice(METHODS), route, json.dumps(body).encode(), JSON)
        else:
            path = dice.choice(WAYS) + dice.choice([*NAMES, identity])
            yield Sent(dice.choice(METHODS), path, None if dice.random() < 0.8 else b"{}", JSON)


JSON = {"content-type": "application/json"}
