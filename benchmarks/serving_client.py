"""A server in a process of its own, and a plain client that notes when the tokens of a stream come."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MIB = 1 << 20


class Heard(NamedTuple):
    """What a client heard: status 0 is a connection without an answer; seconds since it asked."""

    status: int
    text: str
    times: list[float]
    whole: bool
    seconds: float


async def ask(port: int, body: dict[str, Any], path: str = "/v1/completions") -> Heard:
    """One request on a connection of its own, read to its end."""
    began = time.perf_counter()
    writer = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes(body, path))
        return await _heard(reader, began)
    except (OSError, asyncio.IncompleteReadError, ValueError):
        return Heard(0, "", [], False, time.perf_counter() - began)
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


def text_of(line: bytes) -> str | None:
    """The text of one line of a stream; None for a line that is not an event with a choice."""
    if not line.startswith(b"data: {"):
        return None
    event = json.loads(line[6:])
    if "error" in event:
        raise ValueError(event["error"])
    choices = event.get("choices") or [{}]
    return choices[0].get("text") or (choices[0].get("delta") or {}).get("content")


async def _heard(reader: asyncio.StreamReader, began: float) -> Heard:
    status = int((await reader.readline()).split()[1])
    parts: list[str] = []
    times: list[float] = []
    whole = streamed = False
    while (line := await reader.readline()).strip():
        streamed = streamed or line.lower().startswith(b"content-type: text/event-stream")
    if not streamed:
        data = await reader.read()
        if status == 200:
            parts, whole = [json.loads(data)["choices"][0].get("text", "")], True
        return Heard(status, "".join(parts), times, whole, time.perf_counter() - began)
    while line := await reader.readline():
        text = text_of(line)
        if text:
            parts.append(text)
            times.append(time.perf_counter() - began)
        whole = whole or line.startswith(b"data: [DONE]")
    return Heard(status, "".join(parts), times, whole, time.perf_counter() - began)


def post(port: int, path: str, body: dict[str, Any]) -> bytes:
    """The answer to one request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read()


def gauge(port: int, name: str) -> float:
    """One number of a server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


class Served(NamedTuple):
    """A server under way."""

    port: int
    process: int


@contextlib.contextmanager
def served(model: str, log: Path, *options: str) -> Iterator[Served]:
    """`atma serve MODEL` on a free port, ended by SIGTERM; its log in a file."""
    command = [sys.executable, "-m", "atma", "serve", model, "--port", "0", *options]
    with open(log, "w") as told, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if " at http://" not in line:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            yield Served(int(line.split("http://")[1].split()[0].rpartition(":")[2]), process.pid)
        finally:
            process.terminate()
            if status := process.wait():
                print(f"the server ended with status {status}")


def resident(process: int, field: str = "VmRSS") -> int:
    """Bytes in memory of a process now, or at its most (VmHWM). Linux."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"no {field} of process {process}")
