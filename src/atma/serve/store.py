"""What the engine holds for its texts, counted in pages: places for new ones, room for those that grow, kept states."""

from collections.abc import Sequence as Many

import torch

from atma.ops import native
from atma.serve.cache import Kept, StateCache
from atma.serve.carry import Carrier, Standing
from atma.serve.disk import DiskStates
from atma.serve.exact import Served
from atma.serve.pages import PagePool
from atma.serve.sequence import Sequence
from atma.serve.settings import Budget, EngineConfig, Reserve

POSITIONS = 2**31 - 1
"""Most of a text: a state counts them in 32 bits."""


class Store:
    """Pages and kept states of one model, whose `weights` are told by their hash, within `config.memory_bytes`."""

    def __init__(self, served: Served, carrier: Carrier, config: EngineConfig, reserve: Reserve, weights: str) -> None:
        self.carrier = carrier
        page_bytes = PagePool.page_bytes(carrier.paged, config.page_tokens)
        self.budget = Budget.of(config, carrier.row_bytes, page_bytes, reserve)
        self.pool = PagePool(carrier.paged, self.budget.pages, config.page_tokens, served.device)
        self.disk = None
        if config.cache_folder is not None:
            self.disk = DiskStates(config.cache_folder, config.cache_folder_bytes, self.budget.pending_bytes)
        arithmetic = f"{served.dtype} {config.page_tokens} {_arithmetic(served.exact, served.device)}"
        self.cache = StateCache(self.budget, self.pool, carrier, f"{weights} {arithmetic}", self.disk)
        self.every, self.memory_bytes = config.snapshot_tokens, config.memory_bytes
        self.most_pages = self.pool.most_pages(config.step_tokens)
        """Of a text; None: as many as it has."""
        self.hits = self.misses = self.saved = self.released = 0

    @property
    def used_bytes(self) -> int:
        """Of pages that somebody refers to, of kept states and of those on their way to disk, and all that is set aside
        whether used or not."""
        budget = self.budget
        pages = (budget.pages - self.pool.free) * budget.page_bytes
        pending = self.disk.pending_bytes if self.disk is not None else 0
        return pages + pending + len(self.cache) * budget.row_bytes + budget.set_aside

    def stats(self) -> dict[str, int]:
        """What is held now, and counts since the start."""
        cache, disk, budget = self.cache, self.disk, self.budget
        return {
            "memory_bytes": self.memory_bytes,
            "used_bytes": self.used_bytes,
            "pages": budget.pages,
            "pages_free": self.pool.free,
            "page_bytes": budget.page_bytes,
            "row_bytes": budget.row_bytes,
            "longest_text": self.longest_text,
            "kept_states": len(cache),
            "kept_bytes": cache.bytes,
            "kept_most": budget.snapshots,
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "cached_tokens": self.saved,
            "evictions": cache.evictions,
            "files": len(disk) if disk is not None else 0,
            "file_bytes": disk.bytes if disk is not None else 0,
            "files_damaged": disk.damaged if disk is not None else 0,
            "file_failures": disk.failures if disk is not None else 0,
            "files_dropped": disk.dropped if disk is not None else 0,
            "pending_bytes": disk.pending_bytes if disk is not None else 0,
        }

    def place(self, sequence: Sequence, running: Many[Sequence]) -> bool:
        """Give a sequence its pages up to its next token, and the longest kept beginning of its text.

        False if there are not so many, and one more for each of `running` to grow; or if one of these is reading a
        longer beginning of it, for which it then waits.
        """
        since = self.released, self.pool.freed, self.cache.inserted
        if sequence.refused == since:
            return False
        kept = None
        if not sequence.reads_all:
            kept = self.cache.find(sequence.tokens, sequence.target, sequence.salt)
        if not sequence.reads_all and self._follows(sequence, running, kept.standing.position if kept else 0):
            return False
        spare = len(running)
        if not self._fits(sequence, kept, spare):
            kept = None
            if not self._fits(sequence, None, spare):
                sequence.refused = since
                return False
        self._settle(sequence, kept)
        if not sequence.written:
            sequence.cached = sequence.position
            self.hits, self.misses = self.hits + (kept is not None), self.misses + (kept is None)
        self.saved += sequence.position
        return True

    @property
    def longest_text(self) -> int:
        """Positions of the longest text that there is memory for."""
        whole = self.most_pages is None or self.most_pages > self.pool.count
        return self.pool.count * self.pool.size if whole else POSITIONS

    def slide(self, sequence: Sequence) -> None:
        """Give back the pages that a sequence reads no more."""
        first = self.pool.first_page(sequence.position)
        self.pool.release([sequence.pages.pop(n) for n in list(sequence.pages) if n < first])

    def grow(self, sequence: Sequence, count: int = 0) -> bool:
        """See to it that the next `count` positions have pages, and the one that is written after them.

        False if not all have, even without kept states.
        """
        self.slide(sequence)
        end = min(sequence.position + count + 1, self._end(sequence))
        places = range(sequence.position // self.pool.size, self.pool.pages_for(end))
        missing = [n for n in places if n not in sequence.pages]
        while self.pool.free < len(missing):
            if not self.cache.evict():
                return False
        sequence.pages |= zip(missing, self.pool.take(len(missing)), strict=True)
        return True

    def spare(self, sequence: Sequence, count: int) -> list[int] | None:
        """As `grow` for a text that is written, from free pages alone: the places of the new ones; None: too few."""
        self.slide(sequence)
        end = min(sequence.position + count + 1, sequence.longest)
        places = range(sequence.position // self.pool.size, self.pool.pages_for(end))
        missing = [n for n in places if n not in sequence.pages]
        if self.pool.free < len(missing):
            return None
        sequence.pages |= zip(missing, self.pool.take(len(missing)), strict=True)
        return missing

    def wanted(self, sequence: Sequence) -> bool:
        """Whether the state where a sequence stands is one to keep as it passes, and not kept yet."""
        if not sequence.shares:
            return False
        position = sequence.position
        due = position == sequence.prompt_length or (self.every > 0 and position % self.every == 0)
        return due and not self.cache.has(sequence.tokens, position, sequence.salt)

    def keep(self, sequence: Sequence, standing: Standing) -> None:
        """Keep where a sequence stands, if there is room."""
        self.cache.put(sequence.tokens, sequence.salt, standing, self._read_by(sequence, standing))

    def mark(self, sequence: Sequence, standing: Standing) -> None:
        """Keep where a sequence stands for as long as the text held back since may become a stop text."""
        self.unmark(sequence)
        sequence.mark = self.cache.mark(sequence.tokens, sequence.salt, standing, self._read_by(sequence, standing))

    def unmark(self, sequence: Sequence) -> None:
        """What was held back has been told: no state from before it is needed."""
        if sequence.mark is not None:
            self.cache.drop(sequence.mark)
            sequence.mark = None

    def marked(self, sequence: Sequence) -> bool:
        """Whether a text that a stop text has ended leaves a kept state from before that."""
        return sequence.stream.stopped and sequence.mark is not None and self.cache.holds(sequence.mark)

    def release(self, sequence: Sequence) -> None:
        """A sequence gives up its pages and what it carries."""
        self.released += 1
        self.pool.release(sequence.pages.values())
        sequence.pages, sequence.carried, sequence.hidden, sequence.position = {}, None, None, 0

    def to_boundary(self, position: int, count: int) -> int:
        """How many of `count` tokens from `position` on to read before a state is to be kept."""
        return min(count, self.every - position % self.every) if self.every else count

    def _follows(self, sequence: Sequence, running: Many[Sequence], kept: int) -> bool:
        """Whether another is about to come to a state that this one could begin from."""
        for other in running if self.budget.snapshots else ():
            if not other.shares or other.salt != sequence.salt or other.position >= other.prompt_length:
                continue
            count = min(other.position + self.to_boundary(other.position, other.prompt_length), other.prompt_length)
            if kept < count <= sequence.target and other.tokens[:count] == sequence.tokens[:count]:
                sequence.leader, sequence.until = other, count
                return True
        return False

    def _read_by(self, sequence: Sequence, standing: Standing) -> dict[int, int]:
        """The pages of a sequence that its state at a position reads."""
        places = range(self.pool.first_page(standing.position), self.pool.pages_for(standing.position))
        return {n: sequence.pages[n] for n in places}

    def _end(self, sequence: Sequence) -> int:
        """Where a sequence stands when its next token has been read, if it ever is."""
        return max(sequence.target, min(sequence.target + 1, sequence.longest))

    def _own(self, sequence: Sequence, kept: Kept | None) -> range:
        """The pages, by their places, that a sequence needs of its own from a kept state on, until its next token or
        for as long as it reads within its most pages."""
        position, end = kept.standing.position if kept else 0, self.pool.pages_for(self._end(sequence))
        if self.most_pages is not None:
            end = min(end, self.pool.first_page(position) + self.most_pages)
        return range(position // self.pool.size, end)

    def _fits(self, sequence: Sequence, kept: Kept | None, spare: int) -> bool:
        return self.pool.free + self.cache.reclaimable(kept) >= len(self._own(sequence, kept)) + spare

    def _settle(self, sequence: Sequence, kept: Kept | None) -> None:
        own, held = self._own(sequence, kept), dict(kept.pages) if kept else {}
        self.pool.retain(held.values())
        while self.pool.free < len(own):
            self.cache.evict()
        pages = dict(zip(own, self.pool.take(len(own)), strict=True))
        for n in held.keys() & pages.keys():  # the one that is not full
            self.pool.copy(held[n], pages[n])
            self.pool.release([held.pop(n)])
        sequence.pages = held | pages
        if kept is None:
            sequence.position, sequence.carried, sequence.hidden = 0, self.carrier.empty(), None
            return
        position, carried, hidden = kept.standing
        sequence.position, sequence.carried = position, tuple(x.clone() for x in carried)
        sequence.hidden = hidden[None]


def _arithmetic(exact: bool, device: torch.device) -> str:
    """What decides the last bits of a state: the compiled kernels by their name, or PyTorch on a device."""
    if exact:
        return native.name(device)
    return f"{device.type} {torch.__version__}"
