"""How the engine is sized, and what that comes to in bytes for one model."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atma.strict import check_fields

MIB = 1 << 20
DRAFTED = 31
"""Tokens of a draft at the most."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine."""

    memory_bytes: int = 512 * MIB
    """For everything but the weights: keys and values, states of running rows, states kept for later, recorded steps,
    adapters, and what a step computes with."""
    cache_bytes: int = 192 * MIB
    """Of these, at most so many for kept states and the pages they hold; 0 keeps none."""
    cache_folder: Path | None = None
    """Kept states that leave memory are written here, and found again after a restart."""
    cache_folder_bytes: int = 4096 * MIB
    """Most that the files there may take."""
    pending_bytes: int | None = None
    """Of cache_bytes, for states on their way to cache_folder; None is a quarter. What does not fit is not written."""
    recorded_bytes: int = 64 * MIB
    """Of these, at most so many, and an eighth of them, for recorded steps on the CPU; 0 records none."""
    request_bytes: int = 0
    """Of these, for each text that is read, written or waits, what its asker holds for it; a server's connection."""
    answer_bytes: int = 0
    """Of these, for answers that a server gathers before it sends them."""
    unread_bytes: int = 48 << 10
    """Of a text's events that `AsyncEngine` has for a reader; a request that has more waits until half are taken."""
    max_rows: int = 32
    """Texts that are read or written at once."""
    max_waiting: int = 256
    """Choices that may wait for a place; more are refused."""
    step_tokens: int = 512
    """Tokens of a step: one for each text being written, the rest for reading prompts."""
    page_tokens: int = 256
    """Keys of a page, a multiple of 16."""
    snapshot_tokens: int = 512
    """A state is kept every so many tokens of a prompt or an answer, besides at their ends; 0 only at their ends."""
    overtakes: int = 16
    """How many later requests may pass one that does not fit yet."""
    quantum: int = 256
    """Steps after which a text being written gives its row to one that waits for a row."""

    speculation: int = 0
    """Tokens that are drafted at once at the most where a text says again what it has said before: 1, 3, 7, 15 or 31,
    others are rounded down to these; 0 drafts none. Answers stay the same."""

    def __post_init__(self) -> None:
        check_fields(self)
        _require(0 <= self.speculation <= DRAFTED, "speculation", self.speculation, f"from 0 to {DRAFTED}")
        positive = ("memory_bytes", "max_rows", "max_waiting", "page_tokens", "quantum", "cache_folder_bytes")
        for name in (*positive, "unread_bytes"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("cache_bytes", "snapshot_tokens", "overtakes", "recorded_bytes", "request_bytes", "answer_bytes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        fits = self.pending_bytes is None or 0 <= self.pending_bytes <= self.cache_bytes
        _require(fits, "pending_bytes", self.pending_bytes, f"from 0 to cache_bytes {self.cache_bytes:,}")
        _require(self.page_tokens % 16 == 0, "page_tokens", self.page_tokens, "a multiple of 16")
        _require(self.step_tokens > self.max_rows, "step_tokens", self.step_tokens, "more than max_rows")


class Recording(NamedTuple):
    """Bytes for recorded steps, and how much of them the results may take that all steps share."""

    room: int
    shared: int

    def within(self, most: int) -> "Recording":
        """As much of it as `most` bytes allow: at least half is for what steps share."""
        return self if self.room <= most else Recording(most, max(most // 2, most - self.room + self.shared))


class Reserve(NamedTuple):
    """Bytes of the budget that a model's steps take, and adapters beside it."""

    recording: Recording
    working: int
    adapters: int = 0


@dataclass(frozen=True)
class Budget:
    """memory_bytes shared out, so that all of it in use is exactly all of it."""

    row_bytes: int
    """Tails, memories and last hidden state of one text."""
    page_bytes: int
    """0 where nothing lies in pages: they then only say where texts stand."""
    rows: int
    snapshots: int
    """Kept states at the most, whatever pages they hold."""
    pages: int
    cache_bytes: int
    recording: Recording
    set_aside: int
    """For rows, while they are read and while they are written, for steps, for adapters and for requests."""
    pending_bytes: int
    """For copies of kept states that are being written to disk."""

    @classmethod
    def of(cls, config: EngineConfig, row_bytes: int, page_bytes: int, reserve: Reserve) -> "Budget":
        """ValueError when not one page is left, or a text of one page could not be both read and kept."""
        running = 2 * config.max_rows * row_bytes
        asked = (config.max_rows + config.max_waiting) * config.request_bytes + config.answer_bytes
        recording = reserve.recording.within(min(config.recorded_bytes, config.memory_bytes // 8))
        set_aside = running + asked + recording.room + reserve.working + reserve.adapters
        pending = config.cache_bytes // 4 if config.pending_bytes is None else config.pending_bytes
        pending = 0 if config.cache_folder is None else pending
        cache = config.cache_bytes - pending
        if not page_bytes:  # kept states are then all that grows
            cache = min(cache, max(0, config.memory_bytes - set_aside - pending))
        snapshots = cache // (row_bytes + page_bytes)
        left = config.memory_bytes - set_aside - snapshots * row_bytes - pending
        if left < page_bytes:
            raise ValueError(
                f"memory_bytes {config.memory_bytes:,} leaves no page, "
                f"{config.memory_bytes - left + page_bytes:,} would: {config.max_rows} rows take {running:,} bytes, "
                f"requests {asked:,}, recorded steps {recording.room:,}, a step's own work {reserve.working:,}, "
                f"adapters {reserve.adapters:,}, {snapshots} kept states {snapshots * row_bytes:,}, "
                f"states on their way to disk {pending:,}, "
                f"one page {page_bytes:,}"
            )
        rows = config.max_rows
        enough = rows * (-(-config.step_tokens // config.page_tokens) + 2) + snapshots  # where nothing lies in pages
        pages = left // page_bytes if page_bytes else enough
        return cls(row_bytes, page_bytes, rows, snapshots, pages, cache, recording, set_aside, pending)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
