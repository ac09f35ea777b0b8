"""The file of result rows, results.jsonl: one JSON object a line, replaced whole and atomically after each measurement.

A row's `key` names its measurement and provenance, so that a measurement already there is not made again.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from atma.disk import destination, locked

Row = dict[str, Any]


def measurement_key(measurement: Row, provenance: Row) -> str:
    """First 16 hexadecimal digits of the SHA-256 of what is measured and with what."""
    text = json.dumps([measurement, provenance], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_rows(path: Path | str) -> list[Row]:
    """The rows of a results file, none if it does not exist. ValueError names a line that is not a JSON object."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a file of result rows (it is not UTF-8 text); choose another file") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a result row; delete the line or choose another file")
        rows.append(row)
    return rows


def add_rows(path: Path | str, rows: list[Row]) -> None:
    """Write rows behind those that are there, which other processes may add to as well. OSError as `write_rows`."""
    path, place = Path(path), destination(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(f".{place.name}.lock").open("ab") as file, locked(file.fileno(), math.inf):
            write_rows(path, read_rows(path) + rows)
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None


def write_rows(path: Path | str, rows: list[Row]) -> None:
    """Replace the file, where a link points, by these rows; a reader, or a crash, sees the old file or the new one.

    OSError names the file, which is then as it was.
    """
    path, place = Path(path), destination(path)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    staged = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(place)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()
