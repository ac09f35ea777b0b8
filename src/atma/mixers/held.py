"""What attention holds of a text: the keys and values of all of it, or of a window; how new ones join them."""

from typing import Any, NamedTuple

from torch import Tensor

from atma.mixers.heads import Attended
from atma.mixers.sinks import SinkState, attended_with_sinks
from atma.mixers.window import WindowState, attended
from atma.ops import paged
from atma.ops.paged.pages import Pages
from atma.ops.polar.held import hold


class GlobalState(NamedTuple):
    """Of a global mixer without a window. Positions live here: `length` (B,) int32 tokens already seen, per row."""

    length: Tensor
    keys: Tensor | Pages  # (B, G, capacity, K)
    values: Tensor | Pages  # (B, G, capacity, K)
    q_tail: Tensor | None  # (B, W − 1, H·K): last inputs of the Canon convolutions, None without Canon
    k_tail: Tensor | None  # (B, W − 1, G·K)
    v_tail: Tensor | None
    memory: Any  # what the memory holds, (B, H, K, K) of the gated-delta memory; None without one

    grows = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 3, "values": 2}  # noqa: RUF012
    """Where in a page of the pool its positions lie: keys (G, K, page), values (G, page, K)."""


class SelectingState(NamedTuple):
    """Of a global mixer of which a selection policy reads: keys and values are in the policy's own cache."""

    length: Tensor
    cache: Any
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any


State = GlobalState | WindowState
WithSinks = State | SinkState


def behind(state: WithSinks | None, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
    """New k and v (B, G, T, K) behind those of a state, as `Attending.attended` tells."""
    if state is None:
        return Attended(k, v, None)
    if isinstance(state, SinkState):
        return attended_with_sinks(state, k, v, in_order)
    if isinstance(state.keys, Pages) and isinstance(state.values, Pages):
        held = paged.hold(state.keys, state.values, k, v, state.length)
    elif isinstance(state, WindowState):
        return attended(state, k, v, in_order)
    else:
        assert isinstance(state.keys, Tensor) and isinstance(state.values, Tensor)
        held = hold(state.keys, state.values, k, v, state.length)
    return Attended(*held, state.length, held)
