"""From a name or a folder to a model: packaged models, model folders, finished runs, and adapters on their base."""

import difflib
import importlib.resources
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atma.display import facts_html, facts_text

if TYPE_CHECKING:
    import torch

    from atma.model import Model
    from atma.tokenizer import Tokenizer


ADAPTERS = "adapters.json"
"""The file by which a folder of adapters is known."""
MOST_RUNS = 8
"""Runs that are named at the most where a model is not there."""


class Loaded(NamedTuple):
    """A model ready to use: `model`, its `tokenizer` (None where there is none), the `path` of its folder, and `info`,
    the data of its config.json, of adapters of their base's."""

    model: "Model"
    tokenizer: "Tokenizer | None"
    path: Path
    info: dict[str, Any]

    @property
    def name(self) -> str:
        """What it is called: `called(path)`."""
        return called(self.path)

    @property
    def base(self) -> Path:
        """The folder that has its tokenizer and says how it is talked to: `path`, or what adapters there are on."""
        return _base(self.path) if is_adapters(self.path) else self.path

    @property
    def trained_length(self) -> int | None:
        """Tokens of the texts that it was trained on; None where its folder does not say."""
        extra = self.info.get("extra", {})
        recipe = extra.get("recipe") if isinstance(extra, dict) else None
        train = recipe.get("train") if isinstance(recipe, dict) else None
        return train.get("length") if isinstance(train, dict) else None

    def facts(self) -> dict[str, str]:
        """What it is, by name."""
        length, tokenizer = self.trained_length, self.tokenizer
        return {
            **self.model.facts(),
            "trained length": f"{length:,} tokens" if length else "not told by its folder",
            "tokenizer": "none" if tokenizer is None else f"{tokenizer.name}, {tokenizer.vocab_size:,} tokens",
            "folder": str(self.path),
        }

    def __repr__(self) -> str:
        return facts_text(f"Loaded {self.path.name}: model, tokenizer, path, info", self.facts())

    def _repr_html_(self) -> str:
        return facts_html(f"Loaded {self.path.name}", self.facts())


def packaged() -> dict[str, Path]:
    """Models that come with the package, by name."""
    root = Path(str(importlib.resources.files("atma"))) / "pretrained"
    return {folder.name: folder for folder in sorted(root.glob("*")) if (folder / "config.json").is_file()}


_ATTEMPT = re.compile(r"run-\d{6}")


def called(folder: str | Path) -> str:
    """What a model in a folder is called: the folder's name, a link's own; of what lies in a run folder the run's.

    So runs/nano/final is "nano", runs/nano/best "nano-best", and a checkpoint "nano-step-00000200". Of a sweep's cell
    it is the cell's, whichever of its attempts, run-000001 and so on, it is.
    """
    folder = Path(folder)
    own = folder.resolve() if folder.name in ("", "..") else folder.parent.resolve() / folder.name
    run = own.parent.parent if own.parent.name == "checkpoints" else own.parent
    if own.name == "final" and run.name:
        return run.parent.name if _ATTEMPT.fullmatch(run.name) else run.name
    within = own.name in ("best", "adapters") or own.parent.name == "checkpoints"
    return f"{run.name}-{own.name}" if within and (run / "recipe.toml").is_file() else own.name


def model_folder(name: str | Path) -> Path:
    """The folder of a packaged name, a model folder, or a run folder (its `final` model).

    A packaged name wins over a folder of the same name, which `./NAME` still reaches. ValueError: there is none, and
    what exists; or the folder holds adapters, which are no weights to start from, export or read without their base.
    """
    known = packaged()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    for folder in (path / "final", path):
        if (folder / "config.json").is_file():
            return folder
    if is_adapters(path):
        raise ValueError(f"{path}: adapters, not a whole model; merge them first: `atma merge BASE {path} FOLDER`")
    if path.is_dir():
        raise ValueError(f"{path}: no model here: neither config.json nor final/config.json{_unfinished(path)}")
    raise ValueError(_nowhere(path, known))


def _nowhere(path: Path, packaged: Iterable[str]) -> str:
    """What is said of a model that is not there: what there is, and the nearest of that."""
    runs = [str(final.parent) for final in sorted(Path("runs").glob("*/final")) if (final / "config.json").is_file()]
    told = f"{path}: no such model folder; packaged models: {', '.join(packaged) or 'none'}"
    if runs:
        more = f" and {len(runs) - MOST_RUNS} more" if len(runs) > MOST_RUNS else ""
        told += f"; finished runs here: {', '.join(runs[:MOST_RUNS])}{more}"
    names = {Path(run).name: run for run in runs} | {name: name for name in (*packaged, *runs)}
    near = difflib.get_close_matches(str(path), names, 1)
    return told + (f"; did you mean '{names[near[0]]}'?" if near else "")


def base_folder(name: str | Path) -> Path:
    """The same, and of a folder of adapters the model they are on: whose tokenizer, chat template and ends they have.

    For whoever gets the model itself from `load`, which merges the adapters in.
    """
    adapters = str(name) not in packaged() and is_adapters(Path(name))
    return _base(Path(name)) if adapters else model_folder(name)


def is_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters and no model."""
    models = (folder / "final" / "config.json", folder / "config.json")
    return (folder / ADAPTERS).is_file() and not any(path.is_file() for path in models)


def _base(adapters: Path) -> Path:
    """The model that a folder of adapters says it belongs to."""
    from atma.lora import adapter_record

    base = str(adapter_record(adapters).get("base") or "")
    try:
        return model_folder(base)
    except ValueError as error:
        told = f"{adapters}: adapters of a model that is not there: {error}" if base else f"{adapters}: names no base"
        raise ValueError(f"{told}; give it with `atma merge BASE {adapters} OUT`") from None


def _unfinished(run: Path) -> str:
    checkpoints = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
    if not checkpoints:
        return ""
    last, finish = run / "checkpoints" / checkpoints[-1], f"atma train --resume --out {run}"
    return f" (an unfinished run; finish it with `{finish}`, or take its last checkpoint, {last})"


def dtype_of(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    """A floating type by itself or by name, such as "bfloat16". ValueError: there is none of that name."""
    import torch

    known = ("float32", "bfloat16", "float16", "float64")
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in known:
        raise ValueError(f"'dtype' must be one of {', '.join(known)}, not {dtype!r}")
    return getattr(torch, dtype)


def load(
    name: str | Path,
    dtype: "torch.dtype | str | None" = None,
    select: str | None = None,
    weights: str | None = None,
) -> Loaded:
    """The model of a packaged name ("nano"), a model folder or a finished run, on the CPU, ready to evaluate.

    dtype: of its weights and of what it computes, such as "bfloat16"; float32 by default, whatever the folder has.
    select: a selection policy, as of `atma.select`; all keys are read by default.
    weights: "int8" or "int4" reads the large ones in so few bits (docs/narrow.md), of what the folder has, whatever
    `dtype` is; floats by default, or what a folder written by `atma narrow` has.
    Of a folder of adapters it is their base with the adapters merged in, and `path` is that of the adapters.
    ValueError: no such model, dtype, policy or width; weights that are narrow already, or on no CPU.
    """
    from atma.large_pages import in_large_pages
    from atma.narrow import narrow, width_in, width_of

    width = width_of(weights)
    loaded = _load(name, dtype if width is None else None)
    if width is not None:
        if width_in(loaded.model) != width:
            narrow(loaded.model, width)
        if dtype is not None:
            loaded.model.to(dtype_of(dtype))
    in_large_pages([*loaded.model.parameters(), *loaded.model.buffers()])
    if select is not None:
        from atma.selection import select as set_policy

        set_policy(loaded.model, select)
    return loaded


def load_floats(name: str | Path) -> Loaded:
    """`load(name)`, but the weights of a narrow folder are the floats that they stand for: to be trained."""
    return _load(name, None, floats=True)


def _load(name: str | Path, dtype: "torch.dtype | str | None", floats: bool = False) -> Loaded:
    from atma.checkpoint import load_info, load_model, load_narrow

    path, dtype = base_folder(name), dtype_of(dtype)
    if str(name) not in packaged() and is_adapters(Path(name)):
        from atma.lora import load_adapters, merge

        model, tokenizer = load_model(path)
        load_adapters(model, name)
        merge(model)
        return Loaded((model if dtype is None else model.to(dtype)).eval(), tokenizer, Path(name), load_info(path))
    read = load_model if floats else load_narrow
    model, tokenizer = read(path) if dtype is None else read(path, dtype)
    return Loaded(model.eval(), tokenizer, path, load_info(path))
