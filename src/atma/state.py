"""What a model remembers between calls, and the operations on it, each written once over the tree.

A state is a NamedTuple of tensors and of further states, batch first. It is consumed by the call it is given to:
without gradients it may be overwritten in place, so `fork` it first to keep it. Capacity, the number of keys a state
has room for, is fixed within a call; `grow` widens it outside.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.paged.pages import Pages


class LocalState(NamedTuple):
    """Of a gated convolution: its last inputs (B, W − 1, D)."""

    tail: Tensor


class GlobalState(NamedTuple):
    """Of a global mixer. Positions live here: `length` (B,) int32 tokens already seen, per row."""

    length: Tensor
    keys: Tensor | Pages  # (B, G, capacity, K)
    values: Tensor | Pages  # (B, G, capacity, K)
    q_tail: Tensor | None  # (B, W − 1, H·K): last inputs of the Canon convolutions, None without Canon
    k_tail: Tensor | None  # (B, W − 1, G·K)
    v_tail: Tensor | None
    memory: Tensor | None  # (B, H, K, K) float32 or wider, None without a memory


class ModelState(NamedTuple):
    """Of a whole model: tokens seen per row (B,) int32, and each block's state."""

    length: Tensor
    blocks: tuple[LocalState | GlobalState, ...]


State = LocalState | GlobalState | ModelState
S = TypeVar("S", LocalState, GlobalState, ModelState)

_KINDS = {kind.__name__: kind for kind in (LocalState, GlobalState, ModelState)}
_CAPACITY_FIELDS = ("keys", "values")
_OPTIONAL_FIELDS = ("q_tail", "k_tail", "v_tail", "memory")


def transform(state: S, change: Callable[[str, Tensor], Tensor]) -> S:
    """The same tree with every tensor replaced by `change(field name, tensor)`."""
    return _map(state, "", change)


def fork(state: S) -> S:
    """A copy that shares no memory with the original."""
    return transform(state, lambda _, x: x.clone())


def rows(state: S, index: Tensor | Sequence[int] | slice) -> S:
    """A copy of the chosen rows, in the order given."""
    chosen = torch.as_tensor(index) if isinstance(index, list | tuple) else index
    return transform(state, lambda _, x: x[chosen].clone())


def stack(states: Sequence[S]) -> S:
    """One state of all the states' rows. Capacities must be equal: `grow` the smaller ones first."""
    if not states:
        raise ValueError("stack needs at least one state")
    found = sorted({capacity(state) for state in states})
    if len(found) > 1:
        raise ValueError(f"states to stack must have one capacity, not {found}; grow the smaller ones first")
    flat = [tensors(state) for state in states]
    parts = iter([torch.cat(column) for column in zip(*flat, strict=True)])
    return transform(states[0], lambda _, x: next(parts))


def grow(state: S, size: int) -> S:
    """The same state with room for `size` keys; never fewer than it has."""
    if size < capacity(state):
        raise ValueError(f"cannot shrink a state of capacity {capacity(state)} to {size}")

    def widen(name: str, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, size - x.shape[2])) if name in _CAPACITY_FIELDS else x

    return transform(state, widen)


def capacity(state: State) -> int:
    """Keys the state has room for; 0 for one without attention."""
    if isinstance(state, ModelState):
        return max((capacity(block) for block in state.blocks), default=0)
    if isinstance(state, GlobalState) and isinstance(state.values, Pages):
        return state.values.table.shape[1] * state.values.pool.shape[2]
    return state.keys.shape[2] if isinstance(state, GlobalState) and isinstance(state.keys, Tensor) else 0


def nbytes(state: State) -> int:
    """Bytes held by the state's tensors, spare capacity included."""
    return sum(x.numel() * x.element_size() for x in tensors(state))


def tensors(state: State) -> list[Tensor]:
    """The tensors of the tree, in order."""
    found: list[Tensor] = []
    _map(state, "", lambda _, x: found.append(x) or x)
    return found


def save(state: State, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the state and text metadata to one safetensors file; an old file stays until the new one is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat: dict[str, Tensor] = {}
    shape = _describe(state, "", flat)
    path = Path(path)
    staging = path.with_name(f".{path.name}.new")
    try:
        save_file(flat, str(staging), {"state": json.dumps(shape), **(metadata or {})})
        staging.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from None
    finally:
        staging.unlink(missing_ok=True)


def load(path: str | Path) -> tuple[Any, dict[str, str]]:
    """A saved state and its metadata. ValueError when the file is not one, or is damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such state file")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _rebuild(json.loads(metadata.pop("state")), flat, tuple(_KINDS)), metadata
    except RecursionError:
        raise ValueError(f"{path}: not a saved state, or damaged: nested without end") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a saved state, or damaged: {' '.join(str(error).split())}") from None


def _map(node: Any, name: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    if node is None:
        return None
    if isinstance(node, Tensor):
        return change(name, node)
    if hasattr(node, "_fields"):
        return type(node)(*(_map(part, field, change) for field, part in zip(node._fields, node, strict=True)))
    return tuple(_map(part, name, change) for part in node)


def _describe(node: Any, name: str, flat: dict[str, Tensor]) -> Any:
    """The tree as JSON, each tensor replaced by its name in `flat`."""
    if node is None:
        return None
    if isinstance(node, Tensor):
        flat[name] = node.contiguous()
        return name
    if hasattr(node, "_fields"):
        parts = {f: _describe(part, f"{name}{f}.", flat) for f, part in zip(node._fields, node, strict=True)}
        return {"kind": type(node).__name__, **parts}
    return [_describe(part, f"{name}{i}.", flat) for i, part in enumerate(node)]


def _rebuild(shape: Any, flat: dict[str, Tensor], kinds: tuple[str, ...]) -> Any:
    """The state of one of `kinds` that `_describe` has told of. ValueError: it tells of none."""
    if not isinstance(shape, dict) or shape.get("kind") not in kinds:
        raise ValueError(f"a state of kind {' or '.join(kinds)} is wanted, not {str(shape)[:40]}")
    kind = _KINDS[shape["kind"]]
    if set(shape) != {"kind", *kind._fields}:
        raise ValueError(f"a {kind.__name__} has {', '.join(kind._fields)}, not {str(sorted(shape))[:80]}")
    return kind(*(_field(field, shape[field], flat, field in _OPTIONAL_FIELDS) for field in kind._fields))


def _field(name: str, shape: Any, flat: dict[str, Tensor], optional: bool) -> Any:
    if name == "blocks":
        if not isinstance(shape, list):
            raise ValueError(f"blocks are a list, not {str(shape)[:40]}")
        return tuple(_rebuild(part, flat, (LocalState.__name__, GlobalState.__name__)) for part in shape)
    if shape is None and optional:
        return None
    if not isinstance(shape, str) or shape not in flat:
        raise ValueError(f"'{name}' names no tensor of the file: {str(shape)[:40]}")
    return flat[shape]
