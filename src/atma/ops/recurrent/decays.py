"""The decays inside a chunk of C tokens (mixers.md, section 3.2): what is read at p of a write at s ≤ p.

D[p, s] = a_{s+1} … a_p is never a quotient: every exponent is a sum of log decays between s and p alone, so that strong
decays neither overflow nor cancel, and nothing of an earlier document enters, not even by rounding.

`Whole` has one decay for each head and token: D is a table. `Channels` has one for each channel of what is read and
written. There the chunk is halved, and each half halved again: a reader p in a right half meets a writer s in the left
half beside it at their boundary b, as D[p, s] = (a_{b+1} … a_p) · (a_{s+1} … a_b), the one a factor of the reader, the
other of the writer, so that each halving is a product of matrices. It is exact for every length of a chunk.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.segments import begins

CHUNK = 64


def chunk_length(length: int, channels: bool) -> int:
    """C for this many tokens: 64 or fewer, and a power of two where it is halved."""
    if not channels:
        return min(CHUNK, length)
    return next(size for size in (1, 2, 4, 8, 16, 32, CHUNK) if size >= length or size == CHUNK)


def in_chunks(x: Tensor, chunk: int, axis: int = 2) -> Tensor:
    """(…, T, …) as (…, N, C, …), contiguous; the padding is zero: it writes nothing and does not decay."""
    padding = -x.shape[axis] % chunk
    x = F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, padding)) if padding else x.contiguous()
    return x.unflatten(axis, (-1, chunk))


def for_each_head(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, T, ·) repeated for the H heads of q."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def shared(grad: Tensor, like: Tensor) -> Tensor:
    """(B, H, T, ·) summed over the heads that share one of `like` (B, G, T, ·)."""
    return grad if grad.shape[1] == like.shape[1] else grad.unflatten(1, (like.shape[1], -1)).sum(2)


def weighed(beta: Tensor | None, x: Tensor) -> Tensor:
    return x if beta is None else beta * x


def joined(x: Tensor, length: int) -> Tensor:
    """(B, H, N, C, ·) as (B, H, T, ·), without the padding."""
    return x.flatten(2, 3)[:, :, :length].contiguous()


def total(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


class _Documents(NamedTuple):
    same: Tensor  # (B, 1, N, C, C): whether two tokens of a chunk are of one document
    entered: Tensor  # (B, 1, N, C, 1): whether no document has begun in the chunk up to this token


def _documents(segment_ids: Tensor, chunk: int) -> _Documents:
    # Tokens of one document have seen equally many births.
    births = in_chunks(begins(segment_ids), chunk, 1).cumsum(-1)[:, None, :, :, None]
    return _Documents(births == births.mT, births == 0)


class Whole(NamedTuple):
    """One decay for each head and token, or (heads 1) none: then D says which tokens see each other."""

    table: Tensor  # (B, H or 1, N, C, C): D, zero above the diagonal and across documents
    entry: Tensor  # (B, H or 1, N, C, 1): e^g, decay since before the chunk; zero once a document has begun in it
    last: Tensor  # (B, H or 1, N, C, 1): decay from this token to the chunk's last, zero across documents

    @classmethod
    def of(cls, log_decay: Tensor, chunk: int, segment_ids: Tensor | None) -> "Whole":
        rates = in_chunks(log_decay, chunk)
        lower = torch.ones(chunk, chunk, dtype=torch.bool, device=rates.device).tril()
        # Column s sums log a from s + 1 on.
        sums = rates.unsqueeze(-1).masked_fill(~lower.tril(-1), 0).cumsum(-2)
        table, entry = sums.exp_().mul_(lower), rates.cumsum(-1).exp_().unsqueeze(-1)
        if segment_ids is not None:
            documents = _documents(segment_ids, chunk)
            table.mul_(documents.same)
            entry.mul_(documents.entered)
        return cls(table, entry, table[..., -1, :, None])

    def scores(self, readers: Sequence[Tensor], writer: Tensor) -> list[Tensor]:
        """⟨x_p, y_s⟩_D of each reader x and the writer y, all (B, H, N, C, K): (B, H, N, C, C), zero where p < s."""
        return [(x @ writer.mT).mul_(self.table) for x in readers]

    def gradients(
        self,
        grads: Sequence[Tensor],
        scores: Sequence[Tensor],
        readers: Sequence[Tensor],
        writer: Tensor,
        ends: tuple[Tensor, Tensor] | None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Of the scores' gradients (overwritten): those of each reader, of the writer and of log a (B, H, N, C, 1).

        ends: gradients of the logarithms of `entry` and of `last`, by channel (B, H, N, C, K); None where there is no
        decay, and then that of log a is empty.
        """
        rate = self._rate(grads, scores, *ends) if ends else writer.new_empty(0)
        grads = [grad.mul_(self.table) for grad in grads]
        written = total(grad.mT @ x for grad, x in zip(grads, readers, strict=True))
        return [grad @ writer for grad in grads], written, rate

    def _rate(self, grads: Sequence[Tensor], scores: Sequence[Tensor], since: Tensor, until: Tensor) -> Tensor:
        within = total(grad * score for grad, score in zip(grads, scores, strict=True))
        # log a_i is in D[p, s] for s < i ≤ p, in e^g at p for p ≥ i, and in `last` at s for s < i.
        within[..., -1, :] += until.sum(-1)
        spanning = within.flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1)
        rate = spanning + since.sum(-1).flip(-1).cumsum(-1).flip(-1)
        return rate.unsqueeze(-1)


class Channels(NamedTuple):
    """One decay for each channel. `right` and `left` hold, from the halves of one token on, (B, H, N, P, h, K)."""

    right: tuple[Tensor, ...]  # decay of each reader in a right half since the boundary
    left: tuple[Tensor, ...]  # decay of each writer in a left half up to the boundary
    entry: Tensor  # (B, H, N, C, K): as in Whole
    last: Tensor
    same: Tensor | None  # (B, 1, N, C, C): tokens of one document

    @classmethod
    def of(cls, log_decay: Tensor, chunk: int, segment_ids: Tensor | None) -> "Channels":
        # Sums within blocks of h tokens: from the block's first token on, and from the next token to the block's last.
        since = in_chunks(log_decay, chunk).unsqueeze(-2)
        until = torch.zeros_like(since)
        right, left = [], []
        while since.shape[-3] > 1:
            (first, second), (before, after) = _halves(since), _halves(until)
            right.append(second.exp())
            left.append(before.exp())
            since = torch.cat((first, second + first[..., -1:, :]), -2)
            until = torch.cat((before + second[..., -1:, :], after), -2)
        entry, last, same = since.squeeze(-3).exp(), until.squeeze(-3).exp(), None
        if segment_ids is not None:
            documents = _documents(segment_ids, chunk)
            same = documents.same
            entry, last = entry * documents.entered, last * same[..., -1, :, None]
        return cls(tuple(right), tuple(left), entry, last, same)

    def scores(self, readers: Sequence[Tensor], writer: Tensor) -> list[Tensor]:
        """As in Whole."""
        return [self._scores(x, writer) for x in readers]

    def _scores(self, reader: Tensor, writer: Tensor) -> Tensor:
        table = reader.new_zeros(*reader.shape[:-1], reader.shape[-2])
        table.diagonal(dim1=-2, dim2=-1).copy_((reader * writer).sum(-1))
        for right, left in zip(self.right, self.left, strict=True):
            _block(table, right).copy_((right * _right(reader, right)) @ (left * _left(writer, left)).mT)
        return self.visible(table)

    def visible(self, table: Tensor) -> Tensor:
        """The table (overwritten), zero across documents."""
        return table if self.same is None else table.mul_(self.same)

    def read(self, table: Tensor, writer: Tensor) -> Tensor:
        """Σ_s table[p, s] D[p, s] y_s, (B, H, N, C, K), of the writer y and a table that is zero across documents."""
        found = table.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * writer
        for right, left in zip(self.right, self.left, strict=True):
            _right(found, right).add_(right * (_block(table, right) @ (left * _left(writer, left))))
        return found

    def gradients(
        self,
        grads: Sequence[Tensor],
        scores: Sequence[Tensor],
        readers: Sequence[Tensor],
        writer: Tensor,
        ends: tuple[Tensor, Tensor] | None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """As in Whole; that of log a is (B, H, N, C, K). The scores are not asked."""
        grads = [self.visible(grad) for grad in grads]
        own = [grad.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) for grad in grads]
        read = [grad * writer for grad in own]
        written = total(grad * x for grad, x in zip(own, readers, strict=True))
        assert ends is not None, "there is a decay"
        since, until = (x.unsqueeze(-3) for x in ends)
        for right, left in zip(reversed(self.right), reversed(self.left), strict=True):
            (first, second), (before, after) = _halves_of_block(since), _halves_of_block(until)
            # A right half's sums hold the whole left half, a left half's sums to the end the whole right half.
            first[..., -1, :] += second.sum(-2)
            second[..., -1, :] += before.sum(-2)
            given = left * _left(writer, left)
            taken = torch.zeros_like(given)
            for grad, x, found in zip(grads, readers, read, strict=True):
                block, reader = _block(grad, right), _right(x, right)
                part = right * (block @ given)
                _right(found, right).add_(part)
                second += reader * part
                taken += block.mT @ (right * reader)
            taken *= left
            _left(written, left).add_(taken)
            before += _left(writer, left) * taken
            since, until = (torch.stack(halves, -3).flatten(-4, -3) for halves in ((first, second), (before, after)))
        return read, written, since.squeeze(-2)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """(…, P, h, K) as the left and the right halves of blocks twice as long, each (…, P/2, h, K)."""
    left, right = x.unflatten(-3, (-1, 2)).unbind(-3)
    return left, right


def _halves_of_block(x: Tensor) -> tuple[Tensor, Tensor]:
    left, right = x.unflatten(-2, (2, -1)).unbind(-3)
    return left, right


def _left(x: Tensor, like: Tensor) -> Tensor:
    """(…, C, K), as a view of its left halves (…, P, h, K), P and h as in `like`."""
    return x.unflatten(-2, (-1, 2, like.shape[-2])).select(-3, 0)


def _right(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(-2, (-1, 2, like.shape[-2])).select(-3, 1)


def _block(table: Tensor, like: Tensor) -> Tensor:
    """A view (…, P, h, h) of a table (…, C, C): the rows of each right half, the columns of the left half beside it."""
    half = like.shape[-2]
    parts = table.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))[..., 1, :, :, 0, :]
    return parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
