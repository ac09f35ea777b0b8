"""The machine of a measurement: its device, its threads, what it can do at most, and its description."""

import contextlib
import datetime
import importlib.metadata
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from atma.bench.timing import interleave
from atma.ops import native
from atma.ops.backend import BACKENDS, backend_for
from atma.report.content import environment

PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Larger than any cache, so that the rate is that of the memory."""


class Cost(NamedTuple):
    """What a call has to do at least: operations of its matrix products, and bytes read and written."""

    operations: float
    bytes: float


class Rates(NamedTuple):
    """Operations a second of the fastest square matrix product, by dtype; bytes a second read and written by a copy."""

    operations: dict[str, float]
    bytes: float

    def floor(self, cost: Cost, dtype: str) -> tuple[float, str]:
        """Seconds below which no program that does this work can be, and whether "operations" or "bytes" set them."""
        seconds = {"operations": cost.operations / self.operations[dtype], "bytes": cost.bytes / self.bytes}
        bound = max(seconds, key=lambda name: seconds[name])
        return seconds[bound], bound


@contextlib.contextmanager
def settled(threads: int) -> Iterator[None]:
    """Compute with so many threads inside (0: as it is), and float32 convolutions of a GPU in float32."""
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(threads or before[0])
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def measure_rates(dtypes: tuple[str, ...], device: torch.device, rounds: int) -> Rates:
    """Measure both rates; the best median of square products, and one large copy."""
    products = {name: _product_rate(getattr(torch, name), device, rounds) for name in dtypes}
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, rounds, device)["copy"].median
    return Rates(products, 2 * source.numel() * 4 / seconds)


def _product_rate(dtype: torch.dtype, device: torch.device, rounds: int) -> float:
    best = 0.0
    for size in PRODUCT_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = interleave({"product": lambda a=a, b=b: a @ b}, rounds, device)["product"].median
        best = max(best, 2 * size**3 / seconds)
    return best


def describe(device: torch.device) -> dict[str, Any]:
    """Date, machine, versions and backends, in words."""
    found: dict[str, Any] = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    found |= environment() | {"device": str(device)}
    if device.type == "cuda":
        found["GPU"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    for name in ("transformers", "triton", "flash-linear-attention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    library, reason, _ = native.status()
    found["native kernels"] = reason.split(", ", 1)[-1] if library is not None else "not available"
    taken = backend_for("auto", torch.empty(1, device=device))
    found["backends"] = f"{', '.join(BACKENDS)}; auto takes {taken}"
    return found
