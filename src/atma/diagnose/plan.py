"""What a diagnosis measures: lengths, documents, and which parts are taken away or capped."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from atma.strict import check_fields

QUERIES = 64
"""Positions at the end of each length whose attention is looked at."""


class Extent(NamedTuple):
    """How far a size goes."""

    lengths: tuple[int, ...]
    documents: int
    stress_documents: int


SIZES = {
    "quick": Extent((256, 1024, 4096), 8, 2),
    "standard": Extent((256, 1024, 4096, 16_384), 8, 4),
    "long": Extent((2048, 4096, 8192, 16_384, 32_768, 65_536), 8, 4),
}


@dataclass(frozen=True)
class Plan:
    """What is measured. Lengths, caps and half-lives are tokens."""

    size: Literal["quick", "standard", "long"] = "quick"
    """quick: 4,096 tokens of 8 documents, minutes for a model of nano's size; standard: 16,384; long: 65,536."""
    lengths: tuple[int, ...] = ()
    """Increasing lengths to measure at, in place of the size's."""
    documents: int = 0
    """Documents to read, in place of the size's 8."""
    records: int = 2
    """Records told at the start of each document and asked for at every length."""
    mask: Literal["heads", "channels", "none"] = "heads"
    """Take away each channel of each layer; "heads" also each head of each layer with all its channels."""
    cap_half_life: float = 0.0
    """What to cap memory heads at; 0 is the length the model was trained at, or the first length where none is told."""
    heads: str = "worst3"
    """Heads to cap: 2.5,6.1 (layer.head, from 0), all, or worst3: the three that hold longest, beyond the cap."""
    interpolate: tuple[str, ...] = ()
    """Move the attention maps of heads to the identity: HEADS=STRENGTH, as in 2.0,2.1=0.5, or all=1."""
    choose_heads: int = 0
    """Choose so many heads one after the other, each the one whose map moved to the identity does most to the loss at
    the longest length, beside those already chosen. Half of the documents choose, and the others tell what it does."""
    choose_by: Literal["change", "help"] = "change"
    """What the best head does: change the loss most, or lower it most (and then none is chosen that does not)."""
    choose_strength: float = 1.0
    """How far the maps of chosen heads are moved: 1 is the identity."""
    scale: tuple[str, ...] = ()
    """Multiply what a channel, a head or a path adds: TARGET=FACTOR, as in 2.read=0.5, 2.1=0, memory=0.5 or 3.mlp=0."""
    paths: Literal["none", "whole", "straight"] = "none"
    """Take away what the mixer and the MLP of each layer add to the stream: whole, for all that comes after, or only
    from what the head reads, so that later layers still see it."""
    sinks: bool = False
    """Look for secondary attention sinks."""
    stress: int = 2
    """Random directions in which each block's input is disturbed; 0 leaves the test out."""
    select: str | None = None
    """A selection policy: how less of the keys is read, such as "top_pages k=64" (docs/selection.md). What layers
    attend to is then told as if all keys were read, everything else as they are read."""
    seed: int = 1234
    """Chooses documents, records and directions."""

    def __post_init__(self) -> None:
        check_fields(self)
        lengths = list(self.lengths)
        _require(lengths == sorted(set(lengths)), "lengths", self.lengths, "strictly increasing")
        _require(not lengths or lengths[0] >= QUERIES, "lengths", self.lengths, f"{QUERIES} or more")
        gaps = [after - before for before, after in pairwise(lengths)]
        _require(min(gaps, default=QUERIES) >= QUERIES, "lengths", self.lengths, f"{QUERIES} or more apart")
        for name in ("documents", "choose_heads", "stress", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.seed < 1 << 62, "seed", self.seed, "below 2**62")
        _require(self.records >= 1, "records", self.records, "at least 1")
        strength = self.choose_strength
        _require(0 < strength <= 1, "choose_strength", strength, "over 0 and at most 1")
        _require(0 <= self.cap_half_life < float("inf"), "cap_half_life", self.cap_half_life, "positive, or 0")

    @property
    def extent(self) -> Extent:
        """Lengths and documents, as given or of the size."""
        usual = SIZES[self.size]
        documents = self.documents or usual.documents
        return Extent(self.lengths or usual.lengths, documents, min(documents, usual.stress_documents))


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")
