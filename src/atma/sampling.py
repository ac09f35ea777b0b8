"""From logits to the next token: greedy, or a seeded draw from what temperature, top-k, top-p and min-p leave."""

import math

import torch
from torch import Tensor

from atma.settings import Settings
from atma.tokenizer import Tokenizer


def of_tokens(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Logits (..., V) of a model for the ids of its tokenizer (..., tokens): −inf where no token has the id."""
    logits = logits[..., : tokenizer.vocab_size]
    if not len(tokenizer.holes):
        return logits
    return logits.index_fill(-1, torch.from_numpy(tokenizer.holes).to(logits.device), -torch.inf)


def choose(logits: Tensor, settings: Settings, seen: Tensor, random: torch.Generator) -> int:
    """The next token for float32 logits (V,) on the CPU; `seen` (V,) marks tokens of the text. One draw at the most."""
    penalty = settings.repetition_penalty
    if penalty != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if settings.temperature == 0:
        token = int(logits.argmax())
        _require_finite(float(logits[token]))
        return token
    values, ids = _most_likely(logits.double() / settings.temperature, settings)
    cumulative = values.softmax(0).cumsum(0)
    _require_finite(float(cumulative[-1]))
    draw = torch.rand(1, generator=random, dtype=torch.float64) * cumulative[-1]
    rank = torch.searchsorted(cumulative, draw, right=True)
    return int(rank if ids is None else ids[rank])


def _most_likely(logits: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Logits (V,) that the filters keep, most likely first, and their tokens; None for these: all tokens, in order."""
    if settings.top_k == 0 and settings.top_p == 1 and settings.min_p == 0:
        return logits, None
    values, ids = logits.sort(descending=True, stable=True)
    values = values[: settings.top_k or None]
    probabilities = values.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    values = values[before < settings.top_p] if settings.top_p < 1 else values
    values = values[values >= values[0] + math.log(settings.min_p)] if settings.min_p > 0 else values
    return values, ids[: len(values)]


def _require_finite(value: float) -> None:
    if not math.isfinite(value):
        raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
