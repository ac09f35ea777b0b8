"""What a compiled kernel takes, as its library tells it (problem.h), and the packing of fields by their names."""

import ctypes
import re
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple


class Packer(NamedTuple):
    """How numbers of certain fields become the arguments of a kernel."""

    kernel: Callable[..., None]
    count: int
    pack: Callable[..., bytes]
    order: Callable[[Sequence[int | float]], Sequence[int | float]] | None
    """From the order they are given in to that of the struct; None where they are the same."""


class _Layout(ctypes.Structure):
    _fields_ = (("fields", ctypes.c_char_p), ("bytes", ctypes.c_int64))


def packer(library: ctypes.CDLL, symbol: str, names: Sequence[str]) -> Packer:
    """For the kernel `symbol` and fields in this order. ValueError names the field that it has not, is not given, or is
    given twice."""
    kernel, tell = getattr(library, symbol), getattr(library, f"{symbol}_layout")
    kernel.restype, tell.restype = None, ctypes.POINTER(_Layout)
    told = tell().contents
    codes = _codes(told.fields.decode(), told.bytes)
    packing = struct.Struct("".join(codes.values()))
    if packing.size != told.bytes:
        raise ValueError(f"{symbol} takes {told.bytes} bytes, but its fields {packing.size}: {told.fields}")
    for name in names:
        if name not in codes:
            raise ValueError(f"{symbol} has no field '{name}'; it takes {', '.join(codes)}")
        if names.count(name) > 1:
            raise ValueError(f"{symbol} is given its field '{name}' twice")
    for name in codes:
        if name not in names:
            raise ValueError(f"{symbol} is not given its field '{name}'")
    places, count = dict[str, range](), 0
    for name in names:
        places[name] = range(count, count := count + len(codes[name]))
    order = [place for name in codes for place in places[name]]
    return Packer(kernel, count, packing.pack, None if order == sorted(order) else itemgetter(*order))


def _codes(text: str, size: int) -> dict[str, str]:
    """Each field of declarations in C++ as a format of `struct`: one letter a number or address, all of 64 bits. Fields
    that are structs themselves share what of the size is left."""
    found, structs = {}, dict[str, int]()
    for declaration in text.split(";"):
        kind = declaration.split()[0] if declaration.strip() else ""
        for name, count in re.findall(r"(\w+)(?:\[(\d+)\])?\s*(?:,|$)", declaration.strip()):
            found[name] = ("d" if kind == "double" else "q") * int(count or 1)
            if "*" not in declaration and kind not in ("double", "int64_t"):
                structs[name] = int(count or 1)
    left = size // 8 - sum(len(code) for name, code in found.items() if name not in structs)
    return found | {name: "q" * (count * left // sum(structs.values())) for name, count in structs.items()}


def addresses(*tensors: Any) -> list[int]:
    """Where their numbers lie, 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


__all__ = ["Packer", "addresses", "packer"]
