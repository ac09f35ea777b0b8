"""Which tokens of a batch are text, and where texts begin: what masks and positions say, as our models take it.

Our mixers know no padding. A call without a state reads padding as documents of its own, of which the texts beside it
see nothing; a call with a state reads the tokens of each row alone (atma.integrations.transformers.ragged). Packed
documents are told by positions that begin again, as padding-free collators write them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Of a call of (B, T) tokens."""

    real: Tensor | None
    """(B, T) bool: which are text; None where all are."""
    begins: Tensor | None
    """(B, T) bool: which begin a packed document behind another one; None where every row is one document."""

    def segment_ids(self) -> Tensor | None:
        """(B, T) ids for a call without a state; None where each row is one text from its first token."""
        if self.real is None and self.begins is None:
            return None
        begins = torch.zeros_like(self.real) if self.begins is None else self.begins.clone()  # pyright: ignore
        if self.real is not None:
            begins[:, 1:] |= self.real[:, 1:] != self.real[:, :-1]
        return begins.cumsum(1)


def layout(shape: tuple[int, int], mask: Tensor | None, position_ids: Tensor | None, seq_idx: Tensor | None) -> Layout:
    """What a mask (B, ≥ T) of 0 and 1, positions (B or 1, T) and numbers of documents (B, T) say of (B, T) tokens.

    ValueError: shapes that do not fit, or padding between the tokens of a row.
    """
    real = None if mask is None else _real(shape, mask)
    begins = _begins(shape, position_ids, seq_idx)
    if real is not None and begins is not None:
        begins[:, 1:] &= real[:, 1:] & real[:, :-1]
    if torch.compiler.is_compiling():
        return Layout(real, begins)
    if real is not None:
        real = _checked(real)
    if begins is not None and not begins.any():
        begins = None
    return Layout(real, begins)


def _real(shape: tuple[int, int], mask: Tensor) -> Tensor:
    rows, length = shape
    if mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        raise ValueError(f"attention_mask must be ({rows}, {length} or more) of 0 and 1, not {tuple(mask.shape)}")
    return mask[:, mask.shape[1] - length :] != 0


def _checked(real: Tensor) -> Tensor | None:
    """The same; None where all is text. ValueError where padding stands between the tokens of a row."""
    if real.all():
        return None
    runs = real[:, 0].int() + (real[:, 1:] & ~real[:, :-1]).sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0, 0])
        raise ValueError(f"attention_mask: row {row} has padding between its tokens; pad on the left or on the right")
    return real


def _begins(shape: tuple[int, int], position_ids: Tensor | None, seq_idx: Tensor | None) -> Tensor | None:
    found = position_ids if seq_idx is None else seq_idx
    if found is None or shape[1] == 1:
        return None
    name = "position_ids" if seq_idx is None else "seq_idx"
    if found.ndim != 2 or found.shape[0] not in (1, shape[0]) or found.shape[1] != shape[1]:
        raise ValueError(f"{name} must be {shape} or (1, {shape[1]}), not {tuple(found.shape)}")
    begins = torch.zeros(shape, dtype=torch.bool, device=found.device)
    begins[:, 1:] = found[:, 1:] != found[:, :-1] + (1 if seq_idx is None else 0)
    return begins


def documents(length: int, cu_seq_lens: Tensor) -> Tensor:
    """(1, T) numbers of documents whose edges cu_seq_lens (N + 1,) tells: 0, …, T."""
    return torch.bucketize(torch.arange(length, device=cu_seq_lens.device), cu_seq_lens[1:], right=True)[None]


__all__ = ["Layout", "documents", "layout"]
