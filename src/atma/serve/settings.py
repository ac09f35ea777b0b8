"""How the engine is sized, and what that comes to in bytes for one model."""

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine. Bytes count all that is held between steps: pages, states of rows, and kept states."""

    memory_bytes: int = 512 * MIB
    """For everything held: keys and values, states of running rows, states kept for later."""
    cache_bytes: int = 192 * MIB
    """Of these, at most so many for kept states and the pages they hold; 0 keeps none."""
    cache_folder: Path | None = None
    """Kept states that leave memory are written here, and found again after a restart."""
    cache_folder_bytes: int = 4096 * MIB
    pending_bytes: int | None = None
    """Of cache_bytes, for states on their way to cache_folder; None is a quarter. What does not fit is not written."""
    recorded_bytes: int = 64 * MIB
    """For recorded steps, beside memory_bytes, on the CPU; 0 records none."""
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

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "max_rows", "max_waiting", "page_tokens", "quantum", "cache_folder_bytes"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("cache_bytes", "snapshot_tokens", "overtakes", "recorded_bytes"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        fits = self.pending_bytes is None or 0 <= self.pending_bytes <= self.cache_bytes
        _require(fits, "pending_bytes", self.pending_bytes, f"from 0 to cache_bytes {self.cache_bytes:,}")
        _require(self.page_tokens % 16 == 0, "page_tokens", self.page_tokens, "a multiple of 16")
        _require(self.step_tokens > self.max_rows, "step_tokens", self.step_tokens, "more than max_rows")


@dataclass(frozen=True)
class Budget:
    """memory_bytes shared out, so that all of it in use is exactly all of it."""

    row_bytes: int
    """Tails, memories and last hidden state of one text."""
    page_bytes: int
    rows: int
    snapshots: int
    """Kept states at the most, whatever pages they hold."""
    pages: int
    cache_bytes: int
    pending_bytes: int
    """For copies of kept states that are being written to disk."""

    @classmethod
    def of(cls, config: EngineConfig, row_bytes: int, page_bytes: int) -> "Budget":
        """ValueError when not one page is left, or a text of one page could not be both read and kept."""
        running = 2 * config.max_rows * row_bytes
        pending = config.cache_bytes // 4 if config.pending_bytes is None else config.pending_bytes
        pending = 0 if config.cache_folder is None else pending
        cache = config.cache_bytes - pending
        snapshots = cache // (row_bytes + page_bytes)
        left = config.memory_bytes - running - snapshots * row_bytes - pending
        if left < page_bytes:
            raise ValueError(
                f"memory_bytes {config.memory_bytes:,} leaves no page: {config.max_rows} rows take {running:,} bytes, "
                f"{snapshots} kept states {snapshots * row_bytes:,}, states on their way to disk {pending:,}, "
                f"one page {page_bytes:,}"
            )
        return cls(row_bytes, page_bytes, config.max_rows, snapshots, left // page_bytes, cache, pending)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
