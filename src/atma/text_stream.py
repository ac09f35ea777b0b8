"""Bytes of tokens in, text out, while a text is being written: never half a character, never part of a stop string."""

import codecs
from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes UTF-8 as it comes and holds text back while it may be the beginning of a stop string.

    Bytes that can be no text become U+FFFD. The text that comes out does not depend on how the bytes were cut.
    """

    def __init__(self, stop: Sequence[str] = (), memory: dict[str, Any] | None = None, through: bool = False) -> None:
        """`memory` is that of a stream to go on from; `through`: the stop string that ends the text is shown too."""
        self.stop, self.through = tuple(stop), through
        self.stopped = False
        self.found: str | None = None
        """The stop string that ended the text."""
        self.fresh = 0
        """Characters that the last bytes brought."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._recent = ""
        self._shown = 0
        if memory is not None:
            self._recent, self._shown = memory["text"], memory["shown"]
            self._decoder.setstate((bytes.fromhex(memory["bytes"]), 0))

    def push(self, data: bytes, looking: bool = True) -> str:
        """The text that these bytes set free, possibly none; after a stop string `stopped` is set and no more comes.

        Without `looking`, which may be so up to some point of a text, no stop string is seen in them.
        """
        text = self._decoder.decode(data)
        self.fresh = len(text)
        if not (self.stop and looking) and not self._recent:
            return text
        self._recent += text
        ends = [(at + len(stop), at) for stop in self.stop if (at := self._recent.find(stop)) >= 0]
        if ends:
            end, at = min(ends)
            self.stopped, self.found = True, self._recent[at:end]
            return self._show(end if self.through else at)
        text = self._show(len(self._recent) - self._held())
        keep = max(map(len, self.stop), default=1) - 1
        drop = max(0, len(self._recent) - keep)
        self._recent, self._shown = self._recent[drop:], self._shown - drop
        return text

    @property
    def held(self) -> int:
        """Characters held back, since they may begin a stop string."""
        return 0 if self.stopped else len(self._recent) - self._shown

    def flush(self) -> str:
        """The text held back for a stop string that did not come. A character still lacking bytes stays back."""
        return "" if self.stopped else self._show(len(self._recent))

    def memory(self) -> dict[str, Any]:
        """What a later stream needs to go on, as JSON data; the shown text only as far as a stop string may reach."""
        text, shown = ("", 0) if self.stopped else (self._recent, self._shown)
        return {"text": text, "shown": shown, "bytes": self._decoder.getstate()[0].hex()}

    def _show(self, end: int) -> str:
        text = self._recent[self._shown : end]
        self._shown = max(self._shown, end)
        return text

    def _held(self) -> int:
        """Length of the longest end of the recent text that begins a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        ends = range(min(longest, len(self._recent)), 0, -1)
        return next((n for n in ends if any(stop.startswith(self._recent[-n:]) for stop in self.stop)), 0)
