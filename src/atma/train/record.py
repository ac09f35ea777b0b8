"""The record of a run, `metrics.jsonl`: one JSON object a line, appended and flushed as it happens.

Lines have "kind": "train", "validation" or "event", and "step", the number of steps done. On resume the record is cut
back to the checkpoint's step, so that every loss stands in it once.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atma.disk import sync

NAME = "metrics.jsonl"


class Record:
    """Appends rows to the file `path`; closes with the `with` statement."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, kind: str, step: int, values: Mapping[str, float | int | str | None]) -> dict[str, Any]:
        """Append one row and return it. Numbers that JSON cannot hold (NaN, inf) are written as null."""
        row = {"kind": kind, "step": step} | {key: _finite(value) for key, value in values.items()}
        try:
            self._file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        return row

    def sync(self) -> None:
        """Force what was written to the disk."""
        os.fsync(self._file.fileno())


def read_record(run: Path) -> list[dict[str, Any]]:
    """Every row of a run's record, in order. ValueError names the line that is not one; a cut last line is left out."""
    return [row for _, row in _rows(run / NAME)]


def cut_record(run: Path, step: int, unvalidated: bool = False) -> None:
    """Drop the rows after `step`, its validation too if it is made again, and a last line that a crash cut short."""
    path = run / NAME
    if not path.exists():
        return
    end = 0
    for after, row in _rows(path):
        again = unvalidated and row["step"] == step and row["kind"] == "validation"
        if row["step"] > step or again:
            break
        end = after
    os.truncate(path, end)
    sync(path)


def export_tensorboard(run: str | Path, out: str | Path) -> int:
    """Write the train and validation numbers of a run as TensorBoard events into folder `out`; returns how many.

    Needs the extra `atma-lm[tensorboard]`; ValueError says so when it is absent.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("TensorBoard is not installed: pip install 'atma-lm[tensorboard]'") from None
    if not (Path(run) / NAME).is_file():
        raise ValueError(f"{Path(run) / NAME}: no such record")
    written = 0
    with SummaryWriter(str(out)) as writer:
        for row in read_record(Path(run)):
            if row["kind"] == "event":
                continue
            for key, value in row.items():
                if key not in ("kind", "step") and isinstance(value, int | float):
                    writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])
                    written += 1
    return written


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    end = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                _ = row["kind"], row["step"] + 0
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(f"{path}: line {number} is not a row of a training record") from None
            end += len(line)
            yield end, row


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
