"""Cases to time and the rows that come of them, as plain data."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from atma.bench.machine import Cost, Rates
from atma.bench.timing import interleave


@dataclass(frozen=True)
class Entry:
    """One thing to time. `tiny` is the same with next to no arithmetic: what is left is the price of its calls."""

    name: str
    ours: bool
    call: Callable[[], object]
    cost: Cost
    tokens: int = 0
    parameters: int = 0
    tiny: Callable[[], object] | None = None


@dataclass(frozen=True)
class Case:
    """Entries to be compared with each other: ours and peers on the same sizes."""

    what: str
    sizes: dict[str, int]
    dtype: str
    entries: list[Entry]


class Job(NamedTuple):
    """A case to be built when its turn comes, and what must hold before: `check` raises ValueError."""

    check: Callable[[], None]
    build: Callable[[], Case]


@dataclass(frozen=True)
class Row:
    """One timed thing: seconds of a call with quartiles, the floor and the ratios; `to_peer` below 1 is faster."""

    what: str
    sizes: dict[str, int]
    dtype: str
    name: str
    ours: bool
    seconds: float
    low: float
    high: float
    rounds: int
    operations: float
    bytes: float
    floor: float
    bound: str
    to_floor: float
    best_peer: str | None
    to_peer: float | None
    about: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A whole measurement; `notes` names what is absent and how to read the figures."""

    kind: str
    command: str
    machine: dict[str, Any]
    rates: Rates
    notes: list[str]
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """As it is written to bench.json."""
        return dataclasses.asdict(self) | {"rates": self.rates._asdict()}


def measure(case: Case, rounds: int, device: torch.device, rates: Rates) -> list[Row]:
    """Time the entries of a case in turn."""
    calls = {entry.name: entry.call for entry in case.entries}
    calls |= {f"{entry.name}, tiny": entry.tiny for entry in case.entries if entry.tiny is not None}
    timings = interleave(calls, rounds, device)
    peers = {entry.name: timings[entry.name].median for entry in case.entries if not entry.ours}
    rows = []
    for entry in case.entries:
        timing = timings[entry.name]
        floor, bound = rates.floor(entry.cost, case.dtype)
        others = {name: seconds for name, seconds in peers.items() if name != entry.name}
        best = min(others, key=lambda name: others[name], default=None)
        about = _about(entry, timing.median, rates.operations[case.dtype])
        if entry.tiny is not None:
            about["overhead"] = timings[f"{entry.name}, tiny"].median / timing.median
        ratio = timing.median / others[best] if best is not None else None
        measured = (timing.median, timing.low, timing.high, timing.rounds, entry.cost.operations, entry.cost.bytes)
        compared = (floor, bound, timing.median / floor, best, ratio, about)
        rows.append(Row(case.what, case.sizes, case.dtype, entry.name, entry.ours, *measured, *compared))
    return rows


def _about(entry: Entry, seconds: float, rate: float) -> dict[str, float]:
    about: dict[str, float] = {}
    if entry.tokens:
        about["tokens_per_second"] = entry.tokens / seconds
    if entry.parameters:
        about["parameters"] = entry.parameters
        about["product_share"] = entry.cost.operations / seconds / rate
    return about
