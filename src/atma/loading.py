"""From a name or a folder to a model: packaged models, model folders and finished runs."""

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from atma.model import Model
    from atma.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """A model ready to use. `info` is the data of its config.json."""

    model: "Model"
    tokenizer: "Tokenizer | None"
    path: Path
    info: dict[str, Any]


def packaged() -> dict[str, Path]:
    """Models that come with the package, by name."""
    root = Path(str(importlib.resources.files("atma"))) / "pretrained"
    return {folder.name: folder for folder in sorted(root.glob("*")) if (folder / "config.json").is_file()}


def model_folder(name: str | Path) -> Path:
    """The folder of a packaged name, a model folder, or a run folder (its `final` model).

    A packaged name wins over a folder of the same name, which `./NAME` still reaches. ValueError lists what exists.
    """
    known = packaged()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    for folder in (path / "final", path):
        if (folder / "config.json").is_file():
            return folder
    if path.is_dir():
        raise ValueError(f"{path}: no model here: neither config.json nor final/config.json{_unfinished(path)}")
    raise ValueError(f"{path}: no such model folder; packaged models: {', '.join(known) or 'none'}")


def _unfinished(run: Path) -> str:
    checkpoints = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
    if not checkpoints:
        return ""
    last, finish = run / "checkpoints" / checkpoints[-1], f"atma train --resume --out {run}"
    return f" (an unfinished run; finish it with `{finish}`, or take its last checkpoint, {last})"


def load(name: str | Path, dtype: "torch.dtype | None" = None) -> Loaded:
    """The model of a packaged name ("nano"), a model folder or a finished run, on the CPU, ready to evaluate.

    dtype: of its weights and of what it computes; float32 by default, whatever the folder has.
    """
    from atma.checkpoint import load_info, load_model

    path = model_folder(name)
    model, tokenizer = load_model(path) if dtype is None else load_model(path, dtype)
    return Loaded(model.eval(), tokenizer, path, load_info(path))
