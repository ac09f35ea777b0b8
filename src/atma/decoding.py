"""One token after another from a state, at the speed of the kernels: a step is recorded once and replayed.

A step of a small model is a few hundred small operations, and calling them from Python takes longer than computing
them. All of a step's memory can be fixed: the state is consumed anyway. So on the CPU its kernel calls are recorded
(ops/native/recorder.py), on a CUDA device it is captured as a CUDA graph, and either is replayed by one call. What is
recorded is the model's own code; where that cannot be, the model is called as ever and `Decoder.how` says why.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atma import state as states
from atma.model import Model
from atma.ops import native
from atma.ops.native.recorder import Program, Recorder, Unrecordable
from atma.state import ModelState

RECORDED, CAPTURED = "recorded", "a CUDA graph"


def way(device: str, dtype: torch.dtype) -> str:
    """How steps on a device in a dtype are made, or why they are not recorded."""
    if device == "cuda":
        return CAPTURED
    if device == "cpu" and native.available(dtype):
        return RECORDED
    reason = (
        native.status().reason if native.status().library is None else f"no compiled kernels for {dtype} on {device}"
    )
    return f"eager: {reason}"


class Decoder:
    """Moves `state` on by one token a row at a time and gives the scores of the next.

    It owns the state from here on: `decoder.state` is what it has become. The first step records. Weights are read
    where they now are: after moving or converting the model, make a new decoder.
    """

    def __init__(self, model: Model, state: ModelState) -> None:
        self.state = state
        self.room = states.capacity(state) - int(state.length.max()) if states.capacity(state) else None
        """Tokens a row that still fit, None for no limit."""
        self.how = ""
        """How steps are made, and why; empty before the first."""
        self._recorded: Program | torch.cuda.CUDAGraph | None = None
        self._model = model
        self._tokens = torch.zeros(state.length.shape[0], 1, dtype=torch.long, device=state.length.device)
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """tokens (B, 1) int64 to soft-capped logits (B, vocabulary), which the next step overwrites.

        ValueError when the state has no room left: `grow` it and make a new decoder.
        """
        self._take_in(tokens)
        if self._recorded is not None:
            self._recorded.replay()
        else:
            self._logits = self._eager() if self.how else self._record()
        assert self._logits is not None
        return self._logits

    def timed(self, tokens: Tensor) -> list[tuple[str, float]]:
        """A step kernel by kernel, the name and the seconds of each. ValueError: none is recorded on the CPU."""
        if not isinstance(self._recorded, Program):
            raise ValueError(f"no step is recorded: {self.how or 'none was made'}")
        self._take_in(tokens)
        return self._recorded.timed()

    def _take_in(self, tokens: Tensor) -> None:
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens must be {tuple(self._tokens.shape)}, not {tuple(tokens.shape)}")
        if self.room is not None:
            if self.room < 1:
                raise ValueError(f"the state's capacity of {states.capacity(self.state)} is used up; grow it first")
            self.room -= 1
        self._tokens.copy_(tokens)

    def _eager(self) -> Tensor:
        hidden, after = self._model.unchecked(self._tokens, self.state)
        assert after is not None
        self.state = after
        return self._model.logits(hidden[:, -1])

    def _record(self) -> Tensor:
        """The first step."""
        self.how = way(self._tokens.device.type, self._model.embed.weight.dtype)
        if self.how == CAPTURED:
            return self._capture()
        if self.how != RECORDED:
            return self._eager()
        try:
            changing = [self._tokens, *states.tensors(self.state)]
            with torch.inference_mode(False), torch.no_grad(), Recorder(changing) as recorder:
                hidden, after = self._model.unchecked(self._tokens, self.state)
                logits = self._model.logits(hidden[:, -1])
                self._take(after, recorder.copy)
        except Unrecordable as reason:  # nothing of the state was changed but keys that are written again
            self.how = f"eager: {reason}"
            return self._eager()
        self._recorded = recorder.program()
        self.how = f"{RECORDED}: {len(self._recorded)} kernels a step"
        return logits

    def _capture(self) -> Tensor:
        """On a CUDA device. The steps before the capture write the same keys again and take no part in the state."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._model.logits(self._model.unchecked(self._tokens, self.state)[0][:, -1])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden, after = self._model.unchecked(self._tokens, self.state)
            logits = self._model.logits(hidden[:, -1])
            self._take(after, lambda to, source: to.copy_(source))
        graph.replay()  # capturing computes nothing
        self._recorded = graph
        return logits

    def _take(self, after: ModelState | None, copy: Callable[[Tensor, Tensor], object]) -> None:
        """Write what the state has become where it was."""
        assert after is not None
        for old, new in zip(states.tensors(self.state), states.tensors(after), strict=True):
            if new.data_ptr() != old.data_ptr():
                copy(old, new)
