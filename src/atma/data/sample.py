"""A fair, bounded sample of a stream of texts, to train a tokenizer on."""

import hashlib
import heapq
from collections.abc import Callable, Iterable

PIECE = 1 << 16
BUDGET = 8_000_000


def sample_texts(
    texts: Iterable[str], seed: int, progress: Callable[[int], None], budget: int = BUDGET
) -> tuple[list[str], int]:
    """Pieces of at most 65,536 characters, those with the lowest hashes of (seed, piece) up to `budget` characters.

    Returns them in their order in the stream, and the bytes of all texts. `progress` gets the bytes read so far. Memory
    is bounded by the budget.
    """
    kept: list[tuple[int, int, str]] = []
    key, size, held, number = seed.to_bytes(8, "little"), 0, 0, 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            data = piece.encode("utf-8", "surrogatepass")
            rank = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
            heapq.heappush(kept, (-rank, number, piece))
            size, held, number = size + len(data), held + len(piece), number + 1
            while held > budget and len(kept) > 1:
                held -= len(heapq.heappop(kept)[2])
        progress(size)
    return [piece for _, _, piece in sorted(kept, key=lambda entry: entry[1])], size
