"""Keys that are not finite, kept from the queries that do not see them.

A block of scores is multiplied by a block of values, and a hidden key has the weight 0; but 0 · NaN is NaN. So where a
key that some queries of a call see and others do not holds such a number, it is computed with as zero, and what sees it
is NaN. Where none does, which the sums of the keys tell, nothing is changed.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

Statistics = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def kept_apart(statistics: Statistics) -> Statistics:
    """The same statistics (see `statistics_of`), of which no query's depend on a key that it does not see."""

    @wraps(statistics)
    def guarded(
        q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if q.shape[2] == 1 or not _doubtful(k, v, first, last):
            return statistics(q, k, v, scale, first, last)
        bad, seen = poisoned(k, v, first, last)
        hidden = bad.unsqueeze(-1)
        spoilt = seen.repeat_interleave(q.shape[1] // k.shape[1], 1)
        S, L, Q, M = statistics(q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), scale, first, last)
        L, Q, M = (x.masked_fill(spoilt, torch.nan) for x in (L, Q, M))
        return S.masked_fill(spoilt.unsqueeze(-1), torch.nan), L, Q, M

    return guarded


def poisoned(k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The keys (B, G, S) that hold a number that is not finite, and the queries (B, G, T) that see one."""
    bad = ~(torch.isfinite(k).all(-1) & torch.isfinite(v).all(-1))
    before = torch.nn.functional.pad(bad.int().cumsum(-1), (1, 0))
    ends, begins = (x.long().unsqueeze(1).expand(-1, k.shape[1], -1) for x in (last, first))
    return bad, before.gather(2, ends.clamp(max=k.shape[2])) > before.gather(2, begins)


def _doubtful(k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> bool:
    """Whether a key that not all queries see may not be finite, by their sums: a false alarm costs only time."""
    for edge in (first, last):
        low, high = (int(x) for x in edge.aminmax())
        for x in (k, v):
            part = x[:, :, low:high]
            if part.numel() and not torch.isfinite(part.sum()):
                return True
    return False
