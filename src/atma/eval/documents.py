"""The text that evaluation runs on: long documents, the token stream, and the haystack around a needle.

Text here is without end-of-text tokens, except in `junk_stream`. A window of length L is end-of-text and then text, as
at the start of a document in training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atma.data.dataset import TokenSet


class Documents(NamedTuple):
    """Texts of one length: tokens (documents, length) int64, the id that starts a window, and how many were joined."""

    tokens: np.ndarray
    eot: int
    joined: int = 0

    def windows(self, length: int) -> np.ndarray:
        """(documents, length + 1): end-of-text, then the first `length` tokens of each: `length` inputs and targets."""
        return _after_eot(self.tokens[:, :length], self.eot)

    def endings(self, length: int) -> np.ndarray:
        """(documents, length + 1): end-of-text, then the last `length` tokens of each."""
        return _after_eot(self.tokens[:, self.tokens.shape[1] - length :], self.eot)


def choose_documents(
    token_set: TokenSet, eot: int, length: int, count: int, seed: int = 0, joined: bool = False
) -> Documents:
    """The first `length` tokens of up to `count` documents that have as many, in an order fixed by the seed.

    Where fewer exist, `joined` fills up with texts made of consecutive documents, else there are fewer. ValueError
    when there is none at all.
    """
    long = np.flatnonzero(token_set.lengths > length)
    chosen = np.random.default_rng(seed).permutation(long)[:count].tolist()
    texts = [without(token_set.document(index), eot)[:length] for index in chosen]
    rest = _joined(token_set, eot, length, count - len(texts), set(chosen)) if joined else []
    texts += rest
    if not texts:
        mend = "choose shorter lengths or prepare longer text" + ("" if joined else ", or allow joined documents")
        raise ValueError(f"no document has {length} tokens; {mend}")
    return Documents(np.stack(texts), eot, len(rest))


def junk_stream(token_set: TokenSet, eot: int, length: int, count: int) -> Documents:
    """Up to `count` consecutive stretches of `length` tokens of all documents, with end-of-text between these."""
    whole = min(count, (token_set.tokens - 1) // length)
    if whole == 0:
        mend = "choose shorter lengths or prepare more text"
        raise ValueError(f"the split has {token_set.tokens} tokens, not {length + 1}; {mend}")
    return Documents(token_set.read(1, 1 + whole * length).reshape(whole, length), eot)


def haystack(token_set: TokenSet, eot: int, limit: int = 4_000_000) -> np.ndarray:
    """Text tokens among the first `limit` of the split in order, int64: what lies between a needle and its cue."""
    text = without(token_set.read(0, min(limit, token_set.tokens)), eot)
    if len(text) == 0:
        raise ValueError("the split has no text; prepare data with a validation split")
    return text


def text_tokens(token_set: TokenSet, joined: bool = True) -> int:
    """Text tokens of the whole split (`joined`) or of its longest document."""
    return token_set.tokens - token_set.documents if joined else int(token_set.lengths.max()) - 1


def without(document: np.ndarray, eot: int) -> np.ndarray:
    """The document's tokens that are not end-of-text."""
    return document[document != eot]


def check_lengths(lengths: Sequence[int], documents: Documents) -> None:
    """ValueError unless lengths are positive, strictly increasing and within the documents."""
    longest = documents.tokens.shape[1]
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"lengths must be positive and strictly increasing, not {list(lengths)}")
    if lengths[-1] > longest:
        raise ValueError(
            f"length {lengths[-1]} is longer than the documents' {longest} tokens; choose longer documents"
        )


def _after_eot(tokens: np.ndarray, eot: int) -> np.ndarray:
    return np.concatenate([np.full((len(tokens), 1), eot, dtype=np.int64), tokens], axis=1)


def _joined(token_set: TokenSet, eot: int, length: int, count: int, used: set[int]) -> list[np.ndarray]:
    """Up to `count` texts of `length` tokens, each of consecutive documents that are not used already."""
    texts: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    have = 0
    for index in range(token_set.documents):
        if len(texts) >= count:
            break
        if index in used:
            continue
        parts.append(without(token_set.document(index), eot))
        have += len(parts[-1])
        if have >= length:
            texts.append(np.concatenate(parts)[:length])
            parts, have = [], 0
    return texts
