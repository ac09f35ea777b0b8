"""Which backends and which peers a measurement has here; what is missing is named, never passed over."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from atma.ops.backend import backends_of

INSTALL = {
    "transformers": "pip install 'atma-lm[bench]'",
    "fla": "pip install flash-linear-attention",
    "titans_pytorch": "pip install titans-pytorch",
}


def ours(
    operation: str, dtype: str, device: torch.device, notes: list[str], probe: Callable[[str], object]
) -> list[str]:
    """The backends of an operation, but for the reference, whose `probe` passes. ValueError where none does."""
    taken, refused = [], []
    for name in backends_of(operation):
        if name == "reference":
            continue
        if name == "gpu" and device.type == "cpu":  # Triton's interpreter takes it, and tells nothing of its speed
            refused.append(f"the gpu backend is not available here: it computes on a CUDA device, not on {device}")
            continue
        try:
            probe(name)
            taken.append(name)
        except ValueError as error:
            refused.append(str(error))
    if not taken:
        raise ValueError(f"no backend can measure {operation} in {dtype} on {device}: {'; '.join(refused)}")
    notes += [reason for reason in dict.fromkeys(refused) if reason not in notes]
    return taken


def peer(module: str, notes: list[str]) -> ModuleType | None:
    """A module of a peer's library, or None and a note that says how to install it."""
    library = module.split(".")[0]
    try:
        found = import_module(module)
        if library == "transformers":
            import_module("transformers.utils.logging").set_verbosity_error()
        return found
    except ImportError:
        how = INSTALL[library]
        try:
            import_module(library)
            note = f"this version of {library} has no {module}: left out"
        except ImportError:
            note = f"{library} is not installed, its rows are left out: {how}"
        if note not in notes:
            notes.append(note)
        return None
