"""A computation recorded once as a list of kernel calls, and replayed by one call without Python between them.

Under a `Recorder` every kernel of this library is noted with its arguments. PyTorch's own operations are seen too: a
view needs nothing, what does not depend on changing values is computed once and kept, and the small operations between
mixers (`_KERNELS`) are made by kernels of ops/native/step.cpp on the same memory. Anything else raises `Unrecordable`.
So the model's code is what is recorded, and there is no second one. What is computed between lies in an `Arena`, where
later results take the places of those that are gone.
"""

import ctypes
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atma.ops import native
from atma.ops.native import Call
from atma.ops.native.arena import Arena, ArenaFull, Places

aten = torch.ops.aten
RANK = 4
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.int32: 3, torch.int64: 4}
_FORMS = ("copy", "add", "sub", "mul", "div", "minimum", "maximum", "sigmoid", "log_sigmoid", "rsqrt", "cos", "sin")
OPERATIONS = {name: number for number, name in enumerate(_FORMS)}
"""As Operation of step.cpp."""

_UNWRITTEN = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)
_BY_SHAPE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default)


class Unrecordable(Exception):
    """An operation that has no kernel to replay it."""


class TooLarge(Unrecordable):
    """A computation whose results do not fit in the arena."""


class Program:
    """A recorded computation. It holds every tensor that its calls touch, but for parameters."""

    def __init__(self, calls: list[Call], kept: dict[int, torch.UntypedStorage], arena: Arena) -> None:
        self._kept, self._arena = kept, arena
        self._kernels = [call.kernel for call in calls]
        self._arguments = ctypes.create_string_buffer(b"".join(call.arguments for call in calls))
        addresses: list[int] = []
        at = ctypes.addressof(self._arguments)
        for kernel, arguments in calls:
            addresses += [ctypes.cast(kernel, ctypes.c_void_p).value or 0, at]  # type: ignore
            at += len(arguments)
        self.calls = (ctypes.c_int64 * len(addresses))(*addresses)
        self._length = ctypes.c_int64(len(calls))
        library = native.status().library
        assert library is not None
        self._replay = library.replay

    def __len__(self) -> int:
        return self._length.value

    def bytes(self, known: Collection[int]) -> int:
        """Of its calls, and of the tensors it holds but for those in the arena and at the addresses `known`."""
        calls = len(self._arguments) + ctypes.sizeof(self.calls) + sys.getsizeof(self._kernels)
        return calls + sum(x.nbytes() for place, x in self._kept.items() if place not in known)

    def replay(self) -> None:
        """Compute again, from what the changing tensors now hold."""
        self._replay(self.calls, self._length)

    def timed(self) -> list[tuple[str, float]]:
        """Compute again kernel by kernel: the name of each and the seconds it took."""
        found = []
        for kernel, arguments in zip(self._kernels, self.calls[1::2], strict=True):
            began = time.perf_counter()
            kernel(ctypes.c_void_p(arguments))
            found.append((kernel.__name__, time.perf_counter() - began))
        return found


class Recorder(TorchDispatchMode):
    """Within it, one computation is carried out and recorded, under `no_grad`: inference mode hides copies in views.

    `changing`: tensors whose values differ at each replay. Reading one as a Python number is refused; `tolist` and
    `numpy` pass unseen, and are not for code that is recorded. `arena`: where results lie, overwritten by whatever else
    is recorded in it or replayed from it, but for what ends before the byte `start`; None: the recording has its own.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: marking the mode for the compiler would import the compiler, which takes seconds."""
        return False

    def __init__(self, changing: Iterable[Tensor], arena: Arena | None = None, start: int = 0) -> None:
        super().__init__()
        self._kept = {_memory(x): x.untyped_storage() for x in changing}
        self._changing = set(self._kept)
        self._places = Places(arena or Arena(), start)
        self._log = native.logged()

    def __enter__(self):
        self._calls = self._log.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._log.__exit__(*error)

    @property
    def end(self) -> int:
        """The byte of the arena where the results of this recording end."""
        return self._places.end

    def program(self) -> Program:
        """What was recorded."""
        return Program(self._calls, self._kept, self._places.arena)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Record that `to` takes the values of `source`."""
        self._pointwise("copy", to, source)

    def __torch_dispatch__(self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        depends = any(_memory(x) in self._changing for x in _tensors((args, kwargs)))
        kernel = _KERNELS.get(function)
        if depends and kernel is None and not _is_free(function):
            raise Unrecordable(f"{function} has no compiled kernel")
        result = function(*args, **kwargs)
        if function in _UNWRITTEN or (kernel is not None and depends):
            result = self._placed(function, result)
            self._changing |= {_memory(x) for x in _tensors(result)}
        if kernel is not None and depends:
            kernel(self, result, *args, **kwargs)
        elif depends and _is_view(function) and any(_memory(x) not in self._changing for x in _tensors(result)):
            raise Unrecordable(f"{function} copied, and has no compiled kernel")
        for x in _tensors((args, kwargs, result)):
            if not self._places.holds(x):
                self._kept[_memory(x)] = x.untyped_storage()
        return result

    def _placed(self, function: Any, result: Any) -> Any:
        """A result in the arena, unless it is an argument. Of several the first: the rest are for gradients."""
        if function._schema.returns[0].alias_info is not None:
            return result
        try:
            place = self._places.like(next(_tensors(result)))
        except ArenaFull as reason:
            raise TooLarge(str(reason)) from None
        return place if isinstance(result, Tensor) else (place, *result[1:])

    def _pointwise(self, form: str, y: Tensor, a: Tensor, b: Tensor | float | None = None) -> None:
        """y = form(a, b), both broadcast to y."""
        shape = y.shape
        operands = [y, a.expand(shape), b.expand(shape) if isinstance(b, Tensor) else b]
        sizes, strides = _merged(shape, [_strides(x) for x in operands])
        packed = [part for x, steps in zip(operands, strides, strict=True) for part in _operand(x, steps)]
        if y.numel():
            native.call("pointwise", None, (OPERATIONS[form], *sizes, *packed))

    def _arithmetic(self, form: str) -> Callable[..., None]:
        def record(result: Tensor, a: Tensor, b: Tensor | float, alpha: float = 1) -> None:
            if alpha != 1 or not isinstance(a, Tensor):
                raise Unrecordable(f"{form} with a factor or of a number and a tensor has no compiled kernel")
            self._pointwise(form, result, a, b)

        return record

    def _clamp(self, result: Tensor, x: Tensor, low: float | None = None, high: float | None = None, **bounds) -> None:
        low, high = bounds.get("min", low), bounds.get("max", high)
        self._pointwise("copy", result, x)
        if low is not None:
            self._pointwise("maximum", result, result, low)
        if high is not None:
            self._pointwise("minimum", result, result, high)

    def _join(self, result: Tensor, parts: list[Tensor], dim: int = 0) -> None:
        at = 0
        for part in parts:
            self._pointwise("copy", result.narrow(dim, at, part.shape[dim]), part)
            at += part.shape[dim]

    def _power(self, result: Tensor, x: Tensor, exponent: float) -> None:
        if exponent != 2:
            raise Unrecordable(f"the power {exponent} has no compiled kernel")
        self._pointwise("mul", result, x, x)

    def _choose(self, result: Tensor, table: Tensor, index: Tensor, *options: object) -> None:
        if not (table.is_contiguous() and index.is_contiguous() and index.dtype == torch.int64):
            raise Unrecordable("an embedding by ids that are not contiguous int64 has no compiled kernel")
        row = table.shape[1] * table.element_size()
        places = (table.data_ptr(), index.data_ptr(), result.data_ptr())
        native.call("gather", None, (index.numel(), row, *places))

    def _lengths(self, result: Tensor, x: Tensor, order: float = 2, dim: list[int] | None = None, *rest: bool) -> None:
        if order != 2 or dim not in ([-1], [x.ndim - 1]) or result.dtype != x.dtype:
            raise Unrecordable("a norm other than the Euclidean one of the last dimension has no compiled kernel")
        rows = self._placed(aten.empty.memory_format, torch.empty(x.shape, dtype=x.dtype))
        self._pointwise("copy", rows, x)
        width = x.shape[-1]
        native.call("lengths", x.dtype, (x.numel() // width, width, width, rows.data_ptr(), result.data_ptr()))


def _of(form: str) -> Callable[..., None]:
    """A kernel of one tensor; results beside the first are buffers for gradients."""
    return lambda recorder, result, x, *_, **__: recorder._pointwise(form, next(_tensors(result)), x)


def _both(form: str) -> Callable[..., None]:
    return lambda recorder, result, *args, **kwargs: recorder._arithmetic(form)(result, *args, **kwargs)


_KERNELS: dict[Any, Callable[..., None]] = {
    aten.add.Tensor: _both("add"),
    aten.sub.Tensor: _both("sub"),
    aten.mul.Tensor: _both("mul"),
    aten.div.Tensor: _both("div"),
    aten.maximum.default: _both("maximum"),
    aten.sigmoid.default: _of("sigmoid"),
    aten.log_sigmoid_forward.default: _of("log_sigmoid"),
    aten.rsqrt.default: _of("rsqrt"),
    aten.cos.default: _of("cos"),
    aten.sin.default: _of("sin"),
    aten.clone.default: _of("copy"),
    aten._to_copy.default: _of("copy"),
    aten.copy_.default: lambda recorder, result, to, source, *_: recorder._pointwise("copy", to, source),
    aten.clamp.default: Recorder._clamp,
    aten.clamp_min.default: Recorder._clamp,
    aten.cat.default: Recorder._join,
    aten.pow.Tensor_Scalar: Recorder._power,
    aten.embedding.default: Recorder._choose,
    aten.linalg_vector_norm.default: Recorder._lengths,
}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _is_free(function: Any) -> bool:
    """Whether its result needs no computing again, whatever the values of its arguments."""
    return function in _UNWRITTEN or function in _BY_SHAPE or _is_view(function)


def _is_view(function: Any) -> bool:
    returned = [x.alias_info for x in function._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


def _strides(x: Tensor | float | None) -> list[int]:
    """In bytes; of a number none."""
    return [step * x.element_size() for step in x.stride()] if isinstance(x, Tensor) else []


def _merged(shape: torch.Size, strides: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """RANK sizes and strides: dimensions that lie behind each other in every operand become one."""
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
    if len(sizes) > RANK:
        raise Unrecordable(f"an operation over {len(sizes)} dimensions has no compiled kernel")
    missing = RANK - len(sizes)
    return [1] * missing + sizes, [[0] * (RANK - len(into)) + into for into in steps]


def _operand(x: Tensor | float | None, strides: list[int]) -> list[int]:
    """An Operand of step.cpp."""
    if isinstance(x, Tensor):
        if x.dtype not in TYPES:
            raise Unrecordable(f"{x.dtype} has no compiled kernel")
        return [x.data_ptr(), TYPES[x.dtype], 0, *strides]
    bits = struct.unpack("q", struct.pack("d", 0.0 if x is None else float(x)))[0]
    return [0, 0, bits, *strides]


__all__ = ["Program", "Recorder", "TooLarge", "Unrecordable"]
