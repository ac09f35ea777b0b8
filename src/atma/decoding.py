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
OTHER_SHAPES = "a step changes the shapes or dtypes of the state"


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
        before = _Carried(self.state)
        own = states.transform(self.state, lambda _, x: _ordinary(x))
        try:
            changing = [self._tokens, *states.tensors(own)]
            with torch.inference_mode(False), torch.no_grad(), Recorder(changing) as recorder:
                hidden, after = self._model.unchecked(self._tokens, own)
                logits = self._model.logits(hidden[:, -1])
                _take(own, after, recorder.copy)
        except Unrecordable as reason:
            before.put_back()
            self.how = f"eager: {reason}"
            return self._eager()
        self._recorded = recorder.program()
        self.how = f"{RECORDED}: {len(self._recorded)} kernels a step"
        return logits

    def _capture(self) -> Tensor:
        """On a CUDA device. What the steps before the capture do to the state is undone."""
        before = _Carried(self.state)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                hidden, after = self._model.unchecked(self._tokens, self.state)
                self._model.logits(hidden[:, -1])
        torch.cuda.current_stream().wait_stream(side)
        before.put_back()
        if _shapes(after) != _shapes(self.state):
            self.how = f"eager: {OTHER_SHAPES}"
            return self._eager()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden, after = self._model.unchecked(self._tokens, self.state)
            logits = self._model.logits(hidden[:, -1])
            _take(self.state, after, lambda to, source: to.copy_(source))
        graph.replay()  # capturing computes nothing
        self._recorded = graph
        return logits


class _Carried:
    """What a state holds beside its keys: a step may change it in place, and one made again must not find it changed.

    Keys need no copy, which would be as large as they are: a step writes them behind the row's length, and writes them
    there again.
    """

    def __init__(self, state: ModelState) -> None:
        self._own = [x for x, grows in zip(states.tensors(state), _growing(state), strict=True) if not grows]
        self._copies = [x.clone() for x in self._own]

    def put_back(self) -> None:
        for own, copy in zip(self._own, self._copies, strict=True):
            own.copy_(copy)


def _growing(state: ModelState) -> list[bool]:
    """For each tensor of a state, whether it is larger in one with room for more."""
    sizes = states.transform(state, lambda _, x: x.to("meta"))
    wider = states.grow(sizes, states.capacity(state) + 1)
    return [a.shape != b.shape for a, b in zip(states.tensors(sizes), states.tensors(wider), strict=True)]


def _ordinary(x: Tensor) -> Tensor:
    """The same memory as a tensor that may be written in place outside of inference mode."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def _take(state: ModelState, after: ModelState | None, copy: Callable[[Tensor, Tensor], object]) -> None:
    """Write what the state has become where it was. Unrecordable: it has become one of other shapes."""
    if after is None or _shapes(after) != _shapes(state):
        raise Unrecordable(OTHER_SHAPES)
    before, now = states.tensors(state), states.tensors(after)
    places = {x.untyped_storage().data_ptr() for x in before}
    changed = [(old, new) for old, new in zip(before, now, strict=True) if _lies(old) != _lies(new)]
    # What lies elsewhere in the state may be written before it is read.
    changed = [(old, new.clone() if new.untyped_storage().data_ptr() in places else new) for old, new in changed]
    for old, new in changed:
        copy(old, new)


def _shapes(state: ModelState | None) -> list[tuple[torch.Size, torch.dtype]]:
    return [] if state is None else [(x.shape, x.dtype) for x in states.tensors(state)]


def _lies(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()
