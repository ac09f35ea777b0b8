"""SIGTERM, Ctrl-C and SIGHUP as a wish to stop: asked for after each step, so that a checkpoint is written first."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Asked:
    """Whether this process was told to stop, and by which signal."""

    number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended. One that only its fellows were told to end: of SIGTERM."""
        return 128 + (self.number or signal.SIGTERM)


@contextmanager
def noticing() -> Iterator[Asked]:
    """Inside, the first signal is noted and told on stderr, and a second one ends the process at once.

    Under torchrun further ones are passed over: it sends its own after those of the terminal, and kills in the end.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1

    def note(number: int, _frame: FrameType | None) -> None:
        if asked():
            return
        asked.number = number
        if number == signal.SIGHUP:
            _leave_terminal()
        if alone:
            _restore(dict.fromkeys(before, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler})
        told = f"atma: {signal.Signals(number).name}: writing a checkpoint after this step; a second one ends at once\n"
        os.write(2, told.encode())  # not print, which a signal may have interrupted

    # What is ignored stays so: nohup ignores SIGHUP, and a shell SIGINT for what runs in the background.
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield asked
    finally:
        _restore(before)


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave_terminal() -> None:
    """Write to nowhere from now on where the terminal is gone, so that the next line is no error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
