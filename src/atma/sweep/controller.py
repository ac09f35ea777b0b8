"""Several workers on this machine: started, watched, started again when they die, and stopped with this process.

The controller keeps nothing that matters: the ledger has it all. Killed, it takes its workers with it (each notices
within seconds and gives its cell back), and a new one goes on from the folder.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from atma.strict import check_fields
from atma.sweep.ledger import Ledger
from atma.sweep.status import Follower, result_line

LOOK_SECONDS = 1.0
PATIENCE = 5
"""Times that a worker may end by itself, one after another without a result of its own, before no other is started."""


@dataclass(frozen=True)
class Crew:
    """Which workers to run: how many, with how many threads each, on what device."""

    workers: int = 1
    threads: int = 1
    device: str | None = None
    verb: str = "sweep"
    """Of the command whose `work` a worker is."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.workers < 1 or self.threads < 1:
            raise ValueError(f"--workers {self.workers}, --threads {self.threads}: at least 1 of each")

    @staticmethod
    def choose(workers: int, threads: int | None, device: str | None, verb: str = "sweep") -> "Crew":
        """As many threads as the cores allow. ValueError for more, unless each worker has but one."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        crew = Crew(workers, max(1, cores // max(1, workers)) if threads is None else threads, device, verb)
        if crew.threads > 1 and workers * crew.threads > cores:
            raise ValueError(
                f"{workers} workers × {threads} threads are more than this machine's {cores} cores; take fewer"
            )
        return crew

    def command(self, recipe: Path, folder: Path, number: int, parent: int) -> list[str]:
        """The command line of worker `number` here, to end with `parent`. With several GPUs each has one in turn."""
        crew = replace(self, device=self._device(number))
        line = [sys.executable, "-m", "atma", *crew.arguments(recipe, folder)]
        return [*line, "--parent", str(parent)]

    def arguments(self, recipe: Path, folder: Path) -> list[str]:
        """What stands after `atma` on the command line of a worker, wherever it runs."""
        line = [self.verb, "work", str(recipe), "--out", str(folder), "--threads", str(self.threads)]
        return line if self.device is None else [*line, "--device", self.device]

    def environment(self) -> dict[str, str]:
        """For a worker: its threads, and one process's share of tokenising."""
        count = str(self.threads)
        return os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}

    def _device(self, number: int) -> str | None:
        if self.device != "cuda":
            return self.device
        import torch

        return f"cuda:{number % max(1, torch.cuda.device_count())}"


class Display(Protocol):
    """Shows a sweep under way."""

    def line(self, text: str) -> None: ...
    def show(self, follower: Follower) -> None: ...


class Controller:
    """Runs a crew until every cell is finished."""

    def __init__(self, recipe: Path, ledger: Ledger, crew: Crew, display: Display) -> None:
        self.recipe, self.ledger, self.crew, self.display = recipe, ledger, crew, display
        self.follower = Follower(ledger)
        self.processes: dict[int, subprocess.Popen] = {}
        self.errors: Counter[int] = Counter()
        """By worker, how often it ended by itself since its last result."""
        self.signals: list[int] = []

    def go(self) -> None:
        """Work to the end. KeyboardInterrupt after SIGINT or SIGTERM, once the workers have given back their cells.

        ValueError with the last word of a worker when each has ended by itself again and again.
        """
        self.follower.look()
        with self._signals():
            try:
                while not self.ledger.finished() and not self.signals:
                    self._look()
                    self._start_missing()
                    time.sleep(LOOK_SECONDS)
            finally:
                self._stop()
                self._look()
        if self.signals:
            raise KeyboardInterrupt

    def _look(self) -> None:
        for result in self.follower.look():
            self._credit(result.get("provenance", {}).get("worker", {}).get("pid"))
            self.display.line(result_line(result, self.ledger.cells[result["cell"]]))
        self.display.show(self.follower)

    def _credit(self, pid: int | None) -> None:
        for number, process in self.processes.items():
            if process.pid == pid:
                self.errors[number] = 0

    def _start_missing(self) -> None:
        for number in range(self.crew.workers):
            process = self.processes.get(number)
            if self.errors[number] >= PATIENCE or (process is not None and process.poll() is None):
                continue
            if process is not None:
                self._judge(number, process.returncode)
            if self.errors[number] < PATIENCE:
                self.processes[number] = self._start(number)

    def _judge(self, number: int, status: int) -> None:
        """What the end of a worker means: a signal is no fault of its own. ValueError once none is to be started."""
        if status < 0:
            self.display.line(f"worker {number} was killed ({signal.Signals(-status).name}); starting another")
            return
        if status == 0 and self.ledger.finished():
            return
        self.errors[number] += 1
        then = "starting another" if self.errors[number] < PATIENCE else "it is not started again"
        self.display.line(f"worker {number} ended with {f'status {status}' if status else 'cells left'}; {then}")
        if all(self.errors[other] >= PATIENCE for other in range(self.crew.workers)):
            mend = "" if status else f"; has {self.recipe} changed since this run began? Start it again"
            log = self._log(number)
            raise ValueError(f"workers fail to work: {_last_line(log)}{mend} (more in {log})")

    def _start(self, number: int) -> subprocess.Popen:
        command = self.crew.command(self.recipe, self.ledger.folder, number, os.getpid())
        self._log(number).parent.mkdir(parents=True, exist_ok=True)
        with self._log(number).open("ab") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.crew.environment(),
                start_new_session=True,
            )

    def _log(self, number: int) -> Path:
        return self.ledger.folder / "logs" / f"worker-{number}.log"

    def _stop(self) -> None:
        """Ask every worker to stop and wait; a second signal kills them."""
        living = [process for process in self.processes.values() if process.poll() is None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        asked = len(self.signals)
        while any(process.poll() is None for process in living):
            if len(self.signals) > max(asked, 1):
                for process in living:
                    process.kill()
            time.sleep(0.05)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: object) -> None:
            self.signals.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else "no word in the log"
