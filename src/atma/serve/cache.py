"""Kept states: exact prefix caching for a model whose memory is more than keys and values.

A kept state is everything a model remembers after exactly `position` tokens: the pages that it still reads by
reference, its tails and memories by copy, and its last hidden state, from which the next token comes. It is found by
the hash of the tokens it has read, so a request begins at the longest kept beginning of its text; nothing is ever
rewound. The least recently used state goes first when room is short, to disk if there is a folder for it.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from atma.serve.carry import Carrier, Standing
from atma.serve.disk import DiskStates
from atma.serve.pages import PagePool
from atma.serve.settings import Budget


class Kept(NamedTuple):
    """A state, and the pages that it still reads, to each of which the cache refers once for it."""

    standing: Standing
    pages: Mapping[int, int]
    """By their places in the text."""


class StateCache:
    """Kept states by what they have read: at most `budget.snapshots`, and within `budget.cache_bytes`."""

    def __init__(
        self, budget: Budget, pool: PagePool, carrier: Carrier, identity: str, disk: DiskStates | None
    ) -> None:
        self.budget, self.pool, self.carrier, self.disk = budget, pool, carrier, disk
        self._identity = identity.encode()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._positions: Counter[int] = Counter()
        self._pages: Counter[int] = Counter()
        self._busy: str | None = None
        self.evictions = self.inserted = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of the kept states and every page that one of them refers to."""
        return len(self._kept) * self.budget.row_bytes + len(self._pages) * self.budget.page_bytes

    def reclaimable(self, but: Kept | None = None) -> int:
        """Pages that nobody but the cache refers to, leaving out those of one kept state."""
        spared = set(but.pages.values()) if but else set()
        return sum(self.pool.references[p] == count and p not in spared for p, count in self._pages.items())

    def find(self, tokens: Sequence[int], limit: int, salt: str) -> Kept | None:
        """The kept state of the longest beginning of `tokens`, of at most `limit` tokens."""
        on_disk = self.disk.positions() if self.disk is not None else set()
        at = sorted(p for p in self._positions.keys() | on_disk if p <= limit)
        for position, key in reversed(list(self._keys(tokens, at, salt))):
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if self.disk is not None and self.disk.has(position, key) and (kept := self._fetch(position, key)):
                return kept
        return None

    def has(self, tokens: Sequence[int], position: int, salt: str) -> bool:
        """Whether the state after `position` tokens is kept in memory; it is then the last to go."""
        key = self._key(tokens, position, salt)
        if key in self._kept:
            self._kept.move_to_end(key)
        return key in self._kept

    def put(self, tokens: Sequence[int], salt: str, standing: Standing, pages: Mapping[int, int]) -> bool:
        """Keep the state of a text that stands at a position and reads `pages`. False if there is no room for it."""
        return self._insert(self._key(tokens, standing.position, salt), standing, pages)

    def mark(self, tokens: Sequence[int], salt: str, standing: Standing, pages: Mapping[int, int]) -> str | None:
        """As `put`, for a state that may have to be dropped; its name, None if it was there or there is no room."""
        key = self._key(tokens, standing.position, salt)
        return key if key not in self._kept and self._insert(key, standing, pages) else None

    def drop(self, key: str) -> bool:
        """Keep a marked state no longer. False if it is gone already."""
        if key in self._kept:
            self._forget(key)
            return True
        return False

    def holds(self, key: str) -> bool:
        """Whether a marked state is still kept in memory."""
        return key in self._kept

    def evict(self) -> bool:
        """Let the least recently used state go. False if there is none to let go."""
        key = next((key for key in self._kept if key != self._busy), None)
        if key is None:
            return False
        kept = self._kept[key]
        if self.disk is not None:
            self._store(key, kept)
        self._forget(key)
        self.evictions += 1
        return True

    def flush(self) -> None:
        """Write every kept state to disk, if there is a folder; returns when all is written."""
        if self.disk is not None:
            for key, kept in self._kept.items():
                self._store(key, kept, wait=True)
            self.disk.flush()

    def clear(self) -> None:
        """Keep nothing in memory; files stay."""
        for key in list(self._kept):
            self._forget(key)

    def _insert(self, key: str, standing: Standing, pages: Mapping[int, int]) -> bool:
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        if self.budget.row_bytes + len(pages) * self.budget.page_bytes > self.budget.cache_bytes:
            return False
        self._kept[key] = Kept(standing, pages)
        self.inserted += 1
        self._positions[standing.position] += 1
        self._pages.update(pages.values())
        self.pool.retain(pages.values())
        busy, self._busy = self._busy, key
        while len(self._kept) > self.budget.snapshots or self.bytes > self.budget.cache_bytes:
            if not self.evict():
                self._forget(key)
                break
        self._busy = busy
        return key in self._kept

    def _forget(self, key: str) -> None:
        kept = self._kept.pop(key)
        self._positions[kept.standing.position] -= 1
        self._positions += Counter()
        self._pages.subtract(kept.pages.values())
        self._pages += Counter()
        self.pool.release(kept.pages.values())

    def _fetch(self, position: int, key: str) -> Kept | None:
        """A state from disk, in memory again; None if it is damaged or there is no room."""
        assert self.disk is not None
        places = range(self.pool.first_page(position), self.pool.pages_for(position))
        if self.pool.free + self.reclaimable() < len(places) or not self.budget.snapshots:
            return None
        read = self.disk.read(position, key, self.carrier.like, self.carrier.hidden)
        if read is None:
            return None
        while self.pool.free < len(places):
            self.evict()
        state, hidden = read
        pages = dict(zip(places, self.pool.take(len(places)), strict=True))
        self.carrier.spread(state, pages, self.pool)
        kept = self._insert(key, Standing(position, self.carrier.carried(state), hidden), pages)
        self.pool.release(pages.values())
        return self._kept[key] if kept else None

    def _store(self, key: str, kept: Kept, wait: bool = False) -> None:
        """Give a copy of a state to the disk's queue; if there is no room in it, `wait` for that, or drop the state."""
        assert self.disk is not None
        position, _, hidden = kept.standing
        size = self.budget.row_bytes + len(kept.pages) * self.budget.page_bytes
        if not self.disk.has(position, key) and self.disk.admit(size, wait):
            state = self.carrier.copy(kept.standing.carried, position, kept.pages, self.pool)
            self.disk.write(position, key, state, hidden, size)

    def _key(self, tokens: Sequence[int], position: int, salt: str) -> str:
        return next(self._keys(tokens, [position], salt))[1]

    def _keys(self, tokens: Sequence[int], positions: Sequence[int], salt: str) -> Iterator[tuple[int, str]]:
        """Each of the ascending positions with the hash of all tokens before it."""
        data, read = np.asarray(tokens[: positions[-1]] if positions else [], np.int32), 0
        digest = hashlib.sha256(self._identity + b"\0" + salt.encode("utf-8", "surrogatepass") + b"\0")
        for position in positions:
            digest.update(data[read:position].tobytes())
            read = position
            yield position, digest.copy().hexdigest()
