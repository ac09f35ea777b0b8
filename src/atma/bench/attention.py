"""Polar attention beside PyTorch's softmax attention: forward, forward and backward, and one query against many keys.

Softmax attention does strictly less: no null, no second sum, no magnitude. Operations are those of the matrix products
over visible pairs (two forward, five backward with one of them recomputed, as in FlashAttention); exponentials are not
counted.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atma.bench.available import ours
from atma.bench.machine import Cost
from atma.bench.parity import Way, compare, draw, evaluate
from atma.bench.plan import Plan
from atma.bench.rows import Case, Entry, Job
from atma.ops import polar_attention, softmax_attention
from atma.ops.native.recorder import Recorder

ROWS = 32
"""Queries of each of three windows (first, middle, last) that parity is asked of."""
SDPA = "torch SDPA"
STRICTLY_LESS = (
    "Softmax attention (SDPA) does strictly less than polar attention: no null, no second sum, no magnitude."
)
Attend = Callable[..., Sequence[Tensor]]


def jobs(plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of attention."""
    made = []
    notes.append(STRICTLY_LESS)
    for dtype in plan.dtypes:
        backends = ours("polar", dtype, device, notes, partial(_probe, plan, getattr(torch, dtype), device))
        for length in plan.lengths:
            sizes = {"length": length, "batch": plan.batch, "heads": plan.heads, "groups": plan.key_value_heads}
            setting = _Setting(sizes | {"width": plan.head_width}, dtype, device, backends)
            made += [Job(partial(setting.check, mode), partial(setting.case, mode)) for mode in MODES]
    return made


MODES = ("forward", "forward+backward", "decode")


class _Setting:
    """One size and dtype."""

    def __init__(self, sizes: dict[str, int], dtype: str, device: torch.device, backends: list[str]) -> None:
        self.sizes, self.dtype, self.device, self.backends = sizes, dtype, device, backends
        self.torch_dtype: torch.dtype = getattr(torch, dtype)

    def tensors(self, mode: str) -> list[Tensor]:
        """q, k, v and the learned scalars and null value, float64."""
        batch, heads, groups, length, width = (
            self.sizes[name] for name in ("batch", "heads", "groups", "length", "width")
        )
        q = draw((batch, heads, 1 if mode == "decode" else length, width), 0)
        k, v = (draw((batch, groups, length, width), seed) for seed in (1, 2))
        scalars = [draw((heads,), seed) for seed in range(3, 7)]
        return [q, k, v, *scalars, 0.1 * draw((heads, width), 7)]

    def check(self, mode: str) -> None:
        tensors, way = self.tensors(mode), Way(self.torch_dtype, self.device, mode == "forward+backward")
        start = None if mode != "decode" else self.sizes["length"] - 1
        for backend in self.backends:
            what = f"polar {mode} of the {backend} backend in {self.dtype} at {self.sizes['length']} tokens"
            compare(what, _shown(_polar(backend), start), _exact(_polar("reference"), start), tensors, way)
        softmax = _exact(_softmax, start)
        for name, attend in self._peers().items():
            what = f"{name} ({mode}, {self.dtype}, {self.sizes['length']} tokens)"
            compare(what, _shown(attend, start), softmax, tensors[:3], way.of_peer())

    def case(self, mode: str) -> Case:
        tensors = [x.to(self.device, self.torch_dtype if x.dim() > 1 else torch.float32) for x in self.tensors(mode)]
        q, groups = tensors[0], self.sizes["heads"] // self.sizes["groups"]
        start = None
        if mode == "decode":
            start = torch.full((q.shape[0],), self.sizes["length"] - 1, dtype=torch.int32, device=self.device)
        backward, cost = mode == "forward+backward", self.cost(mode)
        entries = [
            Entry(f"atma {backend}", True, runner(partial(_polar(backend), start=start), tensors, backward), cost)
            for backend in self.backends
        ]
        if start is not None and "native" in self.backends:
            replay = recorded(partial(_polar("native"), start=start), tensors, start)
            entries.append(Entry("atma native, recorded", True, replay, cost))
        for name, attend in self._peers().items():
            given = tensors[:3]
            if name != SDPA:
                given = [q, *(x.repeat_interleave(groups, 1) for x in tensors[1:3])]
            entries.append(Entry(name, False, runner(partial(attend, start=start), given, backward), cost))
        return Case(f"polar {mode}", self.sizes, self.dtype, entries)

    def cost(self, mode: str) -> Cost:
        batch, heads, groups, length, width = (
            self.sizes[name] for name in ("batch", "heads", "groups", "length", "width")
        )
        size = self.torch_dtype.itemsize
        queries = 1 if mode == "decode" else length
        pairs = batch * heads * (length if mode == "decode" else length * (length + 1) / 2)
        moved = 2 * batch * width * (heads * queries + groups * length) * size
        products, passes = (7, 2.5) if mode == "forward+backward" else (2, 1)
        return Cost(2 * products * width * pairs, passes * moved)

    def _peers(self) -> dict[str, Attend]:
        """SDPA on grouped keys, and where there are groups also on keys written out for each head before timing."""
        found: dict[str, Attend] = {SDPA: _sdpa}
        if self.sizes["heads"] != self.sizes["groups"]:
            found[f"{SDPA}, expanded keys"] = _sdpa
        if self.device.type == "cuda" and self.torch_dtype.itemsize == 2:
            found[f"{SDPA} flash, expanded keys"] = _flash
        return found


def runner(call: Attend, tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    """A call without gradients; or with those of every tensor, for gradients of ones."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return call(*tensors)

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    upstream = [torch.randn_like(x) for x in call(*leaves)]
    return lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def recorded(call: Attend, tensors: Sequence[Tensor], *changing: Tensor) -> Callable[[], object]:
    """The call as a decoder's recorded step makes it. ValueError unless a replay follows its first tensor's values."""
    with torch.no_grad(), Recorder([*tensors, *changing]) as recorder:
        results = call(*tensors)
    program = recorder.program()
    with torch.no_grad():
        tensors[0].mul_(0.5)
        program.replay()
        for found, expected in zip(results, call(*tensors), strict=True):
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
                raise ValueError("a recorded call gives something else than the call itself")
        tensors[0].mul_(2)
    return program.replay


def _polar(backend: str) -> Attend:
    return partial(_attend_polar, backend)


def _attend_polar(backend: str, *tensors: Tensor, start: Tensor | None = None) -> Sequence[Tensor]:
    return polar_attention(*tensors, start=start, backend=backend)


def _softmax(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Sequence[Tensor]:
    return [softmax_attention(q, k, v, q.shape[-1] ** -0.5, start, backend="reference")]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Sequence[Tensor]:
    """Causal over equal lengths; one query sees every key."""
    grouped = q.shape[1] != k.shape[1]
    return [F.scaled_dot_product_attention(q, k, v, is_causal=start is None, enable_gqa=grouped)]


def _flash(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None = None) -> Sequence[Tensor]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v, start)


def _windows(length: int) -> list[int]:
    return sorted({0, max(0, (length - ROWS) // 2), max(0, length - ROWS)})


def _shown(attend: Attend, start: int | None) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Outputs at the windows of a call on everything."""

    def outputs(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = None if start is None else _starts(tensors[0], start)
        found = attend(*tensors, start=given)
        if start is not None:
            return list(found)
        return [x[:, :, at : at + ROWS] for at in _windows(tensors[0].shape[2]) for x in found]

    return outputs


def _exact(attend: Attend, start: int | None) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The same outputs from calls on each window alone, which the materialised reference has room for."""

    def outputs(tensors: Sequence[Tensor]) -> list[Tensor]:
        q, k, v, *rest = tensors
        if start is not None:
            return list(attend(*tensors, start=_starts(q, start)))
        found = []
        for at in _windows(q.shape[2]):
            seen = slice(0, min(at + ROWS, q.shape[2]))
            window = q[:, :, at : at + ROWS]
            found += attend(window, k[:, :, seen], v[:, :, seen], *rest, start=_starts(q, at))
        return found

    return outputs


def _starts(q: Tensor, at: int) -> Tensor:
    return torch.full((q.shape[0],), at, dtype=torch.int32, device=q.device)


def _probe(plan: Plan, dtype: torch.dtype, device: torch.device, backend: str) -> None:
    """Raises ValueError where the backend does not take this head width or dtype."""
    q = torch.zeros(1, plan.heads, 2, plan.head_width, dtype=dtype, device=device)
    k = q[:, : plan.key_value_heads]
    scalars = [torch.zeros(plan.heads, device=device)] * 4
    evaluate(lambda given: _attend_polar(backend, *given), [q, k, k, *scalars, q[0, :, 0]], False)
