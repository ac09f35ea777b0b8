"""A run folder as it stands, read without loading the model and without trust in what is there.

A folder may be half-written, of an older version or of something else: what cannot be read is left out, and a folder
whose recipe or record cannot be read at all is "broken", with the reason.
"""

import contextlib
import fcntl
import json
import math
import os
import struct
import tomllib
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

RECIPE, METRICS, LOCK = "recipe.toml", "metrics.jsonl", ".lock"
"""Files of a run folder."""
State = Literal["running", "finished", "stopped", "begun", "broken"]
DEPTH = 3
"""Folders below a named one in which runs are looked for."""
MOST_FOLDERS = 20_000
"""Folders that are looked into at the most."""
MOST_HEAD = 100 << 20
"""Bytes of the head of a weights file that are read at the most."""
MOST_COUNT, MOST_LOSS = 2**63, 1e30
"""Steps, tokens and parameters, and a loss, from which on a file is damaged."""
LEAST_SPEED, MOST_SPEED = 1e-6, 1e15
"""Tokens a second beyond which they are left out."""


class Point(NamedTuple):
    """A row of a record: steps, tokens, seconds of training until then, and the loss."""

    step: int
    tokens: int
    seconds: float
    loss: float


class Run(NamedTuple):
    """What a run folder shows."""

    folder: Path
    name: str
    state: State
    why: str
    """The reason of a broken one."""
    recipe: dict[str, Any]
    """Its tables, as they stand in the file."""
    train: list[Point]
    valid: list[Point]
    skipped: int
    """Lines of the record that are none."""
    parameters: int | None
    """Of the final model or the newest checkpoint."""
    started: float
    """Seconds since 1970."""

    @property
    def steps(self) -> int:
        return self.train[-1].step if self.train else 0

    @property
    def of(self) -> int | None:
        """Steps that the recipe asks for; None where it does not say."""
        table = self.recipe.get("train", {})
        tokens, batch = (table.get(key) for key in ("tokens", "batch_tokens"))
        return -(-tokens // batch) if _counts(tokens, batch) and batch > 0 else None

    @property
    def tokens(self) -> int:
        return self.train[-1].tokens if self.train else 0

    @property
    def loss(self) -> float | None:
        """Of the last step."""
        return self.train[-1].loss if self.train else None

    @property
    def validation(self) -> float | None:
        """The last."""
        return self.valid[-1].loss if self.valid else None

    @property
    def seconds(self) -> float:
        """Of training, validations and stops not counted."""
        return self.train[-1].seconds if self.train else 0.0

    @property
    def rate(self) -> float:
        """Tokens a second; 0 where nothing is known."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("name", "state", "why", "steps", "of", "tokens", "loss", "validation", "parameters")
        told = {name: getattr(self, name) for name in names}
        when = datetime.fromtimestamp(self.started).astimezone().isoformat(timespec="seconds")
        more = {"tokens_per_second": round(self.rate, 1), "seconds": round(self.seconds, 1), "started": when}
        return {"folder": str(self.folder), **told, **more}


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """The run folders among and below these, each once. ValueError: one does not exist, or has none in it."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; name run folders, or folders that have some in them")
        inside = list(_below(folder))
        if not inside:
            raise ValueError(f"{folder}: no run in it (a run folder has {RECIPE} and {METRICS}, of `atma train`)")
        for path in inside:
            if path.resolve() not in found or found[path.resolve()].is_symlink():
                found[path.resolve()] = path
    return list(found.values())


def is_run(folder: Path) -> bool:
    """Whether a folder is one of `atma train`, whatever became of it."""
    marks = (METRICS, "checkpoints", "final", LOCK)
    return os.path.isfile(folder / RECIPE) and any(os.path.exists(folder / mark) for mark in marks)


def read_run(folder: Path) -> Run:
    """The run in a folder."""
    recipe, why = _recipe(folder)
    train, valid, skipped = _points(folder / METRICS)
    if not why and os.path.exists(folder / METRICS) and not os.path.isfile(folder / METRICS):
        why = f"{METRICS}: not a file"
    if not why and skipped > 1 and not train:
        why = f"{METRICS}: none of its {skipped} lines is a row of a record"
    name = folder.resolve().name or str(recipe.get("name", "run"))
    started = min(filter(None, (_made(folder / one) for one in (LOCK, RECIPE))), default=0.0)
    state = "broken" if why else _state(folder, train, recipe)
    return Run(folder, name, state, why, recipe, train, valid, skipped, _parameters(folder), started)


def _below(folder: Path) -> Iterator[Path]:
    """Run folders at and below a folder, nearest first."""
    level, seen = [folder], 0
    for _ in range(DEPTH + 1):
        deeper: list[Path] = []
        for path in level:
            seen += 1
            if is_run(path):
                yield path
            elif seen < MOST_FOLDERS:
                deeper += _folders(path)
        level = deeper


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if os.path.isdir(entry) and not entry.name.startswith("."))
    except OSError:
        return []


def _made(path: Path) -> float:
    """When a file was written; 0 where that cannot be told."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _recipe(folder: Path) -> tuple[dict[str, Any], str]:
    """The tables of the recipe, and what is wrong with it."""
    try:
        values = tomllib.loads((folder / RECIPE).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{RECIPE}: {' '.join(str(error).split())[:200]}"
    wrong = [key for key in ("train", "model", "data") if not isinstance(values.get(key, {}), dict)]
    return ({}, f"{RECIPE}: '{wrong[0]}' is no table") if wrong else (values, "")


def _points(path: Path) -> tuple[list[Point], list[Point], int]:
    """Steps and validations of a record, and how many lines are neither rows nor the last, which may be cut short."""
    train, valid, skipped = list[Point](), list[Point](), 0
    seconds, before = 0.0, 0
    if not os.path.isfile(path):  # to open a pipe is to wait for who writes into it
        return train, valid, skipped
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            row = _row(line)
            if row is None:
                skipped += line.endswith(b"\n")
                continue
            kind, step, tokens, loss, speed = row
            if kind == "train":
                seconds += (tokens - before) / speed if speed > 0 and tokens > before else 0.0
                before = tokens
                if loss is not None:
                    train.append(Point(step, tokens, seconds, loss))
            elif kind == "validation" and loss is not None:
                valid.append(Point(step, tokens, seconds, loss))
    return train, valid, skipped


def _row(line: bytes) -> tuple[str, int, int, float | None, float] | None:
    """Kind, step, tokens, loss and tokens a second of a line; None where it is no row."""
    try:
        row = json.loads(line)
        step, tokens, loss = int(row["step"]), int(row.get("tokens", 0)), row.get("loss")
        speed = float(row.get("tokens_per_second", 0))
        if not _counts(step, tokens):
            return None
        loss = float(loss) if loss is not None and abs(float(loss)) <= MOST_LOSS else None
        return str(row["kind"]), step, tokens, loss, speed if LEAST_SPEED <= speed <= MOST_SPEED else 0.0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None


def _counts(*values: Any) -> bool:
    """Whether these are counts."""
    return all(isinstance(value, int) and 0 <= value < MOST_COUNT for value in values)


def _state(folder: Path, train: list[Point], recipe: dict[str, Any]) -> State:
    if _held(folder / LOCK):
        return "running"
    last = train[-1].step if train else 0
    kept = _json(folder / "final" / "config.json").get("extra", {})
    made = kept.get("step") if isinstance(kept, dict) else None
    if os.path.isfile(folder / "final" / "config.json") and (not isinstance(made, int) or made >= last):
        return "finished"
    return "stopped" if train or os.path.isdir(folder / "checkpoints") else "begun"


def _held(path: Path) -> bool:
    """Whether a process trains in the folder of this lock file: it holds a lock for as long as it lives.

    To look is to share it for a moment, for which whoever wants to train there waits.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a disk without locks cannot tell
        return False
    finally:
        os.close(handle)
    return False


def _parameters(folder: Path) -> int | None:
    """Numbers of the final model, or of the newest checkpoint, by the heads of its weights files."""
    with contextlib.suppress(OSError):
        for place in [folder / "final", *sorted(folder.glob("checkpoints/step-*"), reverse=True)]:
            sizes = [_numbers(path) for path in sorted(place.glob("model*.safetensors"))]
            if sizes and None not in sizes:
                return sum(size for size in sizes if size is not None)
    return None


def _numbers(path: Path) -> int | None:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MOST_HEAD:
                return None
            head = json.loads(file.read(length))
        shapes = [one["shape"] for name, one in head.items() if name != "__metadata__"]
        count = sum(math.prod(shape) for shape in shapes) if all(_counts(*shape) for shape in shapes) else None
        return count if _counts(count) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError, struct.error):
        return None


def _json(path: Path) -> dict[str, Any]:
    if not os.path.isfile(path):
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
