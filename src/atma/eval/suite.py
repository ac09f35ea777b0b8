"""Suites: what they are made of, how they are run and resumed, and how many trials a time allows.

A suite is a frozen configuration whose `measurements(model, trials)` are pieces small enough to lose: each is kept in
the results file as soon as it is made, under a key of what was measured and with what, and is never made twice.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from atma.eval.language_model import LanguageModel
from atma.eval.results import add_rows, measurement_key, read_rows
from atma.eval.stream import Advance
from atma.selection import counting
from atma.tokenizer import Tokenizer

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""Called with what is being measured, tokens run and tokens in all."""


class Measurement(NamedTuple):
    """One resumable piece: its name, what decides its result besides the model, its cost, and how to make its rows."""

    name: str
    spec: Row
    """Plain JSON data. With the provenance it is the identity of the rows."""
    tokens: int
    """That the model reads and writes; what `run` tells of its advance sums to it."""
    run: Callable[[Advance], list[Row]]


class Untrained(NamedTuple):
    """All that `measurements` asks of a model: enough to tell, before there is one, what can never be measured."""

    tokenizer: Tokenizer
    name: str = "the model"
    longest: int | None = None


class Suite(Protocol):
    """A frozen configuration of one suite."""

    @property
    def name(self) -> str: ...

    @property
    def seed(self) -> int: ...

    def trials(self) -> dict[int, int]:
        """Wanted trials of each cell by context length; empty where a suite has no trials to choose."""
        ...

    def cells(self) -> int:
        """Cells of one length, each of which has that many trials."""
        ...

    def measurements(self, model: LanguageModel, trials: Mapping[int, int]) -> list[Measurement]:
        """What is to be measured. ValueError, before anything is, for what cannot be."""
        ...


def run(
    suite: Suite,
    model: LanguageModel,
    results: Path | str | None = None,
    progress: Progress | None = None,
    trials: dict[int, int] | None = None,
) -> list[Row]:
    """The rows of a suite, in its order, each with `suite`, `measurement`, `provenance` and `key`.

    With `results`, a .jsonl file, rows are kept as they come, those of equal key are taken from it, and rows of others
    stay in it. `trials` by length (`within` a budget) are in place of the suite's own.
    """
    trials = suite.trials() if trials is None else trials
    stamp = model.provenance() | {"seed": suite.seed}
    measurements = [_told_truncation(model, told_selection(model, one)) for one in suite.measurements(model, trials)]
    return run_measurements(suite.name, measurements, stamp, results, progress)


def run_measurements(
    suite: str,
    measurements: Sequence[Measurement],
    provenance: Row,
    results: Path | str | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Make the measurements that the results file does not hold yet; all rows, in order."""
    kept = read_rows(results) if results is not None else []
    if results is not None:
        add_rows(results, [])  # a file that cannot be written is told before anything is measured
    rows: list[Row] = []
    for measurement in measurements:
        key = measurement_key({"suite": suite} | measurement.spec, provenance)
        found = [row for row in kept if row.get("key") == key]
        if not found:
            about = {"suite": suite, "measurement": measurement.spec, "provenance": provenance, "key": key}
            found = [row | about for row in measurement.run(_counter(progress, measurement))]
            kept += found
            if results is not None:
                add_rows(results, found)
        elif progress is not None:
            progress(measurement.name, measurement.tokens, measurement.tokens)
        rows += found
    return rows


def within(suite: Suite, model: LanguageModel, budget: float) -> dict[int, int]:
    """The suite's trials by length that take about `budget` seconds (`allot`), from a measurement of the speed."""
    wanted = suite.trials()
    return allot(budget, seconds_per_sequence(model, list(wanted), suite.cells()), wanted) if wanted else {}


def allot(budget: float, seconds: Mapping[int, float], wanted: Mapping[int, int]) -> dict[int, int]:
    """Trials by length within `budget` seconds, where one trial at a length takes so many `seconds`.

    What is left is shared equally among the lengths that are left, shortest first, so that the short ones, which want
    less than their share, leave more to the long ones. A length that not one trial fits is left out. ValueError when
    that is every length.
    """
    left, trials = budget, {}
    lengths = sorted(wanted)
    for i, length in enumerate(lengths):
        count = min(wanted[length], int(left / (len(lengths) - i) / seconds[length]))
        if count > 0:
            trials[length] = count
            left -= count * seconds[length]
    if not trials:
        first = lengths[0]
        raise ValueError(
            f"a budget of {budget:.3g} s is too short: a trial at length {first} is {seconds[first]:.3g} s"
        )
    return trials


def seconds_per_sequence(model: LanguageModel, lengths: Sequence[int], cells: int) -> dict[int, float]:
    """About how long one trial of every cell takes at each length: a·L + b·L², fitted to two lengths that are timed."""
    longest = min(max(lengths), 8192)
    short = max(2, longest // 4)
    times = {length: _timed(model, length) for length in (short, longest)}
    linear, square = np.linalg.solve([[n, n * n] for n in times], list(times.values()))
    if square < 0 or linear < 0:  # noise, or a cost per call: the longest alone is the safer guide
        linear, square = times[longest] / longest, 0.0
    return {length: cells * (linear * length + square * length * length) for length in lengths}


def duration(text: str) -> float:
    """Seconds of "90s", "10m", "1.5h" or a plain number. ValueError for anything else."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"a budget is a time such as 90s, 10m or 1.5h, not '{text}'")
    return seconds


def sha256(data: object) -> str:
    """SHA-256, in hexadecimal, of an array's bytes, of bytes or a text, or of the canonical JSON of anything else."""
    if isinstance(data, np.ndarray):
        data = f"{data.dtype.str} {data.shape} ".encode() + np.ascontiguousarray(data).tobytes()
    elif isinstance(data, str):
        data = data.encode()
    elif not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(data).hexdigest()


def told_selection(model: LanguageModel, measurement: Measurement) -> Measurement:
    """The same, its rows telling what share of the keys a selection policy has read, and with what certainty."""
    own = getattr(getattr(model, "loaded", None), "model", None)
    if own is None or own.selection is None:
        return measurement

    def run(advance: Advance) -> list[Row]:
        with counting(own) as counts:
            rows = measurement.run(advance)
        return [row | counts.row() for row in rows]

    return measurement._replace(run=run)


def _told_truncation(model: LanguageModel, measurement: Measurement) -> Measurement:
    """The same, its rows telling how many tokens were dropped for them."""

    def run(advance: Advance) -> list[Row]:
        before = model.truncated
        rows = measurement.run(advance)
        return [row | {"truncated_tokens": model.truncated - before} for row in rows]

    return measurement._replace(run=run)


def _timed(model: LanguageModel, length: int) -> float:
    """Seconds to read one sequence, the better of two, so that what happens once is not counted."""
    tokens = torch.randint(0, model.tokenizer.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        model.score(tokens, 1)
        times.append(time.perf_counter() - start)
    return min(times)


def _counter(progress: Progress | None, measurement: Measurement) -> Advance:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(measurement.name, done, measurement.tokens)

    return advance
