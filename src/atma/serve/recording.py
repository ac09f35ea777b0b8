"""Steps recorded once, as in `atma.decoding`, and replayed in one call without Python between their kernels.

All of them have one arena for what lies between: one step runs at a time. Those used longest ago make room for others.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.native.arena import Arena
from atma.ops.native.beside import Beside
from atma.ops.native.recorder import Program, Recorder, TooLarge, Unrecordable
from atma.serve.exact import Served
from atma.serve.settings import Recording

OFTEN = 4
"""Uses of a step before it is recorded: recording takes as long as many steps."""

Key = tuple[str, int, int]
"""A kind of step, its rows and the tokens of each. Where one of a kind cannot be recorded none of it can."""

Copy = Callable[[Tensor, Tensor], object]
Step = Callable[[slice, Copy], Tensor]
"""Compute some rows, writing what they carry by `Copy`; the logits."""


class _Recorded(NamedTuple):
    steps: Beside
    logits: Tensor
    bytes: int


class Recordings:
    """Recorded steps by what tells them apart, within `recording`; `possible`: whether steps can be recorded at all.

    The weights of `served` are counted elsewhere.
    """

    def __init__(self, recording: Recording, possible: bool, served: Served) -> None:
        self.recording, self.possible, self._served = recording, possible and recording.room > 0, served
        self.by_key: dict[Key, _Recorded] = {}
        self.together: Tensor | None = None
        """Logits of rows that threads compute in parts."""
        self._used: dict[Key, int] = {}
        self._too_large: set[Key] = set()
        self._refused: set[str] = set()
        self._arena: Arena | None = None

    @property
    def bytes(self) -> int:
        """Of recorded steps: what they share, and the calls of each."""
        return self.shared_bytes + sum(one.bytes for one in self.by_key.values())

    @property
    def shared_bytes(self) -> int:
        """Of what recorded steps share."""
        return self.arena_bytes + (0 if self.together is None else self.together.nbytes)

    @property
    def arena_bytes(self) -> int:
        """Of the memory for what lies between a step's kernels."""
        return 0 if self._arena is None else self._arena.bytes

    def replay(self, key: Key) -> Tensor | None:
        """The logits of a recorded step, carried out again; None where none is recorded."""
        recorded = self.by_key.get(key)
        if recorded is None:
            return None
        self.by_key[key] = self.by_key.pop(key)
        recorded.steps.replay()
        return recorded.logits

    def due(self, key: Key) -> bool:
        """Whether a step that is about to be made is to be recorded now."""
        self._used[key] = self._used.get(key, 0) + 1
        refused = key in self._too_large or key[0] in self._refused
        return self._used[key] >= OFTEN and self.possible and not refused

    def record(self, key: Key, parts: Many[slice], fixed: Many[Tensor], own: Many[Tensor], step: Step) -> Tensor | None:
        """A step carried out and recorded, each of `parts` for a thread of its own. None where that cannot be: nothing
        has changed then.

        `fixed`: all tensors that are where they are from step to step; `own`: what the step changes of these.
        """
        before = [x.clone() for x in own]
        try:
            logits, programs = self._programs(parts, fixed, step)
        except Unrecordable as reason:
            if isinstance(reason, TooLarge):
                self._too_large.add(key)
            else:
                self._refused.add(key[0])
            for x, old in zip(own, before, strict=True):
                x.copy_(old)
            return None
        known = {x.untyped_storage().data_ptr() for x in (*fixed, *self._served.parameters())}
        one = _Recorded(Beside(programs), logits, sum(program.bytes(known) for program in programs))
        if self.shared_bytes + one.bytes > self.recording.room:
            self._too_large.add(key)
        else:
            self.by_key[key] = one
            self._trim()
        return logits

    def _programs(self, parts: Many[slice], fixed: Many[Tensor], step: Step) -> tuple[Tensor, list[Program]]:
        """The logits of a step, and for each thread the program of its rows, in its own part of the arena."""
        programs, at, logits = [], 0, None
        self._arena = self._arena or Arena(self.recording.shared)
        for some in parts:
            recorder = Recorder(fixed, self._arena, at)
            with torch.inference_mode(False), torch.no_grad(), recorder:
                logits = step(some, recorder.copy)
                if len(parts) > 1 and self.together is not None:
                    recorder.copy(self.together[some], logits)
            programs.append(recorder.program())
            at = recorder.end
        assert logits is not None
        return logits if len(parts) == 1 or self.together is None else self.together[: parts[-1].stop], programs

    def _trim(self) -> None:
        """Forget recorded steps that were used longest ago until the rest keep within the room."""
        while self.bytes > self.recording.room:
            oldest = next(iter(self.by_key))
            del self.by_key[oldest]
            self._used[oldest] = 0
