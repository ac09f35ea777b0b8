"""A computation recorded once as a list of kernel calls, and replayed by one call without Python between them.

Under a `Recorder` every kernel of this library is noted with its arguments. PyTorch's own operations are seen too: a
view needs nothing, what does not depend on changing values is computed once and kept, and what a mixer in plain PyTorch
is written with (`operations`) is made by kernels on the same memory. Anything else raises `Unrecordable`. So the
model's code is what is recorded, and there is no second one. What is computed between lies in an `Arena`, where later
results take the places of those that are gone.
"""

import ctypes
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atma.ops import native
from atma.ops.native import Call
from atma.ops.native.arena import Arena, ArenaFull, Places
from atma.ops.native.operations import Kernel, kernel_of
from atma.ops.native.strided import Unrecordable, pointwise

aten = torch.ops.aten
_UNWRITTEN = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)
_BY_SHAPE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default)
_BY_SHAPE += aten.new_ones.default, aten.new_full.default
_CONVERTING = (aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor)


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
        self._replay.restype = ctypes.c_int64

    def __len__(self) -> int:
        return self._length.value

    def bytes(self, known: Collection[int]) -> int:
        """Of its calls, and of the tensors it holds but for those in the arena and at the addresses `known`."""
        calls = len(self._arguments) + ctypes.sizeof(self.calls) + sys.getsizeof(self._kernels)
        return calls + sum(x.nbytes() for place, x in self._kept.items() if place not in known)

    def replay(self) -> None:
        """Compute again, from what the changing tensors now hold. IndexError: an index was beyond its tensor, and
        nothing was read or written there."""
        check(self._replay(self.calls, self._length))

    def timed(self) -> list[tuple[str, float]]:
        """Compute again kernel by kernel: the name of each and the seconds it took."""
        found = []
        for kernel, arguments in zip(self._kernels, self.calls[1::2], strict=True):
            began = time.perf_counter()
            kernel(ctypes.c_void_p(arguments))
            found.append((kernel.__name__, time.perf_counter() - began))
        return found


def check(missed: int) -> None:
    """Raise IndexError for indices that a replay missed."""
    if missed:
        raise IndexError(f"{missed} indices are beyond the tensors that they read or write")


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
        self._made: set[int] = set()
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
        pointwise("copy", to, source)

    def run(self, function: Any, *values: Any) -> Any:
        """Compute and record an operation that another one is made of."""
        return self.__torch_dispatch__(function, (), values)

    def depends(self, x: Tensor) -> bool:
        """Whether a tensor's values differ at each replay."""
        return _memory(x) in self._changing

    def constant(self, x: Tensor) -> Tensor:
        """Keep a tensor whose values are the same at each replay."""
        self._kept[_memory(x)] = x.untyped_storage()
        return x

    def place(self, x: Tensor) -> Tensor:
        """A tensor of x's shape in the arena, for a result."""
        try:
            placed = self._places.like(x)
        except ArenaFull as reason:
            raise TooLarge(str(reason)) from None
        self._changing.add(_memory(placed))
        return placed

    def __torch_dispatch__(self, function: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        values = _values(function, args, kwargs or {})
        given, kernel = list(_tensors(values)), kernel_of(function)
        if function._schema.is_mutable:
            result = self._written(function, kernel, values)
        elif torch.Tag.nondeterministic_seeded in function.tags and kernel is None:
            raise Unrecordable(f"{function} is random, and has no compiled kernel")
        elif any(map(self.depends, given)) and not _is_free(function):
            if kernel is None:
                raise Unrecordable(f"{function} has no compiled kernel")
            result = self._placed(function(*args, **(kwargs or {})))
            self._by(kernel, function, next(_tensors(result)), values)
        else:
            result = self._free(function, function(*args, **(kwargs or {})), given)
        for x in _tensors((given, result)):
            if not self._places.holds(x):
                self._kept[_memory(x)] = x.untyped_storage()
        return result

    def _free(self, function: Any, result: Any, given: list[Tensor]) -> Any:
        """A result that no kernel computes: unwritten, a view, or the same at each replay."""
        if function in _UNWRITTEN:
            return self._placed(result)
        if _is_view(function):
            if any(map(self.depends, given)) and not all(map(self.depends, _tensors(result))):
                raise Unrecordable(f"{function} copied, and has no compiled kernel")
        else:
            self._made |= {_memory(x) for x in _tensors(result)}
        return result

    def _placed(self, result: Any) -> Any:
        """A result in the arena. Of several the first: the rest are for gradients."""
        place = self.place(next(_tensors(result)))
        return place if isinstance(result, Tensor) else (place, *result[1:])

    def _written(self, function: Any, kernel: Kernel | None, values: list[Any]) -> Tensor:
        """What an operation in place writes, which is not carried out but by its kernel."""
        target = values[0]
        if kernel is None or not isinstance(target, Tensor):
            raise Unrecordable(f"{function} has no compiled kernel")
        if not self.depends(target):
            self._restore(function, target)
        others = [] if function in _CONVERTING else [x for x in values[1:] if isinstance(x, Tensor | int | float)]
        if not all(torch.can_cast(torch.result_type(target, x), target.dtype) for x in others):
            raise Unrecordable(f"{function} to a narrower dtype has no compiled kernel")
        self._by(kernel, function, target, values)
        return target

    def _by(self, kernel: Kernel, function: Any, y: Tensor, values: list[Any]) -> None:
        """Compute and record; a refusal names the operation."""
        try:
            kernel(self, y, *values)
        except TooLarge:
            raise
        except Unrecordable as reason:
            raise Unrecordable(f"{function}: {reason}") from None

    def _restore(self, function: Any, target: Tensor) -> None:
        """A constant is written: from now on it is none, and each replay begins with what it has been until now."""
        if _memory(target) not in self._made:
            raise Unrecordable(f"{function} writes what is neither of the state nor made in the step")
        whole = torch.empty(0, dtype=target.dtype).set_(target.untyped_storage())
        self.copy(whole, self.constant(whole.clone()))
        self._calls.insert(0, self._calls.pop())
        self._changing.add(_memory(target))


def _values(function: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments in the order of the schema, each of them."""
    named = function._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(x.name, x.default_value) for x in named)]


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
    if function is aten._unsafe_view.default:  # of a result that nothing else names, so its schema does not say it
        return True
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


__all__ = ["Program", "Recorder", "TooLarge", "Unrecordable"]
