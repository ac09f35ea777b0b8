"""What `atma serve` can be told, checked; and the limits that keep one client from taking the server from others."""

import dataclasses
import ipaddress
import math
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atma.serve.adapter_names import named_folders
from atma.serve.http.logs import Form
from atma.serve.settings import DRAFTED, EngineConfig
from atma.strict import check_fields

UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
KEY_VARIABLE = "ATMA_API_KEY"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?", re.ASCII)
ROOT = re.compile(r"(?:/[A-Za-z0-9._~-]+)+", re.ASCII)
TAKEN = {"v1", "tokenize", "detokenize", "tokenizer_info", "health", "metrics", "openapi.json"}
"""How the paths of routes begin."""

HEAD_BYTES = 32 << 10
"""Of a request's line and headers together."""
HEAD_SECONDS = 15.0
"""For a request's line and headers to come."""
BODY_SECONDS = 60.0
"""For a request's body to come."""
BODIES_AT_ONCE = 8
"""So many of the largest bodies may be in memory for all requests under way together."""
REQUEST_BYTES = 160 << 10
"""Set aside for each text taken in: its connection, body, tokens and events (50 KiB with 300 tokens), and its share of
refused ones and of what the allocator cannot give back, by the peak of a server at four times its capacity."""
CONNECTIONS = 512
SEND_BUFFER = 256 << 10
"""Of a connection in the system; the server itself holds 64 KiB more. What is not yet written stays events, and a text
whose events take more than 48 KiB is not written on."""
PING_SECONDS = 5.0
"""A stream that is silent for so long says so in a comment."""


Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class ServerOptions:
    """How a model is served. ValueError names the option and the mend."""

    host: str = "127.0.0.1"
    """Address to listen at. Any but a loopback address needs an API key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one, which is printed."""
    api_key: str | None = None
    """Ask for this key as `Authorization: Bearer KEY`. Better set ATMA_API_KEY: other users see command lines."""
    model_name: str | None = None
    """The name clients ask for; by default the folder's."""
    chat_template: Path | None = None
    """A Jinja template for chats, instead of the one in the model's folder."""
    tool_parser: Literal["hermes", "llama3", "lfm2", "mistral"] | None = None
    """How the model writes calls of tools; by default as its chat template teaches."""
    memory_budget: str = "512MiB"
    """For all that the server holds but its code and the weights: keys, values and states of running texts and kept
    ones, what a step computes with, 160 KiB for each text that is read, written or waits, answers in one body, and
    those that /v1/responses keeps."""
    cache_budget: str | None = None
    """How much of it may be kept states; by default three eighths."""
    cache_dir: Path | None = None
    """Keep states that leave memory in this folder, and find them again after a restart."""
    max_rows: int = 32
    """Texts that are read or written at once."""
    max_waiting: int = 256
    """Texts that may wait for a place; more are refused with status 429."""
    max_tokens: int = 1024
    """Length of a chat's answer where the request names none."""
    max_body: str = "8MiB"
    """Largest body of a request; larger ones are refused with status 413."""
    pooling: Pooling = "last"
    """What the embedding of a text is: its last hidden state, or the mean of all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and states."""
    weights: Literal["int8", "int4"] | None = None
    """Read the large weights in so few bits (docs/narrow.md); as they are by default."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER: LoRA adapters on the model, which clients ask for as a model of that name; may be given again."""
    select: str | None = None
    """A selection policy: how less of the keys is read, such as "top_pages k=64" (docs/selection.md)."""
    speculate: int = 0
    """Write texts that repeat something by drafts of up to so many tokens, at most 31; answers stay the same."""
    device: str = "cpu"
    """Where to compute. The server computes on the processor alone so far; anything but cpu is refused."""
    threads: int = 0
    """Processor threads for the model; 0: OMP_NUM_THREADS, or else what measures fastest."""
    reader_seconds: float = 30.0
    """A client that for so long takes too little for its full buffer to empty is cut off."""
    cors_origin: str | None = None
    """Pages of these origins, parted by commas, may ask from a browser; * for any. By default none may."""
    root_path: str = ""
    """A prefix of every path, such as /models/mine, as a proxy before this server has it."""
    access_log: Form = "text"
    """How each request is told on stderr, never its text: a line of text or of JSON, or not at all."""
    lenient: bool = False
    """Pass over fields of requests that nobody knows, and name them in the header x-atma-ignored, instead of a 400."""
    drain_seconds: float = 30.0
    """After SIGTERM or Ctrl-C, answers under way get so long to end."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require(0 <= self.port <= 65535, "port", self.port, "from 0 to 65535")
        _require(self.threads >= 0, "threads", self.threads, "0 (measured) or more")
        _require(0 <= self.speculate <= DRAFTED, "speculate", self.speculate, f"from 0 to {DRAFTED}")
        _require(self.max_tokens >= 1, "max-tokens", self.max_tokens, "at least 1")
        _require(0 < self.reader_seconds < math.inf, "reader-seconds", self.reader_seconds, "above 0")
        seconds = self.drain_seconds
        _require(0 <= seconds < math.inf, "drain-seconds", seconds, "0 or more")
        _require(byte_count(self.max_body) >= 1024, "max-body", self.max_body, "at least 1KiB")
        _require(self.model_name is None or self.model_name.strip(), "model-name", self.model_name, "a name")
        _check_device(self.device)
        named_folders(self.adapter)
        origins(self.cors_origin)
        root(self.root_path)
        self.engine_config()

    @property
    def answer_bytes(self) -> int:
        """Of the memory budget, for answers that are gathered before they are sent."""
        return byte_count(self.memory_budget) // 16

    @property
    def stored_bytes(self) -> int:
        """Of the memory budget, for answers that a later request may go on from."""
        return byte_count(self.memory_budget) // 64

    @property
    def body_bytes(self) -> int:
        """`max_body` in bytes."""
        return byte_count(self.max_body)

    def engine_config(self) -> EngineConfig:
        """The engine's own settings."""
        memory = byte_count(self.memory_budget)
        cache = memory * 3 // 8 if self.cache_budget is None else byte_count(self.cache_budget)
        answers = self.answer_bytes + self.stored_bytes
        plain = EngineConfig(memory, cache, self.cache_dir, request_bytes=REQUEST_BYTES, answer_bytes=answers)
        step = max(plain.step_tokens, 2 * self.max_rows)
        asked = {"max_rows": self.max_rows, "max_waiting": self.max_waiting, "speculation": self.speculate}
        return dataclasses.replace(plain, step_tokens=step, **asked)

    def key(self) -> str | None:
        """The API key: the option's, else the environment's. ValueError for one that no header can hold."""
        key = os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key
        if key is not None and not re.fullmatch("[!-~]+", key):
            raise ValueError(f"the API key (--api-key or {KEY_VARIABLE}) must be visible ASCII without spaces")
        return key

    def require_safe(self) -> None:
        """ValueError for an address that others reach and no key."""
        if self.key() is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached from other machines: set {KEY_VARIABLE} or --api-key, "
                "or listen at 127.0.0.1"
            )


def _check_device(device: str) -> None:
    if device != "cpu":
        mend = "leave --device out (atma generate and atma eval compute on a GPU)"
        raise ValueError(f"--device {device}: the server computes on the processor alone so far; {mend}")


def byte_count(text: str) -> int:
    """Bytes of "2GiB", "512 MiB", "1.5GB" or "1048576". ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"'{text}' is no size; write it like 2GiB, 512MiB or 1048576")
    return int(float(found[1]) * UNITS[found[2]])


def origins(text: str | None) -> frozenset[str]:
    """The origins of an option, which are parted by commas; "*" is any. ValueError for what is none."""
    found = frozenset(part.strip() for part in (text or "").split(",") if part.strip())
    for origin in found - {"*"}:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(f"--cors-origin '{origin}' is no origin; write it like https://app.example or *")
    return found


def root(text: str) -> str:
    """A prefix of paths, "" or like "/models/mine". ValueError for anything else."""
    path = text.rstrip("/")
    if path and (not ROOT.fullmatch(path) or {".", ".."} & set(path.split("/"))):
        raise ValueError(f"--root-path '{text}' must be like /models/mine")
    if path.split("/")[1:2] and path.split("/")[1] in TAKEN:
        raise ValueError(f"--root-path '{text}' begins like a route of this server; name another")
    return path


def is_loopback(host: str) -> bool:
    """Whether every address of a host is this machine's own. ValueError for a host that has no address."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        raise ValueError(f"--host {host}: no such address on this machine") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def _require(holds: object, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'--{name}' must be {rule}, not {value!r}")
