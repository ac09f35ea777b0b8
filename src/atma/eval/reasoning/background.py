"""The long text that facts are spread over, as sentences: any text, by default the Python standard library's sources.

A line of the text is cut where a sentence ends, and every piece becomes a line of its own, so that a fact, which is a
line as well, fits between any two. Lines are counted before they are tokenised: where a trial's text ends is the same
for every model.
"""

import re

import numpy as np

from atma.data.sources import documents
from atma.eval.suite import sha256
from atma.tokenizer import Tokenizer

CHARACTERS = 4 << 20
"""Of a source, what is read at most: about a million tokens of most tokenizers, read round and round beyond."""
SENTENCE = re.compile(r"(?<=[.!?]) +")


class Background:
    """Token ids (n,) int64 of a text's lines, endlessly repeated, and where each of the lines begins."""

    def __init__(self, lines: list[str], tokenizer: Tokenizer) -> None:
        pieces = tokenizer.encode_many([line + "\n" for line in lines])
        self.ids = np.concatenate(pieces).astype(np.int64)
        self.starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]
        self.sha256 = sha256("\n".join(lines))

    def end(self, draw: float) -> int:
        """The place where the text of a trial ends, before a line; draw in [0, 1)."""
        return int(self.starts[int(draw * len(self.starts))])

    def take(self, end: int, size: int) -> np.ndarray:
        """The `size` tokens before a place."""
        return np.take(self.ids, np.arange(end - size, end), mode="wrap")

    def line_start(self, place: int) -> int:
        """The last place at or before `place` where a line begins."""
        turns, inside = divmod(place, len(self.ids))
        return turns * len(self.ids) + int(self.starts[np.searchsorted(self.starts, inside, "right") - 1])

    def spread(self, end: int, size: int, facts: list[np.ndarray], depths: list[float]) -> np.ndarray:
        """`size` tokens before `end` with the facts between lines, each at its depth in [0, 1) of them, rising.

        The first line may be cut. A fact whose line began before the text stands at its beginning.
        """
        begin = end - size
        places = [max(begin, self.line_start(begin + int(depth * (size + 1)))) - begin for depth in depths]
        text, parts, done = self.take(end, size), [], 0
        for place, fact in zip(places, facts, strict=True):
            parts += [text[done:place], fact]
            done = place
        return np.concatenate([*parts, text[done:]])


def background(source: str, tokenizer: Tokenizer) -> Background:
    """The background of a source of `atma.data.sources`. ValueError: there is none, or no text in it."""
    return Background(lines_of(source), tokenizer)


def lines_of(source: str) -> list[str]:
    """The sentences of a source, in order, CHARACTERS at most; none is empty."""
    lines: list[str] = []
    size = 0
    for document in documents(source):
        for line in document.text.splitlines():
            new = [part for part in SENTENCE.split(line.rstrip()) if part.strip()]
            size += sum(len(part) + 1 for part in new)
            lines += new
            if size >= CHARACTERS:
                return lines
    return lines
