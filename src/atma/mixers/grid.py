"""Pages of the absolute grid (mixers.md, section 1): where they lie in a call, and which of them are the best."""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.segments import document_start


class Grid(NamedTuple):
    """The pages of a call without a state, of which each document begins one."""

    page: Tensor
    """(B or 1, T): number of each token's page in the call."""
    begin: Tensor
    """(B or 1, P): the index of each page's first token; T for a page that a row does not have."""
    document: Tensor
    """(B or 1, T): the index of the first token of each token's document."""


def grid_of(tokens: int, page: int, segment_ids: Tensor | None, device: torch.device) -> Grid:
    """The pages of so many tokens, or of packed documents (B, T)."""
    index = torch.arange(tokens, device=device)[None]
    if segment_ids is None:
        return Grid(index // page, index[:, ::page], torch.zeros_like(index))
    document = document_start(segment_ids).long()
    number = ((index - document) % page == 0).long().cumsum(1) - 1
    begin = torch.full((len(number), int(number.max()) + 1), tokens, device=device)
    return Grid(number, begin.scatter_reduce(1, number, index.expand_as(number), "amin"), document)


def begun_in(length: Tensor, tokens: int, page: int) -> tuple[Tensor, Tensor]:
    """Numbers (B, N) of the pages that so many tokens behind `length` (B,) may fill, and whether they do."""
    length = length.long()[:, None]
    number = length // page + torch.arange((tokens + page - 1) // page, device=length.device)
    return number, (number + 1) * page <= length + tokens


def whole_pages(held: Tensor, page: int, pages: int, width: int) -> Tensor:
    """The first `width` numbers (B, G, pages, width) of summaries (B, G, S, ·), spread over the tokens of each page."""
    return held[:, :, : pages * page].unflatten(2, (pages, page)).flatten(3)[..., :width]


def chosen_of(score: Tensor, count: int) -> Tensor:
    """Which of the scores (…, P) are among the `count` largest that are not -inf; of equal ones the first."""
    taken = torch.zeros_like(score, dtype=torch.bool)
    return taken.scatter(-1, best_of(score, count), True) & ~torch.isneginf(score)


def best_of(score: Tensor, count: int) -> Tensor:
    """Indices (…, min(count, P)) of the largest of the scores (…, P), of equal ones the first."""
    score = score.detach()
    if score.shape[-1] <= count:
        return torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    value, index = score.topk(count + 1, -1)
    tied = (value[..., -1] == value[..., -2]) & ~torch.isneginf(value[..., -1])
    if not bool(tied.any()):
        return index[..., :-1]
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count]


__all__ = ["Grid", "begun_in", "best_of", "chosen_of", "grid_of", "whole_pages"]
