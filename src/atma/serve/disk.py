"""Kept states as files: one safetensors file a state, named by its position and key, the oldest removed first.

A file that cannot be read whole, or whose contents are not those it was written with, is a miss and is removed.
"""

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from atma import state as states

FORMAT = "atma kept state 1"


class DiskStates:
    """The files of one folder, at most `budget` bytes of them. Keys tell models apart; one engine at a time."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.damaged = self.failures = 0
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(".*.new"):
            path.unlink(missing_ok=True)
        found = [(path.stat(), path) for path in folder.glob(f"{'[0-9]' * 10}-*.safetensors")]
        ordered = sorted(found, key=lambda item: item[0].st_mtime_ns)
        self._sizes = {path.name: stat.st_size for stat, path in ordered}
        self._positions = Counter(map(_position, self._sizes))
        self.trim()

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def positions(self) -> set[int]:
        """At which there are states, of whatever text."""
        return set(self._positions)

    def has(self, position: int, key: str) -> bool:
        """Whether there is a file for this state."""
        return _name(position, key) in self._sizes

    def write(self, position: int, key: str, state: states.ModelState, hidden: Tensor) -> None:
        """Keep a state of one row; what cannot be written is counted in `failures` and not kept."""
        name = _name(position, key)
        if name in self._sizes:
            return
        about = {"format": FORMAT, "position": position, "key": key, "hidden": _text_of(hidden)}
        about["sha256"] = _digest(state, about)
        try:
            states.save(state, self.folder / name, {"kept": json.dumps(about)})
            self._sizes[name] = (self.folder / name).stat().st_size
            self._positions[position] += 1
        except OSError:
            self.failures += 1
        self.trim()

    def read(self, position: int, key: str, like: Tensor) -> tuple[states.ModelState, Tensor] | None:
        """A state and its last hidden state, of the type of `like`; None, and no file any more, if it is damaged."""
        name = _name(position, key)
        try:
            state, metadata = states.load(self.folder / name)
            about = json.loads(metadata["kept"])
            whole = about.pop("sha256") == _digest(state, about) and about["format"] == FORMAT
            if not whole or (about["position"], about["key"]) != (position, key):
                raise ValueError(f"{name}: contents differ from what was written")
            hidden = _tensor_of(about["hidden"], like)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            self.damaged += 1
            self._remove(name)
            return None
        self._sizes[name] = self._sizes.pop(name)
        return state, hidden

    def trim(self) -> None:
        """Remove the oldest files until the rest keep within the budget."""
        while self._sizes and self.bytes > self.budget:
            self._remove(next(iter(self._sizes)))

    def _remove(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            self._positions -= Counter([_position(name)])
        (self.folder / name).unlink(missing_ok=True)


def _name(position: int, key: str) -> str:
    return f"{position:010d}-{key}.safetensors"


def _position(name: str) -> int:
    return int(name.split("-")[0])


def _digest(state: states.ModelState, about: dict) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in states.tensors(state):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(x: Tensor) -> bytes:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _text_of(x: Tensor) -> str:
    return base64.b64encode(_bytes_of(x)).decode()


def _tensor_of(text: str, like: Tensor) -> Tensor:
    data = np.frombuffer(base64.b64decode(text), np.uint8).copy()
    return torch.from_numpy(data).view(like.dtype).to(like.device)
