"""Which implementation an operation takes.

`reference` is the materialised oracle in plain PyTorch, on any device. `cpu` is the fast path without a GPU; it is
blocked PyTorch, so it also runs on other devices when asked for by name. `auto` picks `cpu`. A backend asked for by
name is never replaced by another.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu")

_chosen = "auto"


def backend_for(name: str = "auto") -> str:
    """The backend a call takes: `name`, or for "auto" the surrounding `use_backend`, or else the fast path."""
    if name == "auto":
        name = _chosen
    if name == "auto":
        return "cpu"
    if name not in BACKENDS:
        raise ValueError(f"no backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation called inside with backend `name`, in every thread."""
    global _chosen
    before, _chosen = _chosen, "auto" if name == "auto" else backend_for(name)
    try:
        yield
    finally:
        _chosen = before


def recording() -> bool:
    """Whether a call must go through its custom operator: under autograd or a compiler. Otherwise its body does."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


P = ParamSpec("P")
R = TypeVar("R")


def own_precision(operation: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out of an operation: it chooses the precision of each of its products itself."""

    @wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        device = first.device.type if isinstance(first, Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return operation(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operation(*args, **kwargs)

    return call
