"""The neural memory by compiled kernels, on the CPU: in turn (memory.cpp, kernel_memory.cpp), in chunks (anchored.py).

In turn a token's step reads and writes each matrix once, in place, and a head's matrices stay in the cache from one
token to the next: that takes less time than chunks (cpu.py). Those compute what a gradient is taken of, packed
documents, and long texts of windows and of writes at chunk ends.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.fast_weights import cpu
from atma.ops.fast_weights.anchored import anchored
from atma.ops.fast_weights.kernel import Kernel, KernelState
from atma.ops.fast_weights.rule import Gates, Memory, Rule
from atma.ops.fast_weights.state import MemoryState

# As the enumerations of ops/native/memory.h.
_ACTIVATIONS = ("gelu", "silu")
_RESIDUALS = ("none", "identity", "skip")
_BIASES = ("dot", "l2", "lp", "huber", "huber_coordinate", "huber_switch")
_RETENTIONS = ("l2", "lq", "kl", "renorm", "renorm_after_read")
_OPTIMISERS = ("gd", "momentum", "muon")
_AXES = ("head", "channel", "matrix")
_SCHEDULES = ("muon", "lact")
FEW_TOKENS = 4
"""Of any rule: in chunks, one call takes as long as so many steps."""
_FIELDS = (
    "activation residual norm bias retention to_initial optimiser schedule anchor_hidden normalised average at_end "
    "chunk window gates power norm_power radius batch heads tokens inner k_groups v_groups value hidden matrices "
    "delta_width threads q k v step keep momentum delta omega initial gain shift skip length anchors weights "
    "momenta scale k_tail v_tail pending pending_momentum pending_keep pending_step out"
)

_KERNEL_FIELDS = (
    "batch heads tokens width value k_groups v_groups window room delta normalise threads q k v omega sharpness length "
    "keys written v_tail open out"
)


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Arguments and results of the reference. Without gradients the state may be overwritten."""
    if recording() or segment_ids is not None or not (q.shape[2] <= FEW_TOKENS or _is_quick(memory.rule)):
        return cpu.in_chunks(anchored, (q, k, v, gates), memory, state, segment_ids)
    return in_turn(q, k, v, gates, memory, state)


def _is_quick(rule: Rule) -> bool:
    """Whether tokens in turn take less time than chunks do: where the gradient is of one token, and with Newton–Schulz,
    which every token has of its own in chunks too."""
    return rule.granularity == "token" and (rule.window == 1 or rule.optimiser == "muon")


def in_turn(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Memory, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """Each token by itself: what one gives depends on nothing else in the call. The state is overwritten. Inference
    only."""
    tokens, slow = _laid((q, k, v, *gates)), _laid((*_three(memory.initial), *memory[2:]))
    state, lengths = MemoryState(*map(_own, state)), state.length.int().contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    places = native.addresses(*tokens, *slow, lengths, *_parts(state), out)
    values = (*_numbers(memory.rule), *_sizes(q, k, v, gates, memory), *places)
    native.call("memory_in_turn", q.dtype, _FIELDS, values)
    return out, state._replace(length=state.length + q.shape[2])


def kernel_memory(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState, segment_ids: Tensor | None
) -> tuple[Tensor, KernelState]:
    """Arguments and results of the reference. Without gradients a state is overwritten; a text of any length takes less
    time in turn than in blocks."""
    if recording() or segment_ids is not None:
        return cpu.kernel_memory(q, k, v, omega, memory, state, segment_ids)
    return kernel_in_turn(q, k, v, omega, memory, state)


def kernel_in_turn(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState
) -> tuple[Tensor, KernelState]:
    """Each token by itself, written where it lies. The state is overwritten. Inference only."""
    tokens, lengths = _laid((q, k, v, omega, memory.sharpness)), state.length.int().contiguous()
    state = KernelState(state.length, *map(_own, state[1:]))  # pyright: ignore[reportArgumentType]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    groups, rule = (k.shape[1], v.shape[1]), (memory.rule == "delta", memory.normalise)
    sizes = (*q.shape, v.shape[3], *groups, memory.window, state.keys.shape[2], *rule, torch.get_num_threads())
    places = native.addresses(*tokens, lengths, *state[1:], out)  # pyright: ignore[reportArgumentType]
    native.call("kernel_memory_in_turn", q.dtype, _KERNEL_FIELDS, (*sizes, *places))
    return out, state._replace(length=state.length + q.shape[2])


def _parts(state: MemoryState) -> list[Tensor | None]:
    """All but the length, three of each kind of matrix."""
    anchor, weights, momentum, pending = map(_three, (state.anchor, state.weights, state.momentum, state.pending))
    kept = state.scale, state.k_tail, state.v_tail
    return [*anchor, *weights, *momentum, *kept, *pending, *state[8:]]  # pyright: ignore[reportReturnType]


def _numbers(rule: Rule) -> tuple[int | float, ...]:
    """The rule, up to `radius`."""
    return (
        _ACTIVATIONS.index(rule.activation),
        _RESIDUALS.index(rule.residual),
        rule.norm,
        _BIASES.index(rule.bias),
        _RETENTIONS.index(rule.retention),
        rule.decay_to == "initial",
        _OPTIMISERS.index(rule.optimiser),
        _SCHEDULES.index(rule.schedule),
        rule.anchor == "hidden",
        rule.normalised,
        rule.average,
        rule.granularity == "chunk",
        rule.chunk,
        rule.window,
        _AXES.index(rule.gates),
        rule.p,
        rule.q,
        rule.radius,
    )


def _sizes(q: Tensor, k: Tensor, v: Tensor, gates: Gates, memory: Memory) -> tuple[int, ...]:
    """From `batch` to `threads`."""
    hidden, delta = memory.initial[0].shape[2], gates.delta
    wide = 1 if delta is None or delta.ndim == 3 else delta.shape[3]
    groups = k.shape[1], v.shape[1]
    return (*q.shape, *groups, v.shape[3], hidden, memory.rule.matrices, wide, torch.get_num_threads())


def _three(matrices: tuple[Tensor, ...] | None) -> tuple[Tensor | None, ...]:
    return (*(matrices or ()), *[None] * (3 - len(matrices or ())))


def _laid(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _own(part: Any) -> Any:
    """A part of a state as it may be written: each tensor in one piece, and a copy of what a gradient may want."""
    if isinstance(part, Tensor):
        return part.detach().clone() if part.requires_grad else part.contiguous()
    return part if part is None else tuple(map(_own, part))


__all__ = ["fast_weights", "in_turn", "kernel_in_turn", "kernel_memory"]
