"""Which documents are held out for validation: a share of every length, chosen by hash.

Evaluation at long context needs long documents that training never saw, and most corpora have few of them. So
documents are sorted by length and cut into strata of 1/share neighbours, the first eight strata of at most five; in
each full stratum the document with the lowest hash of (seed, text) is held out. A corpus of forty documents or more
thus holds out eight of its forty longest, one of the five longest among them. A corpus of fewer than 1/share documents
gives the last share of each document instead.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from atma.data.left_out import Document

RULE = (
    "documents sorted by length, longest first, in strata of 1/share neighbours (the first eight of at most five); "
    "from each full stratum the one with the lowest hash of seed and text; with fewer than 1/share documents, the end "
    "of each"
)
TOP_STRATA, TOP_WIDTH = 8, 5


def held_out(lengths: np.ndarray, hashes: np.ndarray, share: float) -> np.ndarray:
    """Boolean mask (n,) of the validation documents. lengths int64, hashes uint64, both (n,); share in (0, 1)."""
    order = np.lexsort((hashes, -lengths))
    chosen = np.zeros(len(lengths), bool)
    bounds = _bounds(len(lengths), share)
    for low, high in itertools.pairwise(bounds):
        stratum = order[low:high]
        chosen[stratum[np.argmin(hashes[stratum])]] = True
    return chosen


def _bounds(documents: int, share: float) -> list[int]:
    """Ends of the full strata, ascending from 0."""
    width = min(TOP_WIDTH, 1 / share)
    bounds = [0.0, *(width * (i + 1) for i in range(TOP_STRATA))]
    while bounds[-1] <= documents:
        bounds.append(bounds[-1] + 1 / share)
    return [round(bound) for bound in bounds if round(bound) <= documents]


def mix(values: np.ndarray, seed: int) -> np.ndarray:
    """A hash of uint64 values under a seed, uint64 (the finaliser of SplitMix64; Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def cut(document: Document, share: float) -> Iterator[tuple[Document, bool]]:
    """A document as (training part, False) and (its end, True), cut at a line end where there is one.

    A document too short for two parts stays whole, for training.
    """
    middle = int(len(document.text) * (1 - share))
    middle = document.text.find("\n", middle) + 1 or middle
    head, tail = document.text[:middle], document.text[middle:]
    if not head.strip() or not tail.strip():
        yield document, False
        return
    yield Document(document.name, head), False
    yield Document(f"{document.name} (end)", tail), True
