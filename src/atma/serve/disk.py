"""Kept states as files: one safetensors file a state, named by its position and key, the oldest removed first.

A file that cannot be read whole, or whose contents are not those it was written with, is a miss and is removed. Files
are written by a thread, so that no step of the engine waits for a disk.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atma import state as states

FORMAT = "atma kept state 1"


class _Pending(NamedTuple):
    position: int
    key: str
    state: states.ModelState
    hidden: Tensor
    bytes: int


class DiskStates:
    """The files of one folder, at most `budget` bytes of them. Keys tell models apart; one engine at a time.

    A thread writes them, and ends when nothing is left to write. What it has not written yet, at most `room` bytes, is
    found like what is in files. A lock guards all that both threads use; neither writes nor removes files under it.
    """

    def __init__(self, folder: Path, budget: int, room: int) -> None:
        self.folder, self.budget, self.room = folder, budget, room
        self.damaged = self.failures = self.dropped = 0
        self.pending_bytes = 0
        """Of states that are not written yet, counted as they are when they are kept."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.new"):
            path.unlink(missing_ok=True)
        found = [(path.stat(), path) for path in folder.glob(f"{'[0-9]' * 10}-*.safetensors")]
        ordered = sorted(found, key=lambda item: item[0].st_mtime_ns)
        self._sizes = {path.name: stat.st_size for stat, path in ordered}
        self._pending: dict[str, _Pending] = {}
        self._positions = Counter(map(_position, self._sizes))
        self._changed = threading.Condition()
        self._writing = False
        self._unlink(self._surplus())

    @property
    def bytes(self) -> int:
        """Of all files."""
        with self._changed:
            return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def positions(self) -> set[int]:
        """At which there are states, of whatever text."""
        with self._changed:
            return set(self._positions)

    def has(self, position: int, key: str) -> bool:
        """Whether this state is in a file or on its way there."""
        name = _name(position, key)
        with self._changed:
            return name in self._sizes or name in self._pending

    def admit(self, size: int, wait: bool) -> bool:
        """Whether there is room for a state of so many bytes to wait for being written; if not, it counts as dropped.

        Those who can `wait` always get room; a state larger than all of it when nothing else is waiting.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._pending or self.pending_bytes + size <= self.room)
            elif self.pending_bytes + size > self.room:
                self.dropped += 1
                return False
            return True

    def write(self, position: int, key: str, state: states.ModelState, hidden: Tensor, size: int) -> None:
        """Keep an admitted state of one row, which must not change any more; what cannot be written is counted in
        `failures` and not kept."""
        with self._changed:
            self._pending[_name(position, key)] = _Pending(position, key, state, hidden, size)
            self._positions[position] += 1
            self.pending_bytes += size
            if not self._writing:
                self._writing = True
                threading.Thread(target=self._work, name="atma-states").start()

    def flush(self) -> None:
        """Wait until nothing is left to write."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing)

    def read(
        self, position: int, key: str, like: states.ModelState, hidden: Tensor
    ) -> tuple[states.ModelState, Tensor] | None:
        """A state like `like` and its last hidden state, of the type of `hidden`.

        None, and no file any more, if it is damaged or of another form.
        """
        name = _name(position, key)
        with self._changed:
            if name in self._pending:
                return self._pending[name].state, self._pending[name].hidden
            if name not in self._sizes:
                return None
            try:
                state, text = self._load(name, position, key, like)
                self._sizes[name] = self._sizes.pop(name)
                return state, _tensor_of(text, hidden)
            except Exception:  # whatever is wrong with a file, it is a miss
                self.damaged += 1
                self._forget(name)
        self._unlink([name])
        return None

    def _load(self, name: str, position: int, key: str, like: states.ModelState) -> tuple[states.ModelState, str]:
        saved = states.read(self.folder / name)
        about = json.loads(saved.metadata["kept"])
        whole = about.pop("sha256") == _digest(saved.tensors(), about) and about["format"] == FORMAT
        if not whole or (about["position"], about["key"]) != (position, key):
            raise ValueError(f"{name}: contents differ from what was written")
        return saved.build(like), about["hidden"]

    def _work(self) -> None:
        """The thread: what has waited longest comes first."""
        while (name := self._first()) is not None:
            self._written(name, self._save(name))

    def _first(self) -> str | None:
        with self._changed:
            self._writing = bool(self._pending)
            self._changed.notify_all()
            return next(iter(self._pending), None)

    def _save(self, name: str) -> int | None:
        """Bytes of the file that a state now has; None if it has none."""
        one = self._pending[name]
        try:
            about = {"format": FORMAT, "position": one.position, "key": one.key, "hidden": _text_of(one.hidden)}
            about["sha256"] = _digest(states.tensors(one.state), about)
            staged = self.folder / f".{name}.new"
            states.save(one.state, staged, {"kept": json.dumps(about)})
            size = staged.stat().st_size
            with self._changed:
                surplus = self._surplus(size)
            self._unlink(surplus)  # before there is one file more
            staged.replace(self.folder / name)
            return size
        except Exception:  # whatever it is, it costs this state alone: the engine and the states that wait go on
            return None

    def _written(self, name: str, size: int | None) -> None:
        with self._changed:
            self.pending_bytes -= self._pending.pop(name).bytes
            if size is None:
                self.failures += 1
                self._positions -= Counter([_position(name)])
            else:
                self._sizes[name] = size
            surplus = self._surplus()
        self._unlink(surplus)

    def _surplus(self, more: int = 0) -> list[str]:
        """The oldest files, forgotten until the rest, and so many bytes more, keep within the budget."""
        gone = []
        while self._sizes and self.bytes + more > self.budget:
            gone.append(next(iter(self._sizes)))
            self._forget(gone[-1])
        return gone

    def _forget(self, name: str) -> None:
        del self._sizes[name]
        self._positions -= Counter([_position(name)])

    def _unlink(self, names: list[str]) -> None:
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError:
                self.failures += 1


def _name(position: int, key: str) -> str:
    return f"{position:010d}-{key}.safetensors"


def _position(name: str) -> int:
    return int(name.split("-")[0])


def _digest(tensors: Sequence[Tensor], about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor).data)
    return digest.hexdigest()


def _bytes_of(x: Tensor) -> np.ndarray:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _text_of(x: Tensor) -> str:
    return base64.b64encode(_bytes_of(x).data).decode()


def _tensor_of(text: str, like: Tensor) -> Tensor:
    data = np.frombuffer(base64.b64decode(text), np.uint8).copy()
    return torch.from_numpy(data).view(like.dtype).to(like.device)
