"""Facts about this installation and about model folders, as plain data."""

import contextlib
import importlib.metadata
import math
from pathlib import Path
from typing import Any

import torch

from atma import shipped
from atma.checkpoint import load_config, load_info
from atma.config import identity, to_dict
from atma.decoding import way
from atma.folders import file_hash
from atma.loading import called, model_folder, packaged
from atma.mixers.table import names, package_of
from atma.ops import backend, native
from atma.report.content import environment
from atma.weights import tensor_shapes, weight_files

_LIBRARIES = ("numpy", "safetensors", "tokenizers", "tyro", "rich", "plotly")
_TABLES = {"mixers": "mixer", "attention cores": "core", "memories": "memory"}
_EXTRAS = ("pyarrow", "zstandard", "tensorboard", "datasets")


def installation() -> dict[str, str]:
    """Versions, machine, threads, backends of the operations and packaged models, in words."""
    facts = environment()
    facts |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    facts |= {f"{name} (extra)": _version_or_absent(name) for name in _EXTRAS}
    facts["backends"] = ", ".join(f"{name}: {backend.backend_for(operation=name)}" for name in backend.operations())
    facts["native kernels"] = native.status().reason
    facts["decoding"] = way("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    facts["packaged models"] = ", ".join(packaged()) or "none"
    facts |= _shipped()
    return facts | {told: ", ".join(_named(what)) for told, what in _TABLES.items()}


def _shipped() -> dict[str, str]:
    """The recipes by name, and where the documentation is; an installation may lack either."""
    facts = dict[str, str]()
    with contextlib.suppress(ValueError):
        facts["recipes"] = ", ".join(name for name in shipped.recipe_names() if "/" not in name)
        facts["documentation"] = str(shipped.folder("docs"))
    return facts


def model_facts(name: str | Path) -> dict[str, Any]:
    """What a packaged model, model folder or finished run holds; read from its files' heads, no weights are loaded."""
    folder = model_folder(name)
    config = load_config(folder)
    files = weight_files(folder)
    shapes = [shape for file in files for shape in tensor_shapes(file).values()]
    tokenizer = folder / "tokenizer.json"
    return {
        "model": called(folder),
        "folder": str(folder),
        "parameters": f"{sum(math.prod(shape) for shape in shapes):,}",
        "weights SHA-256": " ".join(map(file_hash, files)),
        "weights bytes": f"{sum(file.stat().st_size for file in files):,}",
        "tokenizer SHA-256": file_hash(tokenizer) if tokenizer.is_file() else "no tokenizer.json",
        "configuration": identity(config),
        **{f"  {key}": value for key, value in _settings(to_dict(config)).items()},
        **{f"extra {key}": value for key, value in load_info(folder).get("extra", {}).items() if key != "transformers"},
    }


def _named(what: str) -> list[str]:
    """Every name of a table, with the package of those that are not of this one."""
    return [name if not (package := package_of(name, what)) else f"{name} ({package})" for name in names(what)]


def _settings(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The settings of tables, those within a table behind its name."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _settings(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return found


def _version_or_absent(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
