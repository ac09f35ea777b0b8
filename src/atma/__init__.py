"""Language models that train short and run long.

`atma.load("nano")` gives a trained model and its tokenizer, `atma.generate(model, tokenizer, prompt)` text, and
`atma.Model(config)` a fresh model. Names are imported when first used, so that `import atma` costs nothing.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atma.config import ModelConfig
    from atma.generation import generate
    from atma.loading import Loaded, load
    from atma.model import Model
    from atma.serve.llm import LLM
    from atma.settings import Settings

if sys.platform == "win32":  # file locks, signals and the server's sockets are not there
    raise ImportError("atma runs on Linux and macOS; on Windows install it in WSL (`wsl --install`)")

__version__ = "0.1.0"
__all__ = ["LLM", "Loaded", "Model", "ModelConfig", "Settings", "__version__", "generate", "load"]

_HOMES = {
    "LLM": "atma.serve.llm",
    "Loaded": "atma.loading",
    "Model": "atma.model",
    "ModelConfig": "atma.config",
    "Settings": "atma.settings",
    "generate": "atma.generation",
    "load": "atma.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'atma' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
