"""One pass over a text with its records: losses at each length, and answers for the records at each length.

A length L counts the tokens read. The loss at L is the mean over the second half of these, positions L/2 to L, so that
it tells what reading costs there. Memory is one state and a few numbers a token, at any length.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from atma.diagnose.texts import VALUE_TOKENS, Laid, Record
from atma.eval.stream import Advance, score
from atma.model import Model
from atma.state import ModelState, branch


class Watch(Protocol):
    """What looks on while a text is read. Each method gives a context in which the model is called."""

    queries: int
    """Tokens at the end of every length that are read in one call."""

    def ending(self, length: int) -> AbstractContextManager[object]:
        """Around the call whose last token is the length's last."""
        ...

    def asking(self, length: int, record: Record) -> AbstractContextManager[object]:
        """Around the call that reads a record's cue and value (without its last token) after so many tokens."""
        ...


class Nobody:
    """Looks at nothing."""

    queries = 0

    def ending(self, length: int) -> AbstractContextManager[object]:
        return nullcontext()

    def asking(self, length: int, record: Record) -> AbstractContextManager[object]:
        return nullcontext()


class Reading(NamedTuple):
    """Of one text: mean nats of each length's second half, and of each record's tokens their nats and whether right."""

    losses: list[float]
    endings: list[float]
    """By length: mean nats of its last tokens, half as many as the first length has."""
    nats: list[list[float]]
    """By length and record: the mean over the value's tokens."""
    right: list[list[int]]
    """By length and record: how many of the value's tokens are the likeliest."""


@torch.inference_mode()
def read(
    model: Model,
    text: Laid,
    lengths: Sequence[int],
    chunk: int,
    watch: Watch | None = None,
    progress: Advance | None = None,
) -> Reading:
    """Read a text to the longest of the lengths, asking for its records at each."""
    watch = watch or Nobody()
    device = next(model.parameters()).device
    tokens = text.tokens[None].to(device)
    room = max((len(record.cue) + VALUE_TOKENS for record in text.records), default=0)
    state, costs = model.init_state(1, lengths[-1] + room), torch.zeros(lengths[-1])
    found = Reading([], [], [], [])
    for start, stop in _cuts(lengths, chunk, watch.queries):
        with watch.ending(stop) if stop in lengths else nullcontext():
            hidden, after = model(tokens[:, start:stop], state)
        assert after is not None
        state = after
        costs[start:stop] = model.loss(hidden, tokens[:, start + 1 : stop + 1])[0].float().cpu()
        if progress is not None:
            progress(stop - start)
        if stop in lengths:
            found.losses.append(float(costs[stop // 2 : stop].double().mean()))
            found.endings.append(float(costs[stop - lengths[0] // 2 : stop].double().mean()))
            answers = [_ask(model, state, stop, record, watch) for record in text.records]
            found.nats.append([nats for nats, _ in answers])
            found.right.append([right for _, right in answers])
    return found


def read_recent(model: Model, text: Laid, lengths: Sequence[int]) -> list[float]:
    """The endings of `read` where end-of-text and the last tokens are all that is read, as many as the first length."""
    window, eot = lengths[0], text.tokens[:1]
    texts = torch.stack([torch.cat([eot, text.tokens[length + 1 - window : length + 1]]) for length in lengths])
    return score(model, texts, window // 2).double().mean(1).tolist()


def _ask(model: Model, state: ModelState, length: int, record: Record, watch: Watch) -> tuple[float, int]:
    """Nats a token of the value, and how many of its tokens are the likeliest."""
    device = state.length.device
    asked = torch.tensor([record.cue + record.value], device=device)
    with watch.asking(length, record):
        hidden, _ = model(asked[:, :-1], branch(state))
    log_p = model.logits(hidden[:, -VALUE_TOKENS:])[0].double().log_softmax(-1)
    value = asked[0, -VALUE_TOKENS:]
    nats = -log_p.gather(-1, value[:, None])
    return float(nats.mean()), int((log_p.argmax(-1) == value).sum())


def _cuts(lengths: Sequence[int], chunk: int, queries: int) -> list[tuple[int, int]]:
    """Calls (start, stop) that end at every length, with the last `queries` tokens of each in a call of their own."""
    whole = {end for length in lengths for end in (length - queries, length)}
    free = (edge for edge in range(0, lengths[-1], chunk) if not any(n - queries < edge < n for n in lengths))
    edges = sorted({0, *free, *whole})
    return list(pairwise(edges))


__all__ = ["Nobody", "Reading", "Watch", "read", "read_recent"]
