"""Calls of the kernels that stand for PyTorch's own operations in a recording, on tensors of any strides.

`pointwise` and `along` are in plain.cpp, `product` in product.cpp, `indexed` in step.cpp; each function fills the
struct of its name, and refuses what that cannot say by `Unrecordable`.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops import native

RANK, INDICES = 4, 3
TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.bool: 5,
}
_OF_ONE = (
    *("copy", "abs", "floor", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log1p", "tanh", "cos", "sin", "erf"),
    *("sigmoid", "log_sigmoid", "silu", "gelu", "softplus", "elu"),
)
_OF_TWO = ("add", "sub", "mul", "div", "power", "remainder", "floor_divide", "minimum", "maximum")
_OF_INTEGERS = ("copy", "abs", "add", "sub", "mul", "remainder", "floor_divide", "minimum", "maximum", "where")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
OPERATIONS = {name: number for number, name in enumerate((*_OF_ONE, *_OF_TWO, *COMPARISONS, "where"))}
"""As Operation of plain.cpp."""
FORMS = {
    name: number
    for number, name in enumerate(
        ("sum", "mean", "largest", "smallest", "length", "logsumexp", "cumsum", "softmax", "log_softmax")
    )
}
"""As Form of plain.cpp."""


class Unrecordable(Exception):
    """An operation that has no kernel to replay it."""


class Index(NamedTuple):
    """Where along one dimension of a table: `numbers` as large as the dense tensor, for a dimension so long and with
    such a stride; `negative` ones count from its end, or are wrong."""

    numbers: Tensor
    size: int
    stride: int
    negative: bool = True


def pointwise(form: str, y: Tensor, a: Tensor | float, b: Tensor | float = 0.0, c: Tensor | float = 0.0) -> None:
    """y = form(a, b, c), all broadcast to y."""
    if not y.numel():
        return
    if any(step == 0 and size > 1 for size, step in zip(y.shape, y.stride(), strict=True)):
        raise Unrecordable("writing to a tensor whose numbers share memory has no compiled kernel")
    work = _work(form, y, a, b)
    if work == TYPES[torch.int64] and form not in (*_OF_INTEGERS, *COMPARISONS):
        raise Unrecordable(f"the {form} of integers has no compiled kernel")
    operands = [y, *(x.expand(y.shape) if isinstance(x, Tensor) else x for x in (a, b, c))]
    sizes, strides = _merged(y.shape, [_strides(x) for x in operands])
    packed = [part for x, steps in zip(operands, strides, strict=True) for part in _operand(x, steps)]
    native.call("pointwise", None, "operation work sizes y a b c", (OPERATIONS[form], work, *sizes, *packed))


def along(form: str, y: Tensor, x: Tensor, dim: int) -> None:
    """y = form(x) along a dimension, which y has too, of size 1 where it becomes one number."""
    if not y.numel():
        return
    if not x.numel():
        raise Unrecordable(f"the {form} of nothing has no compiled kernel")
    x, y = x.movedim(dim, -1), y.movedim(dim, -1)
    rows, (of_y, of_x) = _merged(x.shape[:-1], [_strides(y)[:-1], _strides(x)[:-1]], RANK - 1)
    operands = [*_operand(y, [*of_y, _strides(y)[-1]]), *_operand(x, [*of_x, _strides(x)[-1]])]
    work = _kind(y.dtype)
    values = (FORMS[form], work, *rows, x.shape[-1], *operands, torch.get_num_threads())
    native.call("along", None, "form work sizes y x threads", values)


def product(y: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None) -> None:
    """y (n, rows, columns) = add + a (n, rows, depth) · b (n, depth, columns), each broadcast to that."""
    if not y.numel():
        return
    if {y.dtype, a.dtype, b.dtype, y.dtype if add is None else add.dtype} != {y.dtype} or y.dtype not in native.DTYPES:
        raise Unrecordable(f"a product of {a.dtype} and {b.dtype} has no compiled kernel")
    add = None if add is None else add.expand(y.shape)
    strides = [*y.stride(), *a.stride(), *b.stride(), *((0, 0, 0) if add is None else add.stride())]
    fields = "batch rows columns depth y_strides a_strides b_strides add_strides y a b add threads"
    values = (*y.shape, a.shape[2], *strides, *native.addresses(y, a, b, add), torch.get_num_threads())
    native.call("product", y.dtype, fields, values)


def indexed(dense: Tensor, table: Tensor, steps: Sequence[int], indices: Sequence[Index], write: bool = False) -> None:
    """dense[…] = table[…], or with `write` the other way. `steps`: the table's strides along dense's dimensions, 0 for
    those that an index says. IndexError: one is beyond the table now; later, the replay raises it."""
    if not dense.numel():
        return
    if dense.dtype != table.dtype or len(indices) > INDICES or not {x.numbers.dtype for x in indices} <= _INDEX_TYPES:
        raise Unrecordable(f"more than {INDICES} indices, or numbers to convert, have no compiled kernel")
    for x in indices:
        low, high = int(x.numbers.min()), int(x.numbers.max())
        if high >= x.size or low < (-x.size if x.negative else 0):
            raise IndexError(f"indices from {low} to {high} pass a dimension of size {x.size}")
    item = dense.element_size()
    strides = [_strides(dense), [step * item for step in steps], *(_strides(x.numbers) for x in indices)]
    sizes, (of_dense, of_table, *of_indices) = _merged(dense.shape, strides)
    packed = [part for x, own in zip(indices, of_indices, strict=True) for part in _index(x, item, own)]
    packed += [0] * (INDICES - len(indices)) * (5 + RANK)
    fields = "write item sizes dense_strides table_strides dense table indices"
    places = native.addresses(dense, table)
    native.call("indexed", None, fields, (int(write), item, *sizes, *of_dense, *of_table, *places, *packed))


_INDEX_TYPES = {torch.int32, torch.int64}


def _index(x: Index, item: int, strides: list[int]) -> list[int]:
    """An Index of step.cpp."""
    lowest = -x.size if x.negative else 0
    wide = int(x.numbers.dtype == torch.int64)
    return [x.numbers.data_ptr(), wide, lowest, x.size, x.stride * item, *strides]


def _work(form: str, y: Tensor, a: Tensor | float, b: Tensor | float) -> int:
    """The Type to compute in: of the result, or of what is compared; from float64 to a lower precision through that."""
    if form in COMPARISONS:
        return _kind(torch.result_type(a, b))
    if form == "copy" and isinstance(a, Tensor) and a.dtype == torch.float64 and y.dtype.is_floating_point:
        return TYPES[torch.float64]
    if form == "copy" and y.dtype == torch.bool and isinstance(a, Tensor):
        return _kind(a.dtype)
    return _kind(y.dtype)


def _kind(dtype: torch.dtype) -> int:
    if dtype == torch.float64:
        return TYPES[torch.float64]
    return TYPES[torch.float32 if dtype.is_floating_point else torch.int64]


def _strides(x: Tensor | float) -> list[int]:
    """In bytes; of a number none."""
    return [step * x.element_size() for step in x.stride()] if isinstance(x, Tensor) else []


def _merged(shape: Sequence[int], strides: list[list[int]], rank: int = RANK) -> tuple[list[int], list[list[int]]]:
    """`rank` sizes and strides: dimensions that lie behind each other in every operand become one."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(not s or into[-1] == s[d] * size for s, into in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, into in zip(strides, steps, strict=True):
                if s:
                    into[-1] = s[d]
        else:
            sizes.append(size)
            for s, into in zip(strides, steps, strict=True):
                if s:
                    into.append(s[d])
    if len(sizes) > rank:
        raise Unrecordable(f"an operation over {len(sizes)} dimensions has no compiled kernel")
    missing = rank - len(sizes)
    return [1] * missing + sizes, [[0] * (rank - len(into)) + into for into in steps]


def _operand(x: Tensor | float, strides: list[int]) -> list[int]:
    """An Operand of plain.cpp."""
    if isinstance(x, Tensor):
        if x.dtype not in TYPES:
            raise Unrecordable(f"{x.dtype} has no compiled kernel")
        return [x.data_ptr(), TYPES[x.dtype], 0, *strides]
    return [0, 0, struct.unpack("q", struct.pack("d", float(x)))[0], *strides]


__all__ = ["FORMS", "OPERATIONS", "TYPES", "Index", "Unrecordable", "along", "indexed", "pointwise", "product"]
