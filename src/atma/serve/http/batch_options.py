"""What `atma batch` can be told: the options of a server that has no address."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atma.serve.http.options import Pooling, ServerOptions

LARGEST = 128
"""Answers that one request may ask for: there is room for such a one beside all others."""


KEY = "batch"
"""The key that a batch's requests show, so that one for servers in the environment asks nothing of them. No other can
ask: there is no address."""


@dataclass(frozen=True)
class BatchOptions:
    """How a batch is answered; as the options of `atma serve`. ValueError names the option and the mend."""

    model_name: str | None = None
    """The name that requests may ask for; by default the folder's. One for another model is refused."""
    chat_template: Path | None = None
    """A Jinja template for chats, instead of the one in the model's folder."""
    tool_parser: Literal["hermes", "llama3", "lfm2", "mistral"] | None = None
    """How the model writes calls of tools; by default as its chat template teaches."""
    memory_budget: str = "512MiB"
    """For all that is held but the code and the weights."""
    cache_budget: str | None = None
    """How much of it may be kept states; by default three eighths."""
    cache_dir: Path | None = None
    """Keep states that leave memory in this folder, and find them again."""
    max_rows: int = 32
    """Texts that are read or written at once; twice as many requests are under way."""
    max_tokens: int = 1024
    """Length of a chat's answer where the request names none."""
    max_body: str = "8MiB"
    """Largest line; longer ones are refused."""
    pooling: Pooling = "last"
    """What the embedding of a text is: its last hidden state, or the mean of all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of weights and states."""
    weights: Literal["int8", "int4"] | None = None
    """Read the large weights in so few bits (docs/narrow.md); as they are by default."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER: LoRA adapters on the model, which requests ask for as a model of that name; may be given again."""
    select: str | None = None
    """A selection policy: how less of the keys is read, such as "top_pages k=64" (docs/selection.md)."""
    speculate: int = 0
    """Write texts that repeat something by drafts of up to so many tokens, at most 31; answers stay the same."""
    device: str = "cpu"
    """Where to compute: the processor alone so far."""
    threads: int = 0
    """Processor threads for the model; 0: OMP_NUM_THREADS, or else what measures fastest."""
    lenient: bool = False
    """Pass over fields of requests that nobody knows, instead of refusing the request."""

    def __post_init__(self) -> None:
        self.server()

    @property
    def together(self) -> int:
        """Requests under way at once."""
        return 2 * self.max_rows

    def server(self) -> ServerOptions:
        """The same for the server's own code. ValueError."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        waiting = LARGEST + self.together
        return ServerOptions(**given, max_waiting=waiting, access_log="off", api_key=KEY)
