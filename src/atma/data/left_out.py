"""What a source holds that did not become data: files by name, rows and documents by number, each with its reason."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class Document(NamedTuple):
    """One text and where it is from."""

    name: str
    text: str


class NoField(ValueError):
    """The first row of a file has no such field: in a folder, the file is of another kind."""


def readable(name: str) -> str:
    """A path as UTF-8 can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class LeftOut:
    """Counts of documents, rows and files by reason, and the reason of every file that was passed over."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.files: dict[str, str] = {}
        self.characters: Counter[str] = Counter()
        """Characters that the tokenizer has no token for."""
        self.skips_bad = False
        """Whether conversations that cannot be used are counted instead of ending the preparation."""

    def file(self, name: str, reason: str, kind: str | None = None) -> None:
        """Pass over a file or folder; `kind` is what it counts as, if the reason says more."""
        self.files[readable(name)] = reason
        self.counts[kind or reason] += 1

    def row(self, reason: str) -> None:
        """Leave out one row or document."""
        self.counts[reason] += 1

    def add(self, counts: Mapping[str, int], characters: Mapping[str, int]) -> None:
        """What was left out of another part."""
        self.counts.update(counts)
        self.characters.update(characters)

    def told(self) -> str:
        """All counts in one line."""
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))
