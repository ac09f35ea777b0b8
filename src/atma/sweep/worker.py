"""A worker: takes one cell after another from the ledger until nothing is left, and shows all the while that it lives.

A thread beats the heart of the cell at hand, so that a long step is no death. SIGTERM and Ctrl-C write a checkpoint and
give the cell back; so does the end of the process that started the worker. SIGKILL needs no help: others see it.

An error is the cell's, except where the machine or this process is to be suspected: then the worker ends, so that it
does not give up in a moment what others could do.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from atma.sweep.cell import Told, run_cell, tidy
from atma.sweep.ledger import Ledger, Piece, Plan
from atma.sweep.task import Claim, Heart, Watch
from atma.train import Stopped

IN_A_ROW = 3
"""Cells that never failed before and fail one after another in one worker: these end it."""
RunCell = Callable[[Any, Claim, str | None, Callable[[], bool], Told], dict[str, Any]]


class Worker:
    """Works on one sweep until every cell is finished, or it is told to stop."""

    def __init__(
        self,
        sweep: Plan,
        ledger: Ledger,
        device: str | None = None,
        parent: int | None = None,
        say: Callable[[str], None] = print,
        run: RunCell = run_cell,
    ) -> None:
        """parent: the process whose end stops this worker. run: what makes a cell's result."""
        self.sweep, self.ledger, self.device, self.parent, self.say, self.run = sweep, ledger, device, parent, say, run
        self.watch = Watch()
        self.why: str | None = None
        """Why to stop for good, once there is a reason."""
        self.errors = 0
        """Cells that failed here for the first time, since the last result."""

    def go(self) -> int:
        """Work; returns how many results this worker has published.

        ValueError, or an OSError of the ledger's disk, when the machine or this process is at fault and not a cell.
        """
        published = 0
        pause = min(2.0, self.ledger.limits.lease / 4)
        with self._signals():
            while self.why is None:
                taken = self._take()
                if taken is not None:
                    published += self._do(*taken)
                elif self.ledger.finished():
                    break
                else:
                    time.sleep(pause)
                    self._notice_orphaned()
        self.say(f"stopped: {self.why}" if self.why else "nothing is left to do")
        return published

    def _take(self) -> tuple[Piece, Claim] | None:
        """The first cell that can be had, those with the fewest errors first.

        After an error the order is random: the next cells of the plan often share the level that was at fault.
        """
        cells = [cell for cell in self.sweep.cells if not self.ledger.task(cell.id).finished()]
        if self.errors:
            random.Random().shuffle(cells)
        for cell in sorted(cells, key=lambda cell: len(self.ledger.task(cell.id).errors())):
            if self.why is not None:
                return None
            claim = self.ledger.task(cell.id).claim(self.watch)
            if claim is not None:
                return cell, claim
        return None

    def _do(self, cell: Piece, claim: Claim) -> bool:
        """One attempt at a cell; whether the result is ours."""
        self.say(f"{cell.id} attempt {claim.number}: {cell.label}")
        heart = Heart(claim, self._notice_orphaned)
        try:
            with heart:
                result = self.run(cell, claim, self.device, lambda: self.why is not None or heart.lost, heart.tell)
                ours = claim.task.publish(result)
        except Stopped as stopped:
            why = "another worker took over" if heart.lost else f"{self.why}; {stopped}"
            claim.release(why)
            self.say(f"{cell.id} given back: {why}")
            return False
        except Exception as error:
            self.say(f"{cell.id} failed: {type(error).__name__}: {error}")
            self._judge(cell, claim, error)
            return False
        self.errors = 0
        claim.done()
        tidy(claim.task, self.sweep.config.keep_models)
        self.say(f"{cell.id} {'done' if ours else 'was done by another already'} in {result['seconds']:.0f} s")
        return ours

    def _judge(self, cell: Piece, claim: Claim, error: Exception) -> None:
        """Count an error for the cell, or as this worker's death. ValueError where the worker has to end."""
        if of_the_machine(error):
            with contextlib.suppress(OSError):
                claim.die(error)
            raise ValueError(f"this worker ends, for the machine may be at fault and not {cell.id}: {error}") from error
        self.errors += not claim.task.errors()
        claim.fail(error)
        if self.errors >= IN_A_ROW:
            raise ValueError(f"this worker ends, for {self.errors} cells failed one after another: {error}") from error

    def _notice_orphaned(self) -> None:
        if self.parent is not None and os.getppid() != self.parent:
            self.why = self.why or "the process that started this worker has ended"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While working, SIGTERM and SIGINT stop at the next step; a second one stops at once."""

        def stop(number: int, _frame: object) -> None:
            if self.why is not None:
                raise KeyboardInterrupt
            self.why = signal.Signals(number).name

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def of_the_machine(error: Exception) -> bool:
    """Whether an error tells of a disk or a GPU, after which nothing that this process does is to be trusted."""
    words = ("CUDA error", "Error [CUDA]", "cuDNN error")
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))
