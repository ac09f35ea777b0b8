"""Checkpoints are written while training goes on: a step that saves waits for a copy of the tensors, not for the disk.

A thread writes the copies, hashes them, forces them to the disk and renames their folder, as atma.folders has it. It
lives no longer than that, and there is one at a time: a checkpoint waits for the one before. What goes wrong in it ends
the run at the next step, in all processes; a run that ends for another reason waits for it too. Of processes that share
the weights each writes its part, and their threads agree by a group of their own.

`best/` and `final/` are not written like this: a copy of a best model would be memory held for what is rare, and after
a final one nothing goes on.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from atma.disk import destination
from atma.folders import Writer, abandoned, begin_folder, end_folder, fill_folder
from atma.replacing import staging_place
from atma.train.parallel import Ranks, all_here, lines_of_their_own, sum_over, where
from atma.train.together import agreeing, answering, texts
from atma.weights import TensorWriter

LOOK_SECONDS = 0.2
"""How often one who waits for a thread looks whether it waits in vain."""


class Copies:
    """Tensors as they were, in memory of their own on the CPU, which is used again from one time to the next."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tensor] = {}

    def of(self, files: Mapping[str, Writer]) -> dict[str, Writer]:
        """The same writers, of what their tensors are now. What was made before is overwritten."""
        return {name: self._copied(name, one) if isinstance(one, TensorWriter) else one for name, one in files.items()}

    @torch.no_grad()
    def _copied(self, file: str, writer: TensorWriter) -> TensorWriter:
        for name, value in writer.tensors.items():
            held = self._held.get((file, name))
            if held is None or (held.shape, held.dtype) != (value.shape, value.dtype):
                held = torch.empty(value.shape, dtype=value.dtype)
                self._held[file, name] = held
            held.copy_(value)
        return writer._replace(tensors={name: self._held[file, name] for name in writer.tensors})


class Saver:
    """Writes the checkpoints of these processes; the `with` statement around their steps waits for the last one."""

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        """seconds: after which a disk, or another process, that does not answer ends the run."""
        self._ranks, self._seconds, self._copies = ranks, seconds, Copies()
        self._group: Any = None
        self._begun = False
        """Whether there may be a thread in any process that this one has not waited for."""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._given_up = False
        """Whether a write has taken too long: it must change nothing any more."""
        self._step, self._folder, self._since = 0, Path(), float("inf")
        """What is written, and since when this process's disk is at work on a file; not while it waits for others."""

    def begin(self, step: int, folder: Path, files: Mapping[str, Writer], then: Callable[[], object]) -> None:
        """Copy the tensors, and begin to write the `folder` of a step, after which the first process does `then`.

        files: what this process writes. All call it, and first wait for what is still being written.
        """
        self.wait()
        if self._ranks.in_parts and self._group is None:
            self._group = lines_of_their_own(self._seconds)
        self._begun, self._step, self._folder = True, step, destination(folder)
        if files:
            work = self._work(self._watched(self._copies.of(files)), then)
            self._thread = threading.Thread(target=work, name=f"writes {folder.name}", daemon=True)
            self._thread.start()

    def _watched(self, files: Mapping[str, Writer]) -> dict[str, Writer]:
        """The same writers, each of which may take as long as a disk has to answer, and none begins once given up."""

        def watched(write: Writer) -> Writer:
            def begun_anew(path: Path) -> None:
                self._require_wanted()
                self._since = time.monotonic()
                write(path)

            return begun_anew

        return {name: watched(write) for name, write in files.items()}

    def _require_wanted(self) -> None:
        """ValueError once the run has given this write up: another may write at its place."""
        if self._given_up:
            raise ValueError(f"{self._folder}: was waited for in vain")

    def check(self) -> None:
        """ValueError or OSError, in all processes, once a write has failed in any. All call it at the same step."""
        if not self._begun:
            return
        all_here(self._ranks, self._seconds)
        failed, alive = self._error is not None or self._overdue(), self._alive()
        if self._ranks.world > 1:
            failed, alive = sum_over(self._ranks, torch.tensor([failed, alive], device=where()).float()).tolist()
        if failed or not alive:
            self.wait()

    def wait(self) -> None:
        """Go on once what was begun is on the disk. All call it. ValueError or OSError, in all, where it is not."""
        if not self._begun:
            return
        self._begun, problem = False, self._outcome()
        try:
            with agreeing(self._ranks):
                if problem is not None:
                    raise problem
        except RuntimeError as error:  # the others have waited in vain, or are gone
            if problem is None or problem is error:
                raise
            raise problem from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is None:
            self.wait()
            return
        problem = self._outcome()  # others may not be there to agree
        if problem is not None and problem is not error:
            error.add_note(f"besides: {problem}")

    def _outcome(self) -> Exception | None:
        """Wait for this process's thread, or until that is in vain; what went wrong."""
        while self._thread is not None and self._alive():
            self._thread.join(LOOK_SECONDS)
            if self._overdue():
                self._thread, self._given_up = None, True
                waited = f"{self._folder}: not written after {self._seconds:g} s: does its disk answer?"
                return ValueError(f"{waited} Where it is only slow, set train.hang_seconds higher")
        problem, self._thread, self._error = self._error, None, None
        return problem

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _overdue(self) -> bool:
        return time.monotonic() - self._since > self._seconds

    def _work(self, files: Mapping[str, Writer], then: Callable[[], object]) -> Callable[[], None]:
        """What a thread does."""

        def work() -> None:
            try:
                if self._group is None:
                    with self._working():
                        self._write_all(files)
                else:
                    with answering(self._ranks, self._seconds, lambda: self._step):
                        self._write_parts(files)
                if self._ranks.rank == 0:
                    with self._working():
                        self._require_wanted()
                        then()
            except Exception as error:
                self._error = error

        return work

    def _write_all(self, files: Mapping[str, Writer]) -> None:
        """By one process."""
        staging = begin_folder(self._folder)
        with abandoned(staging, self._folder):
            entries = fill_folder(staging, files)
            self._require_wanted()
            end_folder(staging, self._folder, entries)

    def _write_parts(self, files: Mapping[str, Writer]) -> None:
        """The same by processes that share the weights and all see the folder, each with files of its own.

        ValueError or OSError, in all of them, when any cannot; the folder is then not there.
        """
        ranks, folder = self._ranks, self._folder
        staging, first = staging_place(folder, "staging"), ranks.rank == 0
        with contextlib.ExitStack() as held:
            with self._agreeing():
                if first:
                    begin_folder(folder)
                    held.enter_context(abandoned(staging, folder))
            with self._agreeing():
                entries = fill_folder(staging, files)
            told = texts(ranks, json.dumps(entries), self._group)
            with self._agreeing():
                self._require_wanted()
                if first:
                    end_folder(staging, folder, {name: one for text in told for name, one in json.loads(text).items()})

    @contextlib.contextmanager
    def _agreeing(self) -> Iterator[None]:
        """`agreeing` among the threads, in which who does not come is named."""
        with agreeing(self._ranks, self._group):
            try:
                with self._working():
                    yield
            finally:
                all_here(self._ranks, self._seconds, self._group)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = float("inf")
