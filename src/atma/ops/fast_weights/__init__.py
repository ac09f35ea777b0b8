"""Neural memories: a small network whose weights every token writes, and memories of all keys read through a kernel."""

from typing import TypeVar, cast

import torch
from torch import Tensor

from atma.ops.backend import backend_for, implementation, own_precision, require_steady
from atma.ops.fast_weights.checks import check, check_kernel
from atma.ops.fast_weights.kernel import Kernel, KernelState, empty_kernel
from atma.ops.fast_weights.newton_schulz import newton_schulz
from atma.ops.fast_weights.rule import Gates, Memory, Rule
from atma.ops.fast_weights.state import MemoryState, empty

R = TypeVar("R")


@own_precision
def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    steady: bool = False,
) -> tuple[Tensor, MemoryState]:
    """Step the weights of f by each token's inner gradient at (k, v), then read f(W; q) (mixers.md, section 4).

    q (B, H, T, K′) and k (B, G, T, K′) behind the feature map, v (B, G', T, V) as it is to be stored, H a multiple of G
    and of G'. The shapes of gates and slow weights are told at `Gates` and `Memory`, what is computed at `Rule`.
    state: before the first token, `empty(memory, B)` if None; its rows may stand at different places of the grid. It is
    consumed: without gradients it may be overwritten.
    segment_ids (B, T), only without a state: memory and grid begin again at each document's first token.
    steady: each token by itself, in turn: the same bits however the text is cut into calls and whatever rows are beside
    it, by the native backend alone, and without gradients.
    Returns what is read (B, H, T, V) in q's dtype and the state after the last token, float32 or wider; gradients are
    exact and reach everything. ValueError: shapes that do not fit the rule, and on the CPU a γ outside [0, 1], or a
    W⁰ of zeros where its norm is taken.
    """
    check(q, k, v, gates, memory, state, segment_ids)
    work = torch.promote_types(q.dtype, torch.float32)
    gates, memory = _to(gates, work), _to(memory, work)
    held = empty(memory, q.shape[0]) if state is None else _to(state, work)
    chosen = backend_for(backend, q, "fast_weights")
    module, tokens = implementation("fast_weights", chosen), (q.to(work), k.to(work), v.to(work))
    if steady:
        require_steady(chosen, segment_ids)
        read, after = module.in_turn(*tokens, gates, memory, held)
    else:
        read, after = module.fast_weights(*tokens, gates, memory, held, segment_ids)
    return read.to(q.dtype), after


@own_precision
def kernel_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor,
    memory: Kernel,
    state: KernelState | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    steady: bool = False,
) -> tuple[Tensor, KernelState]:
    """Write at each of the last c keys, then read Σ u_i exp(s (q·k_i − 1)) (mixers.md, section 4.7).

    q (B, H, T, K) and k (B, G, T, K) of length 1, v (B, G', T, V), H a multiple of G and of G'; omega (B, H, T, c), the
    token's own first. state: None for `empty_kernel` with room for T tokens. It is consumed: without gradients it may
    be overwritten, with them it is left as it is.
    segment_ids (B, T), only without a state: the memory is empty at each document's first token.
    steady: as of `fast_weights`.
    Returns what is read (B, H, T, V) in q's dtype and the state after the last token, float32 or wider. ValueError:
    shapes that do not fit, and on the CPU more tokens than the state has room for.
    """
    check_kernel(q, k, v, omega, memory, state, segment_ids)
    work = torch.promote_types(q.dtype, torch.float32)
    memory = memory._replace(sharpness=memory.sharpness.to(work))
    widths = k.shape[3], v.shape[3]
    held = empty_kernel(memory, q.shape[0], q.shape[2], widths) if state is None else _to(state, work)
    chosen = backend_for(backend, q, "fast_weights")
    module, tokens = implementation("fast_weights", chosen), [x.to(work) for x in (q, k, v, omega)]
    if steady:
        require_steady(chosen, segment_ids)
        read, after = module.kernel_in_turn(*tokens, memory, held)
    else:
        read, after = module.kernel_memory(*tokens, memory, held, segment_ids)
    return read.to(q.dtype), after


def _to(record: R, dtype: torch.dtype) -> R:
    """A record of tensors, and of tuples of them, in another dtype; whole numbers as they are."""
    if not isinstance(record, tuple):
        floating = isinstance(record, Tensor) and record.is_floating_point()
        return cast(R, cast(Tensor, record).to(dtype)) if floating else record
    parts = [_to(part, dtype) for part in record]
    return cast(R, type(record)(*parts) if hasattr(record, "_fields") else tuple(parts))


__all__ = [
    "Gates",
    "Kernel",
    "KernelState",
    "Memory",
    "MemoryState",
    "Rule",
    "empty",
    "empty_kernel",
    "fast_weights",
    "kernel_memory",
    "newton_schulz",
]
