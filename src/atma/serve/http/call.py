"""What is known of one HTTP request, for its log line and the metrics: sizes and times, never its text."""

import re
import time
import uuid
from typing import Any

from atma.serve.http.answers import Tally
from atma.serve.http.errors import ApiError
from atma.serve.http.feed import Item
from atma.serve.http.metrics import Metrics
from atma.serve.http.room import Room

SANE = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


class Call:
    """One request. `id` is the client's own where that is sane."""

    def __init__(self, metrics: Metrics, asked: str | None, method: str) -> None:
        self.metrics, self.method = metrics, method
        self.id = asked if asked is not None and SANE.fullmatch(asked) else uuid.uuid4().hex
        self.began = time.perf_counter()
        self.model = metrics.model
        """The name of what answers: the model's, or an adapter's."""
        self.status = 0
        self.route = "none"
        self.error: ApiError | None = None
        self.gone = self.messages = False
        """`messages`: whether it is one of Anthropic's API."""
        self.ignored: list[str] = []
        """Fields of its body that a lenient server passed over."""
        self.first: float | None = None
        self.sizes: tuple[int, int, int] | None = None
        self._rooms: list[tuple[Room, int]] = []
        self._last: dict[tuple[int, int], float] = {}

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began

    def saw(self, item: Item) -> None:
        """Note when tokens came."""
        choice = item[0], item[1].index
        if not item[1].tokens:
            return
        now = time.perf_counter()
        if self.first is None:
            self.first = now - self.began
            self.metrics.first_token.observe(self.first)
        elif choice in self._last:
            self.metrics.between_tokens.observe(now - self._last[choice])
        self._last[choice] = now

    async def hold(self, room: Room, count: int, parameter: str = "max_tokens") -> None:
        """Room for its answer, until it is closed; `parameter` asks for most of it."""
        if count:
            await room.take(count, parameter)
            self._rooms.append((room, count))

    def close(self) -> None:
        """It has been answered, or given up."""
        for room, count in self._rooms:
            room.give(count)
        self._rooms.clear()

    def count(self, tally: Tally) -> None:
        """Note the sizes: tokens of prompts, of these from kept states, and of answers."""
        self.sizes = (tally.prompt, tally.cached, tally.completion)

    def fields(self) -> dict[str, Any]:
        """What the log says of it as data."""
        told = {"id": self.id, "method": self.method, "route": self.route, "status": self.status, "gone": self.gone}
        told |= {"error": None if self.error is None else self.error.code}
        told |= dict(zip(("prompt_tokens", "cached_tokens", "answer_tokens"), self.sizes or (0, 0, 0), strict=True))
        first = None if self.first is None else round(self.first, 4)
        return told | {"first_token_seconds": first, "seconds": round(self.seconds, 4)}

    def line(self) -> str:
        """What the log says of it."""
        parts = [f"{self.route} {'gone' if self.gone else self.status} id={self.id}"]
        if self.error is not None:
            parts.append(f"error={self.error.code}")
        if self.sizes is not None and any(self.sizes):
            parts.append("prompt={} cached={} answer={}".format(*self.sizes))
        if self.first is not None:
            parts.append(f"first={self.first:.3f}s")
        return " ".join([*parts, f"total={self.seconds:.3f}s"])
