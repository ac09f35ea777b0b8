"""Wall time of several calls measured in turn, A B C A B C …, so that a busy moment falls on all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

LEAST_SECONDS = 2e-3
"""A sample repeats its call until it lasts about this long."""
MOST_CALLS = 1000


class Timing(NamedTuple):
    """Seconds of one call: median and quartiles over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Time every call once in each of `rounds` rounds, after two warm-ups of each."""
    counts = {}
    for name, call in calls.items():
        seconds_of(call, 1, device)
        counts[name] = min(MOST_CALLS, max(1, math.ceil(LEAST_SECONDS / max(1e-9, seconds_of(call, 1, device)))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds_of(call, counts[name], device))
    return {name: summary(found) for name, found in samples.items()}


def seconds_of(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Mean wall seconds of `count` calls in a row; a GPU has finished before and after."""
    _finish(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    _finish(device)
    return (time.perf_counter() - began) / count


def summary(samples: list[float]) -> Timing:
    """Median and quartiles; of one sample, three times itself."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(median, low, high, len(samples))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
