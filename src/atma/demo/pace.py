"""Time: what a demonstration may take, what is left of it, and what was cut to end with it.

Everything asks a `Pace` and no clock, so that what is planned can be tested with a clock of the test's own.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


class Enough(Exception):
    """A stage has used its time, or the user has asked for the end."""


@dataclass
class Pace:
    """`seconds` from now by the clock `now`; what is `stopped` has none left."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    stopped: bool = False
    cuts: list[str] = field(default_factory=list)
    """What was left out or made smaller to end in time, a sentence each."""
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def gone(self) -> float:
        return self.now() - self.began

    @property
    def left(self) -> float:
        return 0.0 if self.stopped else max(0.0, self.seconds - self.gone)

    def stage(self, share: float) -> "Stage":
        """A stage that may take this share of what is left when it begins."""
        return Stage(self, self.now() + share * self.left)


@dataclass
class Stage:
    """A part of the time, until `end`."""

    pace: Pace
    end: float

    @property
    def left(self) -> float:
        return 0.0 if self.pace.stopped else max(0.0, self.end - self.pace.now())

    def longer(self, share: float) -> "Stage":
        """The same, or until this share of all that is left, if that is later."""
        return Stage(self.pace, max(self.end, self.pace.now() + share * self.pace.left))

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long would end within the stage."""
        return not self.pace.stopped and seconds <= self.left

    def tick(self, _done: object = None) -> None:
        """For what goes on in small pieces: raises Enough when the time is up."""
        if self.left <= 0:
            raise Enough


def steps_in(seconds: float, recent: Sequence[float], most: int) -> int:
    """How many more steps fit into the seconds at the mean of the recent ones, at most `most`."""
    mean = sum(recent) / len(recent)
    return most if mean * most <= seconds else int(seconds / mean)


def lengths_in(seconds: float, cost: dict[int, float], texts: int) -> list[int]:
    """The lengths, shortest first, at which so many texts can be read in the seconds; always the first two."""
    lengths = sorted(cost)
    while len(lengths) > 2 and texts * (sum(cost[length] for length in lengths) + cost[lengths[-1]]) > seconds:
        lengths.pop()
    return lengths


@contextlib.contextmanager
def ending_on_interrupt(pace: Pace, say: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C ends the pace, so that what there is gets shown; the second interrupts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        if pace.stopped:
            raise KeyboardInterrupt
        pace.stopped = True
        pace.cuts.append("Ctrl-C ended the demonstration early: what there was by then is shown.")
        say("Ctrl-C: ending with what there is (once more to end at once)")

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
