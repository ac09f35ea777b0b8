"""The compiled CPU kernels: those of the wheel, or built once a machine with its own C++ compiler; never required.

Sources are the .cpp files here, in plain C++ with vector extensions; nothing of PyTorch is compiled in, so a library
serves every version of it (`finding` says which is taken). Where there is none, or with ATMA_NATIVE=off, operations
take their PyTorch path; `status` says why.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from atma.ops.native import layout
from atma.ops.native.build import tell
from atma.ops.native.finding import Status, status
from atma.ops.native.layout import addresses

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}

_packers: dict[tuple[str, torch.dtype | None, str], layout.Packer] = {}


class Call(NamedTuple):
    """A kernel, and its arguments as it was given them."""

    kernel: Callable[..., None]
    arguments: bytes


class _Log(threading.local):
    calls: list[Call] | None = None


_log = _Log()


def name(device: torch.device) -> str:
    """What decides the last bits on a device: on a CPU the library, by its name; elsewhere PyTorch's version."""
    found = status().name if device.type == "cpu" else ""
    return found or f"torch {torch.__version__} on {device.type}"


def available(*dtypes: torch.dtype) -> bool:
    """Whether the kernels are there and take these dtypes."""
    return all(dtype in DTYPES for dtype in dtypes) and status().library is not None


def call(name: str, dtype: torch.dtype | None, fields: str, values: Sequence[int | float]) -> None:
    """Run the kernel `name` for `dtype` (None: it has one form) on the sizes, strides, addresses and numbers `values`.

    fields: the names of the values, in their order, which need not be that of the compiled struct; an array is one name
    and several values. They are checked at the first call with them: ValueError names the field that is wrong, missing
    or surplus, or says that there are not as many values, or that the library is not there.
    """
    found = _packers.get((name, dtype, fields)) or _packer(name, dtype, fields)
    kernel, count, pack, order = found
    if len(values) != count:
        raise ValueError(f"{name} takes {count} values for its fields {fields}, not {len(values)}")
    packed = pack(*values) if order is None else pack(*order(values))
    kernel(packed)
    if _log.calls is not None:
        _log.calls.append(Call(kernel, packed))


def _packer(name: str, dtype: torch.dtype | None, fields: str) -> layout.Packer:
    library, reason, _ = status()
    if library is None:
        raise ValueError(f"the native backend is not available: {reason}")
    symbol = name if dtype is None else f"{name}_{DTYPES[dtype]}"
    found = _packers[name, dtype, fields] = layout.packer(library, symbol, fields.split())
    return found


@contextlib.contextmanager
def logged() -> Iterator[list[Call]]:
    """Note every call that this thread makes inside."""
    _log.calls = calls = []
    try:
        yield calls
    finally:
        _log.calls = None


def logging() -> bool:
    """Whether this thread's calls are being noted."""
    return _log.calls is not None


__all__ = ["DTYPES", "Call", "Status", "addresses", "available", "call", "logged", "logging", "name", "status", "tell"]
