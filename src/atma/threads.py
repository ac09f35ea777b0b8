"""How many threads to compute with, chosen by measuring, and how they wait for one another.

Every parallel region ends when its slowest thread does. On a busy machine that thread waits for a core, and the others
spin meanwhile: with the patience they usually have, milliseconds, they hold the very core that it waits for, and two
threads fall to a fifth of one. So threads spin briefly (`wait_briefly`), and how many there are is
measured where they will work (`settle`). A number that a user gives, or OMP_NUM_THREADS, is taken as it is.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

SPINS = 3000
"""Some ten microseconds: nearly all of what spinning gains on a quiet machine, and none of what it costs on a busy one
(docs/LOG.md)."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUMBER = "OMP_NUM_THREADS"
GAIN = 0.9
"""More threads must take at most this share of the time of fewer, or they are not worth their cores."""
SECONDS, ROUNDS = 0.4, 5
"""How long numbers of threads are compared, and the rounds that they get whatever these take."""
_REPEATS = 4


class Choice(NamedTuple):
    """A number of threads and, in words, why."""

    count: int
    reason: str

    def __str__(self) -> str:
        return f"threads: {self.count} ({self.reason})"


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let threads that wait spin for microseconds and then sleep, here and in processes begun from here.

    libgomp reads this once, when PyTorch loads it: False where it is loaded already, or the user has said how to wait.
    """
    if "torch" in sys.modules or any(name in environment for name in _WAITING):
        return False
    environment["GOMP_SPINCOUNT"] = str(SPINS)
    return True


def settle(asked: int = 0, kept: int = 0) -> Choice:
    """Set PyTorch's threads, which are those of the compiled kernels too, and tell which and why.

    asked: what the user said, 0 for nothing; then OMP_NUM_THREADS counts, then `kept` (what a run began with, on which
    its bits depend), and else what measures fastest here and now, which takes half a second. ValueError: below 0.
    """
    import torch

    if asked < 0:
        raise ValueError(f"--threads {asked}: at least 1, or leave it out to let them be measured")
    choice = _told(asked, kept, torch.get_num_threads()) or measure(cores())
    torch.set_num_threads(choice.count)
    return choice


def take(asked: int) -> None:
    """Compute with so many threads; 0 leaves the number to OMP_NUM_THREADS or PyTorch. ValueError: below 0."""
    import torch

    if asked < 0:
        raise ValueError(f"--threads {asked}: at least 1, or leave it out")
    if asked:
        torch.set_num_threads(asked)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(most: int) -> Choice:
    """The fastest of 1, 2, 4, … and `most` threads for work that is many short parallel regions, as a model's is."""
    import torch

    if most == 1:
        return Choice(1, "one core")
    work, before = _regions(), torch.get_num_threads()

    def sample(count: int) -> float:
        torch.set_num_threads(count)
        work()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    try:
        return choose(sample, candidates(most), time.monotonic)
    finally:
        torch.set_num_threads(before)


def candidates(most: int) -> list[int]:
    """1, 2, 4, … below `most`, and `most`."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def choose(sample: Callable[[int], float], counts: list[int], now: Callable[[], float]) -> Choice:
    """The count of the least median seconds, `sample` taken at each count in turn; fewer threads where it is close.

    Asks for at least `ROUNDS` rounds and then until `SECONDS` are gone by the clock `now`.
    """
    began, samples = now(), {count: [sample(count)] for count in counts}
    while len(samples[counts[0]]) < ROUNDS or now() - began < SECONDS:
        for count in counts:
            samples[count].append(sample(count))
    medians = {count: statistics.median(found) for count, found in samples.items()}
    best = counts[0]
    for count in counts[1:]:
        if medians[count] <= GAIN * medians[best]:
            best = count
    times = ", ".join(f"{count}: {1e3 * seconds:.1f} ms" for count, seconds in medians.items())
    return Choice(best, f"measured: a round of work takes at {times}; --threads or {NUMBER} decides otherwise")


def _told(asked: int, kept: int, now: int) -> Choice | None:
    """What is not to be measured."""
    if asked:
        return Choice(asked, "asked for")
    if os.environ.get(NUMBER):
        return Choice(now, NUMBER)
    return Choice(kept, "as the run began, whose bits depend on it") if kept else None


def _regions() -> Callable[[], None]:
    """Milliseconds of products by PyTorch and gates by the compiled kernels, in turn, of the nano model's sizes."""
    import torch

    from atma.ops.dense import gated

    x, weight = torch.ones(512, 128), torch.full((1024, 128), 0.01)

    @torch.inference_mode()
    def work() -> None:
        for _ in range(_REPEATS):
            gated(x @ weight.T)

    return work
