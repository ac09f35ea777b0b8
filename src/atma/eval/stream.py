"""Running a model over contexts of any length: rows batched while they are short, chunks through the state when long.

Memory is the state (its capacity is the context's length) plus a few numbers a token; no (B, T, vocab) tensor is built.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from atma.model import Model
from atma.state import ModelState

Advance = Callable[[int], None]
"""Called with the number of tokens just run."""


class Streaming(NamedTuple):
    """How much runs at once, in tokens: `chunk` of one row, `batch_tokens` over the rows of a batch."""

    chunk: int = 1024
    batch_tokens: int = 8192


DEFAULT = Streaming()


class Piece(NamedTuple):
    """Final hidden states (rows, positions, D) of a part of the tokens: their rows and their positions."""

    rows: slice
    positions: slice
    hidden: Tensor


@torch.inference_mode()
def score(
    model: Model,
    tokens: Tensor,
    last: int | None = None,
    streaming: Streaming = DEFAULT,
    progress: Advance | None = None,
) -> Tensor:
    """Nats of each token given all before it: tokens (B, T + 1) int64 → (B, T) float32 on the CPU, or the `last` of T.

    ValueError for fewer than two tokens, an id outside the vocabulary, or a loss that is not finite.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    B, T = inputs.shape
    first = T - (T if last is None else last)
    nats = torch.empty(B, T - first, dtype=torch.float32)
    for rows, positions, hidden in pieces(model, inputs, last, streaming, progress):
        goals = targets[rows, positions].to(hidden.device)
        nats[rows, positions.start - first : positions.stop - first] = model.loss(hidden, goals).float().cpu()
    if not bool(nats.isfinite().all()):
        row, position = (~nats.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"row {row}: the loss at position {first + position} is not finite; check the model's weights")
    return nats


@torch.inference_mode()
def pieces(
    model: Model,
    inputs: Tensor,
    last: int | None = None,
    streaming: Streaming = DEFAULT,
    progress: Advance | None = None,
) -> Iterator[Piece]:
    """Run inputs (B, T) int64 and yield hidden states, only of the `last` positions if given, rows first, then time."""
    B, T = inputs.shape
    last = T if last is None else last
    if not 1 <= last <= T:
        raise ValueError(f"cannot score the last {last} of {T} tokens; give at least one token of context a target")
    _check_ids(inputs, model.config.vocab_size)
    inputs = inputs.to(next(model.parameters()).device)
    for rows in _groups(B, max(1, streaming.batch_tokens // T)):
        for start, hidden in hidden_chunks(model, inputs[rows], None, streaming.chunk):
            stop = start + hidden.shape[1]
            if stop > T - last:
                begin = max(start, T - last)
                yield Piece(rows, slice(begin, stop), hidden[:, begin - start :])
            if progress is not None:
                progress(hidden.shape[0] * hidden.shape[1])


@torch.inference_mode()
def hidden_chunks(
    model: Model, tokens: Tensor, state: ModelState | None = None, chunk: int = DEFAULT.chunk
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, hidden (B, c, D)) of tokens (B, T) by chunks; a given state is used up and must have room for T."""
    B, T = tokens.shape
    if T == 0:
        raise ValueError("no tokens to run; give a prompt of at least one token")
    if state is None and chunk < T:
        state = model.init_state(B, T)
    for start in range(0, T, chunk):
        hidden, state = model(tokens[:, start : start + chunk], state)
        yield start, hidden


def _groups(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _check_ids(tokens: Tensor, vocab_size: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token id {wrong} is outside the model's vocabulary of {vocab_size}; use the model's tokenizer"
        )
