"""A training on a cluster: one job of many processes runs `atma train` there, and this process shows how it goes."""

import json
import time
from pathlib import Path
from typing import Any, BinaryIO

from atma.launching import Jobs, Request, Work, start
from atma.launching.process import last_error
from atma.train.folder import recipe_of
from atma.train.progress import Progress
from atma.train.record import NAME

LOOK_SECONDS = 1.0
FOLDER = ".jobs"
"""Of a run folder: what the cluster and the processes write. Hidden, so that the folder counts as empty."""


class Tail:
    """The rows of a record that is being written: those that come after it was opened here."""

    def __init__(self, run: Path) -> None:
        self._path, self._at, self._last = run / NAME, 0, b""
        self._resumed = (-1, b"")
        """The last line that says that the run goes on, and where it is."""
        self.before = max((row["step"] for row in self.rows()), default=0)
        """Steps that were done before."""

    def rows(self) -> list[dict[str, Any]]:
        """Those that are new. A run that goes on cuts its record back and tells so: then those from there on."""
        if not self._path.is_file():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._at - len(self._last))
            if file.read(len(self._last)) == self._last:
                return self._read(file)
            file.seek(0)
            at, last, resumed = self._at, self._last, self._resumed
            self._at, self._last, self._resumed = 0, b"", (-1, b"")
            rows = self._read(file)
            if self._resumed not in (resumed, (-1, b"")):
                return rows[max(number for number, row in enumerate(rows) if _resumes(row)) :]
            self._at, self._last, self._resumed = at, last, resumed  # cut back, and not told yet
            return []

    def _read(self, file: BinaryIO) -> list[dict[str, Any]]:
        """The rows from here to the end, but for a last line that is not whole."""
        lines = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        rows = [json.loads(line) for line in lines]
        for line, row in zip(lines, rows, strict=True):
            if _resumes(row):
                self._resumed = self._at, line
            self._at, self._last = self._at + len(line), line
        return rows


def _resumes(row: dict[str, Any]) -> bool:
    return row["kind"] == "event" and str(row.get("event")).startswith("resumed at step")


def launch(request: Request, line: list[str], out: Path, threads: int) -> Jobs:
    """Start the job whose processes run `atma LINE` into the run folder `out`. ValueError as in `start`."""
    return start(request, Work("atma-train", [line], out / FOLDER, threads))


def follow(jobs: Jobs, out: Path, progress: Progress) -> Path:
    """Show the run until its job is over; returns `out/final`. ValueError: it came to no good end, or made no model."""
    tail, begun = Tail(out), False
    try:
        while True:
            over, rows = jobs.over(), tail.rows()
            if rows and not begun:
                recipe, begun = recipe_of(out), True
                progress.start(recipe.name, recipe.train.steps, tail.before)
            for row in rows:
                progress.show(row)
            if over:
                break
            time.sleep(LOOK_SECONDS)
    finally:
        if begun:
            progress.stop()
    failures = jobs.failures()
    if failures or not (out / "final").is_dir():
        told = last_error(jobs.logs()) or next(iter(failures), "it has ended, and there is no model")
        raise ValueError(f"{jobs.told()}: {told} (logs: {out / FOLDER})")
    return out / "final"
