"""Answers that a next turn may go on from, in memory: bounded by their number and their bytes, the oldest go first."""

import json
from collections import OrderedDict
from typing import Any, NamedTuple

from atma.serve.http.errors import encoded

MOST = 1024
"""Answers that are kept."""
OWN_BYTES = 1024
"""Of each, besides its texts."""


class Kept(NamedTuple):
    """An answer."""

    body: bytes
    """As it was told."""
    talk: bytes
    """The messages up to its end, without instructions, as JSON."""

    @property
    def size(self) -> int:
        return len(self.body) + len(self.talk) + OWN_BYTES

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to and with the answer."""
        return json.loads(self.talk)

    @property
    def output(self) -> list[dict[str, Any]]:
        """The items of the answer."""
        return json.loads(self.body)["output"]


class Store:
    """At most `total` bytes; what has not been asked for longest makes room."""

    def __init__(self, total: int, most: int = MOST) -> None:
        self.total, self.most, self.bytes = total, most, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, identity: str, body: dict[str, Any], messages: list[dict[str, Any]]) -> bool:
        """Keep an answer; whether there is room for it."""
        kept = Kept(encoded(body), encoded(messages))
        if kept.size > self.total:
            return False
        self._kept[identity] = kept
        self.bytes += kept.size
        while self.bytes > self.total or len(self._kept) > self.most:
            self.delete(next(iter(self._kept)))
        return True

    def get(self, identity: str) -> Kept | None:
        """An answer, which thereby is the last to go."""
        if identity in self._kept:
            self._kept.move_to_end(identity)
        return self._kept.get(identity)

    def delete(self, identity: str) -> bool:
        """Whether there was such an answer."""
        kept = self._kept.pop(identity, None)
        self.bytes -= 0 if kept is None else kept.size
        return kept is not None
