"""How fast each entrant trains, and writes a token at a short and at a long text: timed in turn, in one process.

A B C A B C …, so that a busy moment falls on all of them; what counts are the ratios to the first entrant.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from atma.bench.models import Ours
from atma.bench.timing import interleave
from atma.compare.entrants import Entrant
from atma.model import Model
from atma.ops import backend_for
from atma.state import nbytes

Row = dict[str, Any]
TRAINED_ROWS = 4


class Pace(NamedTuple):
    """What is timed: the training length, the longest text, and how often, decoding three times as often."""

    length: int
    longest: int
    rounds: int = 7


def speeds(found: Sequence[Entrant], pace: Pace, device: str = "cpu") -> list[Row]:
    """A row for each entrant and each of "train" and "decode" at two lengths: tokens a second, and their quartiles."""
    where, rows = torch.device(device), list[Row]()
    for kind, length, make, tokens in _kinds(pace):
        calls = {one.name: make(_ours(one, where)) for one in found}
        rounds = pace.rounds if kind == "train" else 3 * pace.rounds
        for name, timing in interleave(calls, rounds, where).items():
            per_second = {"tokens_per_second": tokens / timing.median, "low": tokens / timing.high}
            row = {"kind": kind, "length": length, "entrant": name, "rounds": rounds}
            rows.append(row | per_second | {"high": tokens / timing.low})
    return rows


def state_bytes(one: Entrant, length: int) -> int:
    """What decoding keeps of one text of so many tokens."""
    with torch.device("meta"):
        return nbytes(Model(one.model, torch.Generator("cpu")).init_state(1, length))


def _kinds(pace: Pace) -> list[tuple[str, int, Callable[[Ours], Callable[[], object]], int]]:
    trained = TRAINED_ROWS * pace.length
    return [
        ("train", pace.length, lambda ours: ours.trainer(TRAINED_ROWS, pace.length), trained),
        ("decode", pace.length, lambda ours: ours.decoder(1, pace.length)[0], 1),
        ("decode", pace.longest, lambda ours: ours.decoder(1, pace.longest)[0], 1),
    ]


def _ours(one: Entrant, device: torch.device) -> Ours:
    return Ours(one.model, backend_for("auto", torch.empty(0, device=device)), torch.float32, device)
