"""Which implementation an operation takes.

`reference` is the materialised oracle in plain PyTorch, on any device. `cpu` is blocked PyTorch: fast with neither a
GPU nor a compiler, and for any device when asked for by name. `native` are the compiled CPU kernels (atma.ops.native),
`gpu` the Triton kernels; `fla` is flash-linear-attention's delta rule, by name only. `auto` takes the best that is
there for the tensor's device and dtype. A backend that a call asks for by name is never replaced by another;
`use_backend` speaks for many operations, and one without it takes `cpu`, or its `reference` where that is all it has.

An operation has the backends whose files its folder holds. A file is imported when its backend is first chosen, so
that Triton is not where there is no GPU.
"""

import contextlib
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from atma.ops import native

BACKENDS = ("reference", "cpu", "native", "gpu", "fla")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
"""What the operations compute on; of these, some backends take only some."""

_FOLDER = Path(__file__).parent
_META = torch.device("meta")
_chosen = "auto"
_decided: dict[tuple, str] = {}
_modules = types.ModuleType("implementations")
"""Those imported, as OPERATION_BACKEND; an operation's own name in `atma.ops` may be its function's."""
P = ParamSpec("P")
R = TypeVar("R")


def _constant(function: Callable[P, R]) -> Callable[P, R]:
    """The mark of `torch.compiler.assume_constant_result`, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def operations() -> tuple[str, ...]:
    """The operations that have a backend to choose: the folders with a `cpu.py`."""
    return tuple(sorted(path.parent.name for path in _FOLDER.glob("*/cpu.py")))


@_constant
def backends_of(operation: str) -> tuple[str, ...]:
    """Those of BACKENDS that an operation has, by the files of its folder."""
    return tuple(name for name in BACKENDS if (_FOLDER / operation / f"{name}.py").is_file())


def implementation(operation: str, backend: str) -> Any:
    """The module of a backend of an operation, imported when it is first asked for."""
    _load(operation, backend)
    return getattr(_modules, f"{operation}_{backend}")


@_constant
def _load(operation: str, backend: str) -> None:
    """Import it, which a compiler must not look into; it reads a module's attributes as they are."""
    if not hasattr(_modules, f"{operation}_{backend}"):
        setattr(_modules, f"{operation}_{backend}", importlib.import_module(f"atma.ops.{operation}.{backend}"))


def backend_for(name: str = "auto", x: Tensor | None = None, operation: str = "polar") -> str:
    """The backend that a call of an operation on `x` (None: a float32 tensor of the CPU) takes.

    ValueError for an unknown one, one that the operation has not, or one that is not available, with the reason.
    """
    wanted = name, _chosen, operation, None if x is None else (x.device.type, x.dtype)
    if wanted not in _decided:
        _decided[wanted] = _decide(name, x, operation)
    return _decided[wanted]


def _decide(name: str, x: Tensor | None, operation: str) -> str:
    kernels = backends_of(operation)
    plain = "cpu" if "cpu" in kernels else "reference"
    if name == "auto" and _chosen != "auto":
        name = _chosen if _chosen in kernels else plain
    if name == "auto":
        return next((best for best in ("gpu", "native") if best in kernels and _hindrance(best, x) is None), plain)
    if name not in BACKENDS:
        raise ValueError(f"no backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    if name not in kernels:
        raise ValueError(f"{operation} has no backend '{name}'; it has {', '.join(kernels)}")
    hindrance = _hindrance(name, x)
    if hindrance is not None and not (name == "gpu" and _interpreted()):
        raise ValueError(f"the {name} backend is not available here: {hindrance}")
    return name


def _hindrance(name: str, x: Tensor | None) -> str | None:
    """Why this backend cannot take `x`, or None if it can."""
    if name == "native":
        if x is not None and x.device.type != "cpu":
            return f"it computes on the CPU, not on {x.device}"
        dtype = torch.float32 if x is None else x.dtype
        if dtype not in native.DTYPES:
            return f"it takes {', '.join(native.DTYPES.values())}, not {str(dtype).removeprefix('torch.')}"
        return _native_hindrance()
    if name in ("gpu", "fla"):
        if x is None or x.device.type != "cuda":
            return f"it computes on a CUDA device, not on {'cpu' if x is None else x.device}"
        if name == "gpu" and x.dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, not float64"
        return None if _installed("triton") else "triton is not installed"
    return None


@_constant
def _native_hindrance() -> str | None:
    library, reason, _ = native.status()
    return None if library is not None else reason


@_constant
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@_constant
def _interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed("triton")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation called inside with backend `name`, in every thread."""
    global _chosen
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no backend '{name}'; known: auto, {', '.join(BACKENDS)}")
    hindrance = _native_hindrance() if name == "native" else None
    if hindrance is not None:
        raise ValueError(f"the native backend is not available here: {hindrance}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def check_tensors(names: str, lead: Tensor, *others: Tensor | None) -> None:
    """ValueError, with the name of the tensor in `names`, unless all (None aside) are real and on the first's device.

    A kernel is handed addresses alone: what lies elsewhere would be read as something else.
    """
    device = lead.device
    if lead.dtype not in DTYPES or device == _META:
        _refuse(names, (lead, *others))
    for x in others:
        if x is not None and (x.dtype not in DTYPES or x.device != device):
            _refuse(names, (lead, *others))


def _refuse(names: str, tensors: tuple[Tensor | None, ...]) -> None:
    given = [(name, x) for name, x in zip(names.split(), tensors, strict=True) if x is not None]
    (first, lead), taken = given[0], ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    for name, x in given:
        if x.dtype not in DTYPES:
            found = f"{type(x).__name__} of {str(x.dtype).removeprefix('torch.')}"
            raise ValueError(f"{name} must be a Tensor of {taken}, not {found}")
        if x.device.type == "meta":
            raise ValueError(f"{name} is on the device meta, which holds no numbers; move it to cpu or cuda")
        if x.device != lead.device:
            raise ValueError(f"{name} is on {x.device} and {first} on {lead.device}; they must be on one device")


def check_indices(name: str, x: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """ValueError unless `x` (None: there is none) holds whole numbers in this shape on this device."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name} must be {shape}, not {tuple(x.shape)}")
    if x.dtype.is_floating_point or x.dtype.is_complex:
        raise ValueError(f"{name} must be integers, not {str(x.dtype).removeprefix('torch.')}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} as the rest, not on {x.device}")


def recording() -> bool:
    """Whether a call must go through its custom operator: under autograd or a compiler. Otherwise its body does."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def require_steady(chosen: str, segment_ids: Tensor | None) -> None:
    """ValueError where an operation cannot take each token by itself, in turn."""
    if chosen != "native":
        raise ValueError(f"steady is for the native backend, the compiled kernels on the CPU, not for '{chosen}'")
    if recording():
        raise ValueError("steady has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    if segment_ids is not None:
        raise ValueError("steady takes no packed documents: leave segment_ids out")


def own_precision(operation: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out of an operation: it chooses the precision of each of its products itself."""

    @wraps(operation)
    def call(*args: "P.args", **kwargs: "P.kwargs") -> R:  # as text: else they are made anew where this is compiled
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return operation(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return operation(*args, **kwargs)

    return call
