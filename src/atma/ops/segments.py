"""Where packed documents begin. A document is a run of equal ids: one that comes back is another document."""

import torch
from torch import Tensor


def begins(segment_ids: Tensor) -> Tensor:
    """(B, T) bool of ids (B, T): whether a token is the first of a document that follows another in its row."""
    begun = torch.zeros_like(segment_ids, dtype=torch.bool)
    begun[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return begun


def document_start(segment_ids: Tensor) -> Tensor:
    """(B, T) int32 of ids (B, T): index of the first token of each token's document."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device, dtype=torch.int32)
    return torch.where(begins(segment_ids), index, 0).cummax(1).values


def tokens_before(segment_ids: Tensor) -> Tensor:
    """(B, T) int32 of ids (B, T): how many tokens of its own document precede each token."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device, dtype=torch.int32)
    return index - document_start(segment_ids)
