"""What a model remembers between calls, and the operations on it, each written once over the tree.

A state is a NamedTuple of tensors and of further states, batch first. It is consumed by the call it is given to:
without gradients it may be overwritten in place, so `fork` it first to keep it. States are known by behaviour: a state
class says which of its fields grow with the text (`grows`, a mapping of their names to the axis of tokens), `length` is
the reserved name of a position, and all else is *carried* from token to token. Of what is carried, `slides` names what
holds a window, the token at position p at place p mod its size. Capacity, the number of tokens that growing fields have
room for, is fixed within a call; `grow` widens it outside. Files of states are those of `atma.saved_state`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atma.display import bytes_text, facts_html, facts_text
from atma.ops.paged import Pages
from atma.saved_state import Saved, growing, load, read, save

LENGTH = "length"


class ModelState(NamedTuple):
    """Of a whole model: `length`, tokens seen per row (B,) int32, and `blocks`, each block's state."""

    length: Tensor
    blocks: tuple[Any, ...]

    def __repr__(self) -> str:
        return facts_text(f"ModelState after {_lengths(self)}: {bytes_text(nbytes(self))}", _kept(self))

    def _repr_html_(self) -> str:
        return facts_html(f"ModelState after {_lengths(self)}: {bytes_text(nbytes(self))}", _kept(self))


S = TypeVar("S")


class Leaf(NamedTuple):
    """A tensor of a state: `path`, the names on the way to it, `axis`, that of its tokens (None: it does not grow)."""

    path: tuple[str, ...]
    axis: int | None
    tensor: Any
    """A tensor, or `Pages` in place of one that grows."""
    owner: type
    """The state class that it is a field of."""

    @property
    def name(self) -> str:
        """The field that it is."""
        return self.path[-1] if self.path else ""

    @property
    def slides(self) -> int | None:
        """The axis of the tokens of a window; None where it holds none."""
        return getattr(self.owner, "slides", {}).get(self.name)

    @property
    def carried(self) -> bool:
        """Whether it is neither a position nor grows with the text."""
        return self.axis is None and self.name != LENGTH


def leaves(state: Any) -> Iterator[Leaf]:
    """The leaves of the tree, in order."""
    return _leaves(state, (), None, ModelState)


def replaced(state: S, change: Callable[[Leaf], Any]) -> S:
    """The same tree with every leaf replaced by `change(leaf)`."""
    return _map(state, (), None, ModelState, change)


def transform(state: S, change: Callable[[str, Tensor], Tensor]) -> S:
    """The same tree with every tensor replaced by `change(field name, tensor)`."""
    return replaced(state, lambda leaf: _in_pages(leaf.tensor, lambda x: change(leaf.name, x)))


def fork(state: S) -> S:
    """A copy that shares no memory with the original."""
    return transform(state, lambda _, x: x.clone())


def branch(state: S) -> S:
    """A copy of all but what grows, which stays the original's: the branch writes behind the original's text.

    The original goes on as if nothing had been written: what is behind its length is never seen, and written over.
    """
    return replaced(state, lambda leaf: leaf.tensor if leaf.axis is not None else leaf.tensor.clone())


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
    """The same state with room for `size` tokens in what grows; never fewer than it has."""
    if size < capacity(state):
        raise ValueError(f"cannot shrink a state of capacity {capacity(state)} to {size}")
    return replaced(state, lambda leaf: leaf.tensor if leaf.axis is None else _widened(leaf.tensor, leaf.axis, size))


def capacity(state: Any) -> int:
    """Tokens that the growing fields have room for; 0 for a state without any, which has room for every text."""
    return max((_room(leaf) for leaf in leaves(state) if leaf.axis is not None), default=0)


def nbytes(state: Any) -> int:
    """Bytes held by the state's tensors, spare capacity included."""
    return sum(x.numel() * x.element_size() for x in tensors(state))


def tensors(state: Any) -> list[Tensor]:
    """The tensors of the tree, in order."""
    found: list[Tensor] = []
    transform(state, lambda _, x: found.append(x) or x)
    return found


def _lengths(state: ModelState) -> str:
    """How many tokens each row has read, in words."""
    if isinstance(state.length, Pages) or state.length.is_meta or state.length.ndim == 0:
        return "some tokens"
    read = state.length.tolist()
    told = f"{min(read):,}" if min(read) == max(read) else f"{min(read):,} to {max(read):,}"
    return f"{told} tokens" + (f" in each of {len(read):,} rows" if len(read) > 1 else "")


def _kept(state: ModelState) -> dict[str, str]:
    """What is held, by kind: how many tensors, of which fields, and their bytes."""
    kinds: dict[str, list[Leaf]] = {}
    for leaf in leaves(state.blocks):
        grows = f"grows with the text (room for {capacity(state):,} tokens)"
        kind = (
            grows if leaf.axis is not None else "windows" if leaf.slides is not None else "carried, whatever the length"
        )
        kinds.setdefault(kind if leaf.carried or leaf.axis is not None else "positions", []).append(leaf)
    return {
        kind: f"{bytes_text(sum(_bytes(one) for one in found))} in {len(found)} tensors "
        f"({', '.join(dict.fromkeys(one.name for one in found))})"
        for kind, found in kinds.items()
    }


def _bytes(leaf: Leaf) -> int:
    x = leaf.tensor.pool if isinstance(leaf.tensor, Pages) else leaf.tensor
    return x.numel() * x.element_size()


def _leaf(path: tuple[str, ...], axis: int | None, x: Any, owner: type) -> Leaf:
    """Its axis counted from the first."""
    return Leaf(path, axis % x.ndim if axis is not None and axis < 0 and x.ndim else axis, x, owner)


def _is_tree(node: Any) -> bool:
    return hasattr(node, "_fields") and not isinstance(node, Pages)


def _leaves(node: Any, path: tuple[str, ...], axis: int | None, owner: type) -> Iterator[Leaf]:
    if node is None:
        return
    if not isinstance(node, tuple) or isinstance(node, Pages):
        yield _leaf(path, axis, node, owner)
        return
    names = node._fields if _is_tree(node) else [str(i) for i in range(len(node))]  # pyright: ignore
    kind = type(node) if _is_tree(node) else owner
    for name, part in zip(names, node, strict=True):
        yield from _leaves(part, (*path, name), growing(kind).get(name), kind)


def _map(node: Any, path: tuple[str, ...], axis: int | None, owner: type, change: Callable[[Leaf], Any]) -> Any:
    if node is None:
        return None
    if not isinstance(node, tuple) or isinstance(node, Pages):
        return change(_leaf(path, axis, node, owner))
    if not _is_tree(node):
        return tuple(_map(part, (*path, str(i)), axis, owner, change) for i, part in enumerate(node))
    kind = type(node)
    parts = zip(node._fields, node, strict=True)  # pyright: ignore
    return kind(*(_map(part, (*path, name), growing(kind).get(name), kind, change) for name, part in parts))


def _in_pages(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor changed, or those of pages."""
    return x._replace(pool=change(x.pool), table=change(x.table)) if isinstance(x, Pages) else change(x)


def _room(leaf: Leaf) -> int:
    return leaf.tensor.capacity if isinstance(leaf.tensor, Pages) else leaf.tensor.shape[leaf.axis]


def _widened(x: Tensor, axis: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)


__all__ = [
    "Leaf",
    "ModelState",
    "Saved",
    "branch",
    "capacity",
    "fork",
    "grow",
    "leaves",
    "load",
    "nbytes",
    "read",
    "replaced",
    "rows",
    "save",
    "stack",
    "tensors",
    "transform",
]
