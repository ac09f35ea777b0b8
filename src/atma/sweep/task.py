"""One piece of work that many processes on many machines share through a folder, so that it is done once.

`claims/000001.json`, `000002.json`, … are its attempts. Each is made by exclusive creation, so exactly one process has
each number; the highest is the present one, and nobody removes any. A number may follow another only when that one has
ended (`000001.end.json`: given back, or ended by an error) or its worker is seen to be dead. So a lease is taken over
by exactly one process, and a worker that was merely slow learns from the higher number that it has lost.

Dead means: its heartbeat, `000001.beat.json`, has not changed for a lease's length of the *observer's* monotonic clock,
or it was a process of this machine and boot that is gone. No two clocks are ever compared.
"""

import contextlib
import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from atma.sweep import files

RESULT, FAILED, CLAIMS = "result.json", "failed.json", "claims"
LONGEST_PAUSE = 10.0
"""Seconds between two heartbeats at most."""
_CLAIM = re.compile(r"(\d{6})\.json")
_FAILED = re.compile(r"failed-(\d{6})\.json")


@dataclass(frozen=True)
class Attempt:
    """One claim of a task: by whom, and how it ended ({} while it has not, or where its worker died)."""

    number: int
    worker: dict[str, Any]
    end: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """When a task is given up, and after how many seconds without a heartbeat its worker counts as dead."""

    attempts: int = 3
    deaths: int = 10
    lease: float = 60.0


@dataclass
class Watch:
    """The heartbeats that one observer has seen, each with when it last changed by the observer's own clock."""

    seen: dict[Path, tuple[Any, float]] = field(default_factory=dict)

    def silent(self, beat: Path) -> float:
        """Seconds for which a heartbeat is known not to have changed; 0 when it is first seen."""
        now, value = time.monotonic(), files.content(beat)
        before = self.seen.get(beat)
        if before is None or before[0] != value:
            self.seen[beat] = (value, now)
            return 0.0
        return now - before[1]


class Task:
    """A folder with claims, at most one result and at most one failure."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder, self.limits = folder, limits or Limits()

    def result(self) -> dict[str, Any] | None:
        return files.read(self.folder / RESULT)

    def failure(self) -> dict[str, Any] | None:
        """Why the task was given up; None where a worker that was taken for dead has done it all the same."""
        return None if (self.folder / RESULT).exists() else files.read(self.folder / FAILED)

    def finished(self) -> bool:
        """Whether there is nothing left to do: a result, or a failure for good."""
        return (self.folder / RESULT).exists() or (self.folder / FAILED).exists()

    def attempts(self) -> list[Attempt]:
        """Every claim so far, in order."""
        return [
            Attempt(n, files.read(self._path(n)) or {}, files.read(self._path(n, ".end")) or {})
            for n in self._numbers()
        ]

    def errors(self) -> list[dict[str, Any]]:
        """How the attempts ended that an error ended, the last last, since the task was last tried again."""
        return [attempt.end for attempt in self._counted(self.attempts()) if "error" in attempt.end]

    def claim(self, watch: Watch) -> "Claim | None":
        """The task for this process to do, or None: finished, another's, or taken by another in this moment.

        A disk may show that an attempt is done before it shows the result: until a lease is over it is believed.
        """
        if self.finished():
            return None
        past = self.attempts()
        if past and past[-1].end.get("how") in (None, "done") and not self._dead(past[-1], watch):
            return None
        error = self._given_up(past)
        if error is not None:
            files.create_once(self.folder / FAILED, error)
            return None
        number = past[-1].number + 1 if past else 1
        if not files.create_once(self._path(number), worker()):
            return None
        claim = Claim(self, number)
        claim.beat()
        return None if self.finished() else claim

    def publish(self, values: dict[str, Any]) -> bool:
        """Make `values` the result unless there is one: the first whole one stays."""
        return files.create_once(self.folder / RESULT, values)

    def retry(self) -> bool:
        """Let a failed task be tried again, its attempts counted anew. False where it has not failed."""
        if self.failure() is None:
            return False
        last = max(self._numbers(), default=0)
        try:
            (self.folder / FAILED).rename(self.folder / f"failed-{last:06}.json")
        except FileNotFoundError:
            return False
        return True

    def beat_path(self, number: int) -> Path:
        return self._path(number, ".beat")

    def _dead(self, attempt: Attempt, watch: Watch) -> bool:
        return process_is_gone(attempt.worker) or watch.silent(self.beat_path(attempt.number)) > self.limits.lease

    def _given_up(self, past: list[Attempt]) -> dict[str, Any] | None:
        """Why the task is not to be tried again, if so."""
        counted = self._counted(past)
        errors = [attempt.end for attempt in counted if attempt.end.get("how") == "failed"]
        deaths = [attempt.end for attempt in counted if attempt.end.get("how") in (None, "died")]
        if len(errors) >= self.limits.attempts:
            return errors[-1] | {"attempts": len(counted)}
        if len(deaths) >= self.limits.deaths:
            why = deaths[-1].get("error", "killed, out of memory or a lost machine")
            error = f"its worker died {len(deaths)} times ({why})"
            return {"error": error, "attempts": len(counted), "when": files.utc()}
        return None

    def _counted(self, past: list[Attempt]) -> list[Attempt]:
        """The attempts since the task was last tried again."""
        failed = (_FAILED.fullmatch(path.name) for path in self.folder.glob("failed-*.json"))
        forgiven = max((int(match[1]) for match in failed if match), default=0)
        return [attempt for attempt in past if attempt.number > forgiven]

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.folder / CLAIMS)
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for name in names if (match := _CLAIM.fullmatch(name)))

    def _path(self, number: int, kind: str = "") -> Path:
        return self.folder / CLAIMS / f"{number:06}{kind}.json"


class Claim:
    """A task that is this process's to do until it says otherwise, or is taken for dead."""

    def __init__(self, task: Task, number: int) -> None:
        self.task, self.number, self._beats = task, number, 0

    def beat(self, doing: dict[str, Any] | None = None) -> None:
        """Show that this process lives, and what it is doing."""
        self._beats += 1
        files.replace(self.task.beat_path(self.number), {"beat": self._beats} | (doing or {}))

    def lost(self) -> bool:
        """Whether another process has taken over."""
        return self.task._path(self.number + 1).exists()

    def release(self, why: str) -> None:
        """Give the task back, unfinished; it does not count as an attempt."""
        self._end({"how": "released", "why": why})

    def done(self) -> None:
        """Say that this attempt has published a result."""
        self._end({"how": "done"})

    def fail(self, error: BaseException) -> None:
        """Give the task back after an error, which counts."""
        self._end({"how": "failed"} | _told(error))

    def die(self, error: BaseException) -> None:
        """Give the task back as this process ends by an error that is not the task's: it counts as a death."""
        self._end({"how": "died"} | _told(error))

    def _end(self, values: dict[str, Any]) -> None:
        files.create_once(self.task._path(self.number, ".end"), values | {"when": files.utc()})


class Heart:
    """Beats for a claim in a thread of its own, six times a lease at least, and learns whether the claim is lost."""

    def __init__(self, claim: Claim, also: Callable[[], None] = lambda: None) -> None:
        """also: what else to do at each beat."""
        self._claim, self._also = claim, also
        self._pause = min(claim.task.limits.lease / 6, LONGEST_PAUSE)
        self._doing: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go, name="heartbeat", daemon=True)
        self.lost = False

    def tell(self, stage: str, done: int, of: int) -> None:
        """What to show with the next beat."""
        self._doing = {"stage": stage, "done": done, "of": of}

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _go(self) -> None:
        while not self._ended.wait(self._pause):
            # A disk that refuses one beat may take the next; if it never does, the lease ends and others take over.
            with contextlib.suppress(OSError):
                self._claim.beat(self._doing)
                self.lost = self._claim.lost()
            self._also()


def _told(error: BaseException) -> dict[str, Any]:
    lines = traceback.format_exception(error)
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(lines)}


def worker() -> dict[str, Any]:
    """Who this process is: enough for another of this machine to see that it has gone."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "when": files.utc(),
    }


def process_is_gone(who: dict[str, Any]) -> bool:
    """Whether `who` was a process of this machine, since its last start, that lives no more. False when not known."""
    machine, pid, began = who.get("machine"), who.get("pid"), who.get("began")
    if machine is None or began is None or not isinstance(pid, int) or machine != _machine():
        return False
    return _began(pid) != began


@cache
def _machine() -> str | None:
    """This start of this machine, and its table of processes; None where the system does not tell."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _began(pid: int) -> str | None:
    """When a process began, in ticks, so that its number used again is not taken for it; None when it is gone."""
    with contextlib.suppress(OSError, IndexError):
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else after_name[19]
    return None
