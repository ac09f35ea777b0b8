"""One key for each chunk of a text, by which queries find it (LongHeads, arXiv 2402.10685; mixers.md, section 6.3).

Of a chunk that is full, and of each query head: o is the mean over its w queries of softmax(q·Kᵀ/√K) V, which all see
the whole chunk, and its key c = softmax(o·Kᵀ/√K) K. Queries and keys have their place in the chunk as position.
"""

from torch import Tensor

from atma.ops.backend import backend_for, check_tensors, implementation, recording
from atma.ops.paged.pages import Pages

Held = Tensor | Pages


def chunk_keys(
    summaries: Held, q: Tensor, ring: Tensor, held: tuple[Held, Held], length: Tensor, backend: str = "auto"
) -> Held:
    """The summaries (atma.ops.chosen) with the keys of the chunks that new tokens make full.

    q (B, H, T, K): the new tokens' queries, from length (B,) int32 on; ring (B, H, w, K): those before, position p at
    place p mod w; held: keys and values (B, G, S, K) or pages of them, the new ones among them. A summary has the K
    numbers of the key of each query head, and one that is 1 for the first chunk and 0 for the others. Written in place
    unless gradients are recorded. ValueError: shapes do not fit.
    """
    pool, width = _pool(held[0]), q.shape[3]
    check_tensors("q ring keys", q, ring, pool)
    if ring.shape[:2] != q.shape[:2] or ring.shape[3] != width or q.shape[1] % pool.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)}, ring {tuple(ring.shape)} and keys {tuple(pool.shape)} do not fit together"
        )
    if ring.shape[2] * _pool(summaries).shape[3] <= width:
        raise ValueError(f"summaries of {ring.shape[2]} × {_pool(summaries).shape[3]} numbers cannot hold {width + 1}")
    plain = backend == "auto" and (recording() or q.dtype != pool.dtype)
    chosen = backend_for("reference" if plain else backend, q, "chunk_keys")
    return implementation("chunk_keys", chosen).keys(summaries, q, ring, held, length)


def _pool(held: Held) -> Tensor:
    return held.pool if isinstance(held, Pages) else held


__all__ = ["chunk_keys"]
