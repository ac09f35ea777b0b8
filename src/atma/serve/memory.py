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


class Memory:
    """Pages and kept states of one model, whose `weights` are told by their hash, within `config.memory_bytes`."""

    def __init__(self, served: Served, carrier: Carrier, config: EngineConfig, reserve: Reserve, weights: str) -> None:
        self.carrier = carrier
        page_bytes = PagePool.page_bytes(carrier.growing, config.page_tokens)
        self.budget = Budget.of(config, carrier.row_bytes, page_bytes, reserve)
        self.pool = PagePool(carrier.growing, self.budget.pages, config.page_tokens, served.device)
        self.disk = None
        if config.cache_folder is not None:
            self.disk = DiskStates(config.cache_folder, config.cache_folder_bytes, self.budget.pending_bytes)
        arithmetic = f"{served.dtype} {config.page_tokens} {_arithmetic(served.exact, served.device)}"
        self.cache = StateCache(self.budget, self.pool, carrier, f"{weights} {arithmetic}", self.disk)
        self.every = config.snapshot_tokens
        self.hits = self.misses = self.saved = self.released = 0

    @property
    def used_bytes(self) -> int:
        """Of pages that somebody refers to, of kept states and of those on their way to disk, and all that is set aside
        whether used or not."""
        budget = self.budget
        pages = (budget.pages - self.pool.free) * budget.page_bytes
        pending = self.disk.pending_bytes if self.disk is not None else 0
        return pages + pending + len(self.cache) * budget.row_bytes + budget.set_aside

    def place(self, sequence: Sequence, running: Many[Sequence]) -> bool:
        """Give a sequence its pages up to its next token, and the longest kept beginning of its text.

        False if there are not so many, and one more for each of `running` to grow; or if one of these is reading a
        longer beginning of it, for which it then waits.
        """
        since = self.released, self.pool.freed, self.cache.inserted
        if sequence.refused == since:
            return False
        kept = None
        if not sequence.scores_prompt:
            kept = self.cache.find(sequence.tokens, sequence.target, sequence.salt)
        if not sequence.scores_prompt and self._follows(sequence, running, kept.standing.position if kept else 0):
            return False
        spare, total = (
            len(running),
            self.pool.pages_for(max(sequence.target, min(sequence.target + 1, sequence.longest))),
        )
        if not self._fits(total + spare, kept):
            kept = None
            if not self._fits(total + spare, None):
                sequence.refused = since
                return False
        self._settle(sequence, total, kept)
        if not sequence.written:
            sequence.cached = sequence.position
            self.hits, self.misses = self.hits + (kept is not None), self.misses + (kept is None)
        self.saved += sequence.position
        return True

    def grow(self, sequence: Sequence) -> bool:
        """See to it that the next position has a page. False if there is none, even without kept states."""
        if sequence.position < len(sequence.pages) * self.pool.size:
            return True
        while not self.pool.free:
            if not self.cache.evict():
                return False
        sequence.pages += self.pool.take(1)
        return True

    def wanted(self, sequence: Sequence) -> bool:
        """Whether the state where a sequence stands is one to keep as it passes, and not kept yet."""
        if not sequence.shares:
            return False
        position = sequence.position
        due = position == sequence.prompt_length or (self.every > 0 and position % self.every == 0)
        return due and not self.cache.has(sequence.tokens, position, sequence.salt)

    def keep(self, sequence: Sequence, standing: Standing) -> None:
        """Keep where a sequence stands, if there is room."""
        self.cache.put(sequence.tokens, sequence.salt, standing, sequence.pages)

    def mark(self, sequence: Sequence, standing: Standing) -> None:
        """Keep where a sequence stands for as long as the text held back since may become a stop text."""
        self.unmark(sequence)
        sequence.mark = self.cache.mark(sequence.tokens, sequence.salt, standing, sequence.pages)

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
        self.pool.release(sequence.pages)
        sequence.pages, sequence.carried, sequence.hidden, sequence.position = [], None, None, 0

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

    def _fits(self, total: int, kept: Kept | None) -> bool:
        shared = kept.standing.position // self.pool.size if kept else 0
        return self.pool.free + self.cache.reclaimable(kept) >= total - shared

    def _settle(self, sequence: Sequence, total: int, kept: Kept | None) -> None:
        held = list(kept.pages) if kept else []
        shared = kept.standing.position // self.pool.size if kept else 0
        self.pool.retain(held)
        while self.pool.free < total - shared:
            self.cache.evict()
        own = self.pool.take(total - shared)
        if len(held) > shared:
            self.pool.copy(held[shared], own[0])
            self.pool.release(held[shared:])
        sequence.pages = held[:shared] + own
        if kept is None:
            sequence.position, sequence.carried, sequence.hidden = 0, self.carrier.empty(), None
            return
        position, carried, hidden = kept.standing
        sequence.position, sequence.carried = position, tuple(x.clone() for x in carried)
        sequence.hidden = hidden[None]


def _arithmetic(exact: bool, device: torch.device) -> str:
    """What decides the last bits of a state: the compiled kernels by their hash, or PyTorch on a device."""
    if exact:
        return native.status().reason.split(",")[0].rsplit("/", 1)[-1]
    return f"{device.type} {torch.__version__}"
