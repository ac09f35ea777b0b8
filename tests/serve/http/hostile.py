"""What clients do that mean no good. Each attack is a visit; whatever it is answered is fine, or that it is cut off."""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.serve.http.nearly_right import CALLED, GRAMMARS, SCHEMAS, TOOLS

RESET = struct.pack("ii", 1, 0)
"""To linger for no time: closing sends a reset."""
STREAM = {"prompt": "on and on", "max_tokens": 300, "ignore_eos": True, "stream": True}
WHOLE = STREAM | {"stream": False}


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    told = [f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json", *lines, "", ""]
    return "\r\n".join(told).encode()


def post(path: str, body: Any, *lines: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, f"content-length: {len(data)}", *lines) + data


def opened(port: int, small: bool = False) -> socket.socket:
    """A connection; `small`: that takes little before it is read."""
    wire = socket.socket()
    if small:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.settimeout(60)
    wire.connect(("127.0.0.1", port))
    return wire


def to_the_end(wire: socket.socket) -> bytes:
    told = b""
    while part := wire.recv(65536):
        told += part
    return told


def asked(port: int, data: bytes) -> bytes:
    """All that comes back, on a connection that is then closed."""
    with opened(port) as wire:
        wire.sendall(data.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        return to_the_end(wire)


def slow_head(port: int, dice: random.Random) -> None:
    with opened(port) as wire:
        for byte in head("/v1/responses", "x: " + "y" * 500)[: dice.randrange(300)]:
            wire.sendall(bytes([byte]))
            time.sleep(0.01)


def slow_body(port: int, dice: random.Random) -> None:
    data = post("/v1/messages", {"max_tokens": 9, "messages": [{"role": "user", "content": "x" * 300}]})
    with opened(port) as wire:
        for at in range(0, dice.randrange(len(data)), 3):
            wire.sendall(data[at : at + 3])
            time.sleep(0.01)
        to_the_end(wire)


def half_closed(port: int, dice: random.Random) -> None:
    with opened(port) as wire:
        wire.sendall(post("/v1/responses", {"input": "x", "max_output_tokens": 100, "stream": dice.random() < 0.5}))
        wire.shutdown(socket.SHUT_WR)
        if dice.random() < 0.5:
            to_the_end(wire)


def leaves(port: int, dice: random.Random) -> None:
    """In the middle of an answer, with a reset or without."""
    routes: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", STREAM),
        ("/v1/completions", WHOLE | {"n": 8}),
        ("/v1/chat/completions", {"messages": CALLED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 300, "stream": True, "ignore_eos": True}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "stream": True}),
        ("/v1/embeddings", {"input": ["many texts " * 9] * 100}),
    ]
    with opened(port) as wire:
        wire.sendall(post(*dice.choice(routes)))
        if dice.random() < 0.5:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        time.sleep(dice.random() / 5)


def never_reads(port: int, dice: random.Random) -> None:
    with opened(port, small=True) as wire:
        wire.sendall(post("/v1/completions", STREAM | {"n": 4, "logprobs": 20}))
        time.sleep(1 + dice.random())


def large_heads(port: int, dice: random.Random) -> None:
    lines = dice.choice([["x: " + "y" * 200_000], [f"x{i}: y" for i in range(9000)], ["host: localhost"] * 900])
    asked(port, head("/v1/models/" + "z" * dice.choice([1, 60_000]), *lines, method="GET"))


def large_bodies(port: int, dice: random.Random) -> None:
    kind, path = dice.randrange(3), dice.choice(["/v1/responses", "/v1/embeddings", "/tokenize", "/v1/messages"])
    if kind == 0:
        asked(port, head(path, f"content-length: {10 ** dice.randrange(9, 40)}"))
    elif kind == 1:
        asked(port, post(path, b'{"input": "' + b"x" * (9 << 20) + b'"}'))
    else:
        with opened(port) as wire:
            wire.sendall(head(path, "transfer-encoding: chunked"))
            for _ in range(80):
                wire.sendall(b"80000\r\n" + b"[" * 0x80000 + b"\r\n")
            to_the_end(wire)


def many_connections(port: int, dice: random.Random) -> None:
    wires = [opened(port) for _ in range(12)]
    time.sleep(dice.random())
    for wire in wires:
        wire.close()


def deep_json(port: int, dice: random.Random) -> None:
    deep = [
        b'{"input": ' + b"[" * 3_000_000,
        b'{"a":' * 200_000,
        b"[" * 63 + b"]" * 63,
        b'["' + b'\\"[' * 10**6 + b'"]',
    ]
    asked(port, post("/v1/responses", dice.choice(deep)))


def large_schemas(port: int, dice: random.Random) -> None:
    """New ones each time, so that none is known."""
    mark = f"a{dice.random()}"
    wide = {"type": "object", "properties": {f"{mark}{i}": {"type": "string"} for i in range(2000)}}
    schema = dice.choice([wide, {"enum": [f"{mark} {i}" * 4 for i in range(2000)]}, *SCHEMAS])
    form: dict[str, Any] = (
        {"grammar": f"// {mark}\n{dice.choice(GRAMMARS)}"} if dice.random() < 0.3 else {"json": schema}
    )
    asked(port, post("/v1/completions", {"prompt": "x", "max_tokens": 20, "structured_outputs": form}))
    tools = [{"name": f"f{i}", "input_schema": {"type": "object", "$comment": mark}} for i in range(30)]
    body = {"max_tokens": 20, "messages": [{"role": "user", "content": "x"}], "tools": tools}
    asked(port, post("/v1/messages", body | {"tool_choice": {"type": "any"}}))


def chains(port: int, dice: random.Random) -> None:
    """Answers that go on from answers, some forgotten meanwhile, many from the same."""
    before: str | None = None
    for _ in range(6):
        body = {"input": "and " * dice.choice([1, 100]), "max_output_tokens": 4, "previous_response_id": before}
        told = asked(port, post("/v1/responses", body)).partition(b"\r\n\r\n")[2]
        found = json.loads(told).get("id") if told.startswith(b"{") else None
        if before is not None and dice.random() < 0.3:
            asked(port, head(f"/v1/responses/{before}", method="DELETE"))
        before = found or before


def fills_the_store(port: int, dice: random.Random) -> None:
    labels = {f"{i}": "v" * 500 for i in range(16)}
    items = [{"role": "user", "content": "x" * dice.choice([10, 200])} for _ in range(dice.choice([1, 20]))]
    for _ in range(5):
        asked(port, post("/v1/responses", {"input": items, "max_output_tokens": 1, "metadata": labels}))


def much_at_once(port: int, dice: random.Random) -> None:
    bodies = [
        {"prompt": ["x"] * 128, "max_tokens": 2},
        {"prompt": "x", "n": 16, "max_tokens": 50, "logprobs": 20, "ignore_eos": True},
        {"prompt": "long " * 600, "max_tokens": 1, "cache_salt": f"{dice.random()}"},
        {"prompt": "x", "max_tokens": 10**6, "n": 16, "logprobs": 20},
    ]
    asked(port, post("/v1/completions", dice.choice(bodies)))


def pipelines(port: int, dice: random.Random) -> None:
    with opened(port) as wire:
        wire.sendall(post("/tokenize", {"prompt": "x"}) * 200 + post("/v1/completions", STREAM) * dice.randrange(3))
        wire.recv(100)


def long_templates(port: int, dice: random.Random) -> None:
    message = {"role": "user", "content": "<|endoftext|>" * dice.choice([10, 20_000])}
    body = {"messages": [message] * dice.choice([1, 60]), "max_tokens": 1, "tools": TOOLS[:1]}
    asked(port, post("/v1/chat/completions", body | {"chat_template_kwargs": {"x": "y" * 9000}}))


def small_chunks(port: int, dice: random.Random) -> None:
    with opened(port) as wire:
        wire.sendall(head("/tokenize", "transfer-encoding: chunked", "expect: 100-continue"))
        wire.sendall(b"1\r\n \r\n" * dice.randrange(20_000))
        if dice.random() < 0.5:
            wire.sendall(b'f\r\n{"prompt": "x"}\r\n0\r\n\r\n')
            to_the_end(wire)


def other_protocols(port: int, dice: random.Random) -> None:
    upgrade = head("/v1/responses", "connection: upgrade", "upgrade: websocket", method="GET")
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + dice.randbytes(500)
    with opened(port) as wire:
        wire.sendall(dice.choice([upgrade, hello, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 30_000, b"\0" * 9000]))
        to_the_end(wire)


ATTACKS: list[Callable[[int, random.Random], None]] = [
    slow_head,
    slow_body,
    half_closed,
    leaves,
    never_reads,
    large_heads,
    large_bodies,
    many_connections,
    deep_json,
    large_schemas,
    chains,
    fills_the_store,
    much_at_once,
    pipelines,
    long_templates,
    small_chunks,
    other_protocols,
]


class Hostile:
    """One client: so many visits, each an attack."""

    def __init__(self, port: int, seed: int, visits: int, seen: Counter[str]) -> None:
        self.port, self.seed, self.visits, self.seen = port, seed, visits, seen
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        dice = random.Random(self.seed)
        for i in range(self.visits):
            attack = ATTACKS[(self.seed + i) % len(ATTACKS)]
            with contextlib.suppress(OSError):
                attack(self.port, dice)
            self.seen[attack.__name__] += 1


def besiege(port: int, clients: int, visits: int, seed: int = 0) -> Counter[str]:
    """How often each attack was made."""
    seen: Counter[str] = Counter()
    for one in [Hostile(port, seed + i, visits, seen) for i in range(clients)]:
        one.thread.join()
    return seen
