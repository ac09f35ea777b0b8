"""Trackers that follow a run: TensorBoard, Weights & Biases, MLflow and trackio, behind one interface.

Each has a thread of its own and a queue, so that a slow one does not slow the run; and whatever goes wrong with one (it
is not installed, there is no network, the disk is full) is told in one line, and the run goes on without it. A run that
goes on later goes on in the same run of the tracker: `trackers.json` in the run folder says which that is, and up to
which step it was told, so that it is told first what it lacks.
"""

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from atma.config import Recipe
from atma.strict import to_dict
from atma.train.progress import Progress
from atma.train.record import NAME, read_record

KNOWN = "trackers.json"
ROOM = 20_000
"""Rows that wait for a tracker at the most: it is given up when there are more."""
CLOSING_SECONDS = 30.0
"""That all trackers together have at the end of a run."""
IDLE_SECONDS = 1.0
"""Without a row after which a tracker writes out what it has."""
NOTED_SECONDS = 10.0
"""Between two notes of how far a tracker was told."""
WHOLE = sys.maxsize
"""A step beyond every record."""


class Tracker(Protocol):
    """What a tracker does; any method may raise anything."""

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def text(self, name: str, text: str, step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self, finished: bool) -> None: ...


class Start(NamedTuple):
    """The run that a tracker is to follow."""

    folder: Path
    name: str
    settings: dict[str, Any]
    """Those of the recipe, as "train.tokens"."""
    done: int
    """Steps that it was told of before: what was tracked of later ones is told again."""
    known: str | None
    """What the tracker called the run when it followed it before."""


Opener = Callable[[Start], tuple[Tracker, str]]
"""Begins to follow a run, or goes on; and what the tracker calls it."""


def openers() -> dict[str, Opener]:
    """Every tracker by the name that `--track` takes."""
    from atma.train import tracker_backends as backends

    return {
        "tensorboard": backends.open_tensorboard,
        "wandb": backends.open_wandb,
        "mlflow": backends.open_mlflow,
        "trackio": backends.open_trackio,
    }


def followed(progress: Progress, names: Sequence[str], recipe: Recipe, folder: Path) -> "Followed":
    """The progress, its rows told to the named trackers too. ValueError: there is no tracker of a name."""
    known = openers()
    for name in names:
        if name not in known:
            raise ValueError(f"--track {name}: no such tracker; known: {', '.join(known)}")
    chosen = {name: known[name] for name in dict.fromkeys(names)}
    return Followed(progress, chosen, folder, _flat(to_dict(recipe)))


class Followed:
    """Shows what `progress` shows, and tells trackers the same rows.

    To be used with the `with` statement around the run: a run that raises nothing in it is finished, and where it had
    nothing left to do its trackers are told what they lack of its record.
    """

    def __init__(
        self, progress: Progress, chosen: Mapping[str, Opener], folder: Path, settings: dict[str, Any]
    ) -> None:
        self._progress, self._chosen, self._folder, self._settings = progress, chosen, folder, settings
        self._followers: list[Follower] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        finished = kind is None
        if finished and not self._followers:
            self._follow("run", WHOLE)
        until = time.monotonic() + CLOSING_SECONDS
        for follower in self._followers:
            follower.end(finished)
        for follower in self._followers:
            follower.wait(until)
        self._followers = []

    def start(self, name: str, steps: int, done: int) -> None:
        self._progress.start(name, steps, done)
        self._follow(name, done)

    def show(self, row: dict[str, Any]) -> None:
        self._progress.show(row)
        for follower in self._followers:
            follower.tell(row)

    def stop(self) -> None:
        self._progress.stop()

    def _follow(self, name: str, done: int) -> None:
        known, lock = _known(self._folder), threading.Lock()
        called = self._folder.resolve().name or name
        for one, opener in self._chosen.items():
            before, told = known.get(one, (None, 0))
            start = Start(self._folder, called, self._settings, min(told, done), before)
            self._followers.append(Follower(one, opener, start, done, lock))


class Follower:
    """One tracker on its thread. `done`: steps that the run made before, which stand in its record."""

    def __init__(self, name: str, opener: Opener, start: Start, done: int, lock: threading.Lock) -> None:
        self.name, self._opener, self._start, self._done, self._lock = name, opener, start, done, lock
        self._called, self._told, self._noted, self._noted_at = "", start.done, -1, 0.0
        self._rows: queue.Queue[dict[str, Any] | bool] = queue.Queue(ROOM)
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"atma-track-{name}", daemon=True)
        self._thread.start()

    def tell(self, row: dict[str, Any]) -> None:
        """Take a row to be tracked; returns at once, whatever the tracker does."""
        if self._given_up.is_set():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._give_up(f"is too slow: {ROOM:,} rows wait for it")

    def end(self, finished: bool) -> None:
        """No more rows come; `finished` says whether the run has come to its end."""
        if self._given_up.is_set():
            return
        try:
            self._rows.put_nowait(finished)
        except queue.Full:
            self._give_up(f"is too slow: {ROOM:,} rows wait for it")

    def wait(self, until: float) -> None:
        """Until the tracker has closed, or the clock says `until`."""
        if self._given_up.is_set():
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"did not end within {CLOSING_SECONDS:.0f} s; what it has not sent yet is lost")

    def _follow(self) -> None:
        try:
            tracker, self._called = self._opener(self._start)
            self._note(self._told)
            self._catch_up(tracker)
            while not self._given_up.is_set():
                try:
                    row = self._rows.get(timeout=IDLE_SECONDS)
                except queue.Empty:
                    self._write_out(tracker)
                    continue
                if isinstance(row, bool):
                    tracker.close(row)
                    self._note(self._told)
                    return
                self._track(tracker, row)
                if time.monotonic() - self._noted_at > NOTED_SECONDS:
                    self._write_out(tracker)
        except (Exception, SystemExit) as error:  # of others' code, whatever it is
            self._give_up(" ".join(str(error).split())[:300] or type(error).__name__)

    def _catch_up(self, tracker: Tracker) -> None:
        """What the run did while this tracker did not follow it."""
        start = self._start
        if start.done < self._done and (start.folder / NAME).is_file():
            for row in read_record(start.folder):
                if start.done < row["step"] <= self._done:
                    self._track(tracker, row)

    def _track(self, tracker: Tracker, row: Mapping[str, Any]) -> None:
        track(tracker, row)
        self._told = max(self._told, row["step"])

    def _write_out(self, tracker: Tracker) -> None:
        tracker.flush()
        self._note(max(self._start.done, self._told - 1))  # more may come of the last step, a validation

    def _note(self, step: int) -> None:
        self._noted_at = time.monotonic()
        if step != self._noted:
            _remember(self._start.folder, self.name, self._called, step, self._lock)
            self._noted = step

    def _give_up(self, reason: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            print(f"atma: {self.name}: {reason}; the run goes on without it", file=sys.stderr, flush=True)


def track(tracker: Tracker, row: Mapping[str, Any]) -> None:
    """Tell a tracker a row of the record: the numbers of a step, or a text that the model wrote."""
    if row["kind"] != "event":
        numbers = {key: value for key, value in row.items() if key not in ("kind", "step")}
        values = {f"{row['kind']}/{key}": value for key, value in numbers.items() if isinstance(value, int | float)}
        tracker.scalars(values, row["step"])
    elif "text" in row:
        tracker.text(f"sample/{row['prompt'] or 'beginning'}", f"{row['prompt']}{row['text']}", row["step"])


def _known(folder: Path) -> dict[str, tuple[str, int]]:
    """What trackers call the run in a folder and the last step they were told; what says nothing of it counts as none.

    The file is {"tensorboard": {"run": "tensorboard", "step": 2000}}.
    """
    try:
        found = json.loads((folder / KNOWN).read_text(encoding="utf-8"))
        return {name: (str(one["run"]), int(one["step"])) for name, one in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def _remember(folder: Path, name: str, called: str, step: int, lock: threading.Lock) -> None:
    with lock:
        known = _known(folder) | {name: (called, step)}
        told = {one: {"run": run, "step": last} for one, (run, last) in known.items()}
        new = folder / f".{KNOWN}.new"
        new.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        new.replace(folder / KNOWN)


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings by their whole names, those that trackers can show as they are, others as text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{where}{key}.")
        elif value is not None:
            found[f"{where}{key}"] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
