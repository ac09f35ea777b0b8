"""How PyTorch's operations that move numbers, and compute none, are recorded: joining, padding, and computed indices.

The kernels are given what those of `operations` are.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atma.ops.native.strided import Index, Unrecordable, indexed, pointwise

if TYPE_CHECKING:
    from atma.ops.native.recorder import Recorder

aten = torch.ops.aten


def _joined(_: "Recorder", y: Tensor, parts: list[Tensor], dim: int = 0) -> None:
    at = 0
    for part in parts:
        if part.numel():
            pointwise("copy", y.narrow(dim, at, part.shape[dim]), part)
            at += part.shape[dim]


def _stacked(_: "Recorder", y: Tensor, parts: list[Tensor], dim: int = 0) -> None:
    for i, part in enumerate(parts):
        pointwise("copy", y.select(dim, i), part)


def _padded(_: "Recorder", y: Tensor, x: Tensor, pads: list[int], value: float) -> None:
    if min(pads) < 0:
        raise Unrecordable("padding by less than nothing has no compiled kernel")
    pointwise("copy", y, value)
    for i, before in enumerate(pads[::2]):
        y = y.narrow(-1 - i, before, x.shape[-1 - i])
    pointwise("copy", y, x)


def _rolled(_: "Recorder", y: Tensor, x: Tensor, shifts: list[int], dims: list[int]) -> None:
    if len(shifts) != 1 or len(dims) != 1 or not x.numel():
        raise Unrecordable("rolling other than along one dimension has no compiled kernel")
    [dim], size = dims, x.shape[dims[0]]
    at = shifts[0] % size
    pointwise("copy", y.narrow(dim, at, size - at), x.narrow(dim, 0, size - at))
    pointwise("copy", y.narrow(dim, 0, at), x.narrow(dim, size - at, at))


def _repeated(_: "Recorder", y: Tensor, x: Tensor, times: list[int]) -> None:
    sizes = [1] * (len(times) - x.ndim) + list(x.shape)
    both = [n for pair in zip(times, sizes, strict=True) for n in pair]
    pointwise("copy", y.view(both), x.view([n for size in sizes for n in (1, size)]))


def _along_dimension(x: Tensor, dim: int, numbers: Tensor, negative: bool) -> tuple[list[int], list[Index]]:
    """The strides of x beside `dim`, and the index of that."""
    dim = dim % x.ndim
    index = Index(numbers, x.shape[dim], x.stride(dim), negative)
    return [0 if d == dim else step for d, step in enumerate(x.stride())], [index]


def _gather(_: "Recorder", y: Tensor, x: Tensor, dim: int, index: Tensor, *__: Any) -> None:
    indexed(y, x, *_along_dimension(x, dim, index, False))


def _scatter(recorder: "Recorder", y: Tensor, x: Tensor, dim: int, index: Tensor, source: Any) -> None:
    _unless_in_place(y, x)
    if isinstance(source, Tensor):
        source = source.as_strided(index.shape, source.stride())
    else:
        source = recorder.constant(torch.full((), source, dtype=y.dtype)).expand(index.shape)
    indexed(source, y, *_along_dimension(y, dim, index, False), write=True)


def _line(index: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """One number for each place along a dimension, as large as `shape`."""
    return index.view([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


def _select(_: "Recorder", y: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    indexed(y, x, *_along_dimension(x, dim, _line(index, dim, y.shape), False))


def _index_copy(_: "Recorder", y: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    _unless_in_place(y, x)
    indexed(source, y, *_along_dimension(y, dim, _line(index, dim, source.shape), False), write=True)


def _embedding(_: "Recorder", y: Tensor, table: Tensor, index: Tensor, *__: Any) -> None:
    steps = [0] * index.ndim + [table.stride(1)]
    numbers = index.unsqueeze(-1).expand(y.shape)
    indexed(y, table, steps, [Index(numbers, table.shape[0], table.stride(0), False)])


def _index(_: "Recorder", y: Tensor, x: Tensor, indices: list[Tensor | None]) -> None:
    indexed(y, x, *_placed(x, indices)[1:])


def _index_put(_: "Recorder", y: Tensor, x: Tensor, indices: list[Tensor | None], values: Tensor, add: bool) -> None:
    [first, *others] = indices
    if add:
        raise Unrecordable("adding at indices has no compiled kernel")
    if first is not None and first.dtype == torch.bool and first.shape == x.shape and not others and not values.ndim:
        return pointwise("where", y, first, values, x)
    _unless_in_place(y, x)
    shape, steps, found = _placed(y, indices)
    return indexed(values.expand(shape), y, steps, found, write=True)


def _placed(x: Tensor, indices: list[Tensor | None]) -> tuple[list[int], list[int], list[Index]]:
    """The shape of x[indices], x's strides along it, and the indices as large as it."""
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in given):
        raise Unrecordable("an index by a mask has no compiled kernel")
    common = torch.broadcast_shapes(*(index.shape for _, index in given))
    chosen = [d for d, _ in given]
    rest = [d for d in range(x.ndim) if d not in chosen]
    together = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    before = [d for d in rest if together and d < chosen[0]]
    after = [d for d in rest if d not in before]
    shape = [*(x.shape[d] for d in before), *common, *(x.shape[d] for d in after)]
    steps = [*(x.stride(d) for d in before), *([0] * len(common)), *(x.stride(d) for d in after)]
    wide = [index.expand(common)[(..., *[None] * len(after))].expand(shape) for _, index in given]
    return shape, steps, [Index(w, x.shape[d], x.stride(d)) for d, w in zip(chosen, wide, strict=True)]


def _unless_in_place(y: Tensor, x: Tensor) -> None:
    if y.data_ptr() != x.data_ptr():
        pointwise("copy", y, x)


def _copied(_: "Recorder", y: Tensor, x: Tensor, *__: Any) -> None:
    pointwise("copy", y, x)


def _filled(_: "Recorder", y: Tensor, x: Tensor, value: Any = 0.0, *__: Any) -> None:
    pointwise("copy", y, value)


KERNELS: dict[Any, Callable[..., None]] = {
    aten.clone.default: _copied,
    aten._to_copy.default: _copied,
    aten.copy.default: lambda _, y, x, source, *__: pointwise("copy", y, source),
    aten.fill.Scalar: _filled,
    aten.fill.Tensor: _filled,
    aten.zero.default: _filled,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.constant_pad_nd.default: _padded,
    aten.roll.default: _rolled,
    aten.repeat.default: _repeated,
    aten.gather.default: _gather,
    aten.scatter.src: _scatter,
    aten.scatter.value: _scatter,
    aten.index_select.default: _select,
    aten.index_copy.default: _index_copy,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.embedding.default: _embedding,
}
