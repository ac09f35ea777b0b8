"""Haystacks: long texts as token ids, tokenised once, read round and round, with the places between words known.

synthetic: five short sentences over and over. prose: a megabyte of generated sentences, the same on every machine.
natural: any text, by default the Python standard library of the interpreter that runs this (so its bytes are that
library's; every row tells its hash), or the validation split of prepared data.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from atma.data.dataset import MANIFEST, TokenSet
from atma.data.sources import documents
from atma.eval.likelihood.prefixes import without
from atma.eval.retrieval.words import filler, prose
from atma.eval.suite import sha256
from atma.tokenizer import Tokenizer

Kind = Literal["synthetic", "prose", "natural"]
NATURAL_CHARACTERS = 8 << 20
"""Of a natural text, what is read at most: 1M tokens of most tokenizers without coming round."""
PROSE_SEED = 0
REACH = 64
"""The most tokens by which a place moves to stand between sentences or words."""


class Haystack:
    """ids (n,) int64, read round and round; `sentences` and `words` (n,) mark the tokens where one begins.

    A word begins at a token that begins with a blank or follows a line end; a sentence at a word after a token that
    ends with . ! ? or a line end. Where a tokenizer's tokens have no bytes, a word may begin at any token.
    """

    def __init__(self, name: str, ids: np.ndarray, text_sha256: str, tokenizer: Tokenizer) -> None:
        if not len(ids):
            raise ValueError(f"the {name} haystack has no text; choose another")
        self.name, self.sha256 = name, text_sha256
        self.ids = np.ascontiguousarray(ids, dtype=np.int64)
        blank, stop, line = _edges(self.ids, tokenizer)
        before = np.roll(self.ids, 1)
        self.words = blank[self.ids] | line[before]
        self.sentences = self.words & (stop | line)[before]

    def take(self, start: int, size: int) -> np.ndarray:
        """`size` token ids from a place of the endless text, which may be negative."""
        return np.take(self.ids, np.arange(start, start + size), mode="wrap")

    def between(self, place: int, reach: int) -> int:
        """The nearest place where a sentence begins, within `reach` tokens; else a word; else the place itself."""
        window = np.arange(place - reach, place + reach + 1)
        for marks in (self.sentences, self.words):
            found = np.flatnonzero(np.take(marks, window, mode="wrap"))
            if found.size:
                return int(window[found[np.argmin(np.abs(found - reach))]])
        return place

    def end(self, draw: int) -> int:
        """Where a trial's haystack ends, at every length: `draw` of 2**32 through the text, between sentences."""
        return self.between(draw * len(self.ids) >> 32, REACH)


def haystack(kind: Kind, tokenizer: Tokenizer, natural: str = "stdlib") -> Haystack:
    """A haystack in the tokens of a tokenizer. ValueError: no such text, or prepared with another tokenizer."""
    if kind == "natural" and (Path(natural) / MANIFEST).is_file():
        return _prepared(Path(natural), tokenizer)
    text = filler() if kind == "synthetic" else prose(PROSE_SEED) if kind == "prose" else natural_text(natural)
    [ids] = tokenizer.encode_many([text])
    return Haystack(kind, ids, sha256(text), tokenizer)


def natural_text(source: str) -> str:
    """The documents of a source in order, with an empty line between, up to NATURAL_CHARACTERS."""
    parts: list[str] = []
    size = 0
    for document in documents(source):
        parts.append(document.text.strip("\n"))
        size += len(parts[-1]) + 2
        if size >= NATURAL_CHARACTERS:
            break
    return ("\n\n".join(parts) + "\n\n")[:NATURAL_CHARACTERS]


def split_text(token_set: TokenSet, eot: int, limit: int = 4_000_000) -> np.ndarray:
    """Text tokens among the first `limit` of the split in order, int64: what lies between a needle and its cue."""
    text = without(token_set.read(0, min(limit, token_set.tokens)), eot)
    if len(text) == 0:
        raise ValueError("the split has no text; prepare data with a validation split")
    return text


def _prepared(folder: Path, tokenizer: Tokenizer) -> Haystack:
    token_set = TokenSet.open(folder, "validation")
    if token_set.tokenizer is None or token_set.tokenizer.hash() != tokenizer.hash():
        raise ValueError(
            f"{folder}: prepared with another tokenizer than the model's; name its text, or leave --natural out"
        )
    return Haystack("natural", split_text(token_set, tokenizer.eot), token_set.hash, tokenizer)


def _edges(ids: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each token id: does it begin with a blank, end with the end of a sentence, end with a line end?"""
    blank, stop, line = (np.zeros(tokenizer.vocab_size, dtype=bool) for _ in range(3))
    for i in np.unique(ids).tolist():
        try:
            data = tokenizer.token_bytes(i)
        except ValueError:  # neither byte-level nor SentencePiece-like
            return np.ones_like(blank), stop, line
        blank[i], stop[i], line[i] = (
            data[:1] in (b" ", b"\n", b"\t"),
            data[-1:] in (b".", b"!", b"?"),
            data[-1:] == b"\n",
        )
    return blank, stop, line
