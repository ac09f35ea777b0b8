"""Keys and values that a state holds: new ones are written behind those of each row."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import backend_for, recording

_HOLD = (
    "batch groups tokens row_bytes new_keys new_values held_keys held_values keys values into_keys into_values start"
)


def hold(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """keys and values (B, G, S, K) with k and v (B, G, T, K) from place start (B,) int32 of each row on.

    In place unless gradients are recorded. IndexError when a row has no room.
    """
    k, v = k.to(keys.dtype), v.to(values.dtype)
    if recording() or keys.device.type != "cpu":
        index = start[:, None, None, None] + torch.arange(k.shape[2], device=k.device)[:, None]
        index = index.long().expand_as(k)
        if torch.is_grad_enabled():
            return keys.scatter(2, index, k), values.scatter(2, index, v)
        return keys.scatter_(2, index, k), values.scatter_(2, index, v)
    if not native.logging() and int(start.max()) + k.shape[2] > keys.shape[2]:
        raise IndexError(f"{k.shape[2]} keys after {int(start.max())} pass the {keys.shape[2]} places there are")
    if backend_for("auto", k, "polar") != "native":
        for row in range(len(start)):
            at = int(start[row])  # which a recorder sees and refuses, unlike a list
            keys[row, :, at : at + k.shape[2]], values[row, :, at : at + k.shape[2]] = k[row], v[row]
        return keys, values
    return _hold_native(keys, values, k, v, start)


def _hold_native(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    size = k.element_size()
    strides = [step * size for x in (k, v, keys, values) for step in x.stride()[:3]]
    places = native.addresses(k, v, keys, values, start)
    native.call("hold", None, _HOLD, (*k.shape[:3], k.shape[3] * size, *strides, *places))
    return keys, values
