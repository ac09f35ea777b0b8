"""What the public functions refuse: arguments whose shapes or values do not fit, each by its name, with the mend."""

import torch
from torch import Tensor

from atma.ops.backend import check_indices, check_tensors
from atma.ops.fast_weights.kernel import Kernel, KernelState
from atma.ops.fast_weights.rule import HUBERS, RENORMS, Gates, Memory
from atma.ops.fast_weights.state import MemoryState, shapes
from atma.ops.native import logging

Shape = tuple[int, ...]


def check(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Memory, state: MemoryState | None, segment_ids: Tensor | None
) -> None:
    """ValueError unless the arguments of `fast_weights` fit together."""
    check_tensors("q k v step keep momentum delta omega", q, k, v, *gates)
    slow = " ".join(f"initial[{i}]" for i in range(len(memory.initial)))
    check_tensors(f"q {slow} gain shift skip", q, *memory.initial, memory.gain, memory.shift, memory.skip)
    _check_tokens(q, k, v)
    _check_slow(memory, q.shape[1], q.shape[3], v.shape[3])
    _check_gates(gates, memory, (*q.shape[:3],), v.shape[3])
    _check_documents(q, state, segment_ids)
    if state is not None:
        _check_state(state, memory, q)
    if _looking(q):
        _check_values(gates.keep, memory)


def check_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    memory: Kernel,
    state: KernelState | None,
    segment_ids: Tensor | None,
) -> None:
    """ValueError unless the arguments of `kernel_memory` fit together."""
    check_tensors("q k v omega sharpness", q, k, v, omega, memory.sharpness)
    _check_tokens(q, k, v)
    if memory.rule not in ("add", "delta"):
        raise ValueError(f"rule must be 'add' or 'delta', not {memory.rule!r}")
    if memory.window < 1:
        raise ValueError(f"window must be at least 1, not {memory.window}")
    batch, heads, length, width = q.shape
    _shaped("omega", omega, (batch, heads, length, memory.window), "one for each token of the window")
    _shaped("sharpness", memory.sharpness, (heads,), "one for each head")
    _check_documents(q, state, segment_ids)
    if state is None:
        return
    room, tail = state.keys.shape[2], memory.window - 1
    wanted = {"length": (batch,), "keys": (batch, heads, room, width), "written": (batch, heads, room, v.shape[3])}
    wanted |= dict.fromkeys(("v_tail", "open"), (batch, heads, tail, v.shape[3])) if tail else {}
    for name, x in state._asdict().items():
        _shaped(f"state.{name}", x, wanted.get(name), "as the memory has it")
        if name != "length" and x is not None:
            check_tensors(f"q state.{name}", q, x)
    check_indices("state.length", state.length, (batch,), q.device)
    if not _looking(q):
        return
    least, most = (int(x) for x in state.length.aminmax())
    if least < 0 or most + length > room:
        told = f"{length} tokens behind {most if least >= 0 else least}"
        raise ValueError(f"{told} do not fit a state with room for {room}; grow it first")


def _check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"{found} must be (B, H, T, K), (B, G, T, K) and (B, G', T, V), none of them 0")
    fits = q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2:] == k.shape[2:] and v.shape[2] == q.shape[2]
    if not fits or q.shape[1] % k.shape[1] != 0 or q.shape[1] % v.shape[1] != 0:
        raise ValueError(f"{found} do not fit together")


def _check_slow(memory: Memory, heads: int, inner: int, width: int) -> None:
    """W⁰, gain and shift, and J."""
    rule, count = memory.rule, memory.rule.matrices
    if len(memory.initial) != count:
        raise ValueError(f"initial must be {count} matrices for network = {rule.network!r}, not {len(memory.initial)}")
    hidden = inner if count == 1 else memory.initial[0].shape[-1]
    for i, w in enumerate(memory.initial):
        wanted = (heads, hidden, inner) if i else (heads, width, hidden)
        _shaped(f"initial[{i}]", w, wanted, "(H, V, E) first, then (H, E, K), or (H, V, K) of a matrix alone")
    for name, x in (("gain", memory.gain), ("shift", memory.shift)):
        _shaped(name, x, (heads, width) if rule.norm else None, "given where norm = true, else None")
    skip = (heads, width, inner) if rule.residual == "skip" else None
    _shaped("skip", memory.skip, skip, 'given for residual = "skip", else None')
    for option, value in (("residual", "identity"), ("gates", "channel")):
        if getattr(rule, option) == value and inner != width:
            raise ValueError(f"{option} = {value!r} needs keys as wide as values, not {inner} and {width}")


def _check_gates(gates: Gates, memory: Memory, tokens: Shape, width: int) -> None:
    rule = memory.rule
    each = (*tokens, width) if rule.gates == "channel" else tokens
    _shaped("step", gates.step, (*tokens, rule.matrices) if rule.gates == "matrix" else each, f"for {rule.gates} gates")
    if rule.average or gates.keep is not None:
        _shaped("keep", gates.keep, None if rule.average else each, f"for {rule.gates} gates, and None with average")
    momentum = None if rule.optimiser == "gd" else each
    _shaped("momentum", gates.momentum, momentum, f"for optimiser = {rule.optimiser!r} and {rule.gates} gates")
    delta = tokens if rule.bias in HUBERS else None
    by_channel = rule.bias == "huber_coordinate" and gates.delta is not None and gates.delta.ndim == 4
    _shaped("delta", gates.delta, (*tokens, width) if by_channel else delta, f"for bias = {rule.bias!r}")
    omega = (*tokens, rule.window) if rule.window > 1 else None
    _shaped("omega", gates.omega, omega, f"for window = {rule.window}")


def _check_documents(q: Tensor, state: MemoryState | KernelState | None, segment_ids: Tensor | None) -> None:
    if state is not None and segment_ids is not None:
        raise ValueError("segment_ids marks packed documents in training; a call with a state continues one document")
    check_indices("segment_ids", segment_ids, (q.shape[0], q.shape[2]), q.device)


def _check_state(state: MemoryState, memory: Memory, q: Tensor) -> None:
    wanted = shapes(memory, q.shape[0])
    for name, value in state._asdict().items():
        parts = value if isinstance(value, tuple) or value is None else (value,)
        found, needed = None if parts is None else [tuple(x.shape) for x in parts], wanted.get(name)
        if found != needed:
            raise ValueError(f"state.{name} must be {needed} for this rule, not {found}; begin with empty(memory, B)")
        if name != "length" and parts is not None:
            check_tensors("q" + f" state.{name}" * len(parts), q, *parts)
    check_indices("state.length", state.length, (q.shape[0],), q.device)


def _shaped(name: str, x: Tensor | None, wanted: Shape | None, why: str) -> None:
    found = None if x is None else tuple(x.shape)
    if found != wanted:
        raise ValueError(f"{name} must be {wanted}, {why}, not {found}")


def _looking(q: Tensor) -> bool:
    """Whether values are looked at: on the CPU, where it costs little, and not in a step that is recorded."""
    return q.device.type == "cpu" and not torch.compiler.is_compiling() and not logging()


def _check_values(keep: Tensor | None, memory: Memory) -> None:
    if keep is not None:
        least, most = keep.detach().aminmax()
        if bool(least < 0) or bool(most > 1):
            raise ValueError(f"keep must be from 0 to 1, found {float(least if least < 0 else most):g}")
    rule = memory.rule
    axes = {"lq": (-2, -1), **dict.fromkeys(RENORMS, (-1,))}.get(rule.retention)
    for i, w in enumerate(memory.initial if axes else ()):
        if not bool((w.detach() != 0).flatten(-len(axes or ())).any(-1).all()):
            part = "head" if rule.retention == "lq" else "row"
            why = f"for retention = {rule.retention!r}, which takes its norm"
            raise ValueError(f"initial[{i}] must have no {part} of zeros {why}")
