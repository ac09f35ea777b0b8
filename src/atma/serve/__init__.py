"""Serving: an engine that runs many requests through one model, exactly, and keeps their states for the next turn.

Start at `engine.py`. Names are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atma.serve.adapter_files import read_adapters
    from atma.serve.adapters import Adapter
    from atma.serve.asynchronous import AsyncEngine
    from atma.serve.engine import Engine
    from atma.serve.handle import Handle, Output
    from atma.serve.llm import LLM
    from atma.serve.request import Event, Logprob, Request, RequestError, Usage
    from atma.serve.settings import EngineConfig
    from atma.serve.structure import Structure

__all__ = [
    "LLM",
    "Adapter",
    "AsyncEngine",
    "Engine",
    "EngineConfig",
    "Event",
    "Handle",
    "Logprob",
    "Output",
    "Request",
    "RequestError",
    "Structure",
    "Usage",
    "read_adapters",
]

_HOMES = {
    "adapter_files": ("read_adapters",),
    "adapters": ("Adapter",),
    "asynchronous": ("AsyncEngine",),
    "engine": ("Engine",),
    "handle": ("Handle", "Output"),
    "llm": ("LLM",),
    "request": ("Event", "Logprob", "Request", "RequestError", "Usage"),
    "settings": ("EngineConfig",),
    "structure": ("Structure",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
