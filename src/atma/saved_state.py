"""States as files: one safetensors file, whose metadata tells of the tree. Nothing of a file chooses what is built.

A class may take over states that were saved as another kind: `like.earlier(kind, tensors by field)` gives those that
are to be its own in place of the saved ones, or None.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


def growing(kind: type) -> Mapping[str, int]:
    """The fields of a state class that grow, and the axis of their tokens: the last but one if it only names them."""
    told = getattr(kind, "grows", {})
    return told if isinstance(told, Mapping) else dict.fromkeys(told, -2)


class Free(NamedTuple):
    """Axes along which a saved tensor may have another size."""

    grows: int | None = None
    slides: int | None = None


def save(state: Any, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the state and text metadata to one safetensors file; an old file stays until the new one is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat: dict[str, Tensor] = {}
    shape = _describe(state, "", flat)
    path = Path(path)
    staging = path.with_name(f".{path.name}.new")
    try:
        save_file(flat, str(staging), {"state": json.dumps(shape), **(metadata or {})})
        staging.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from None
    finally:
        staging.unlink(missing_ok=True)


class Saved(NamedTuple):
    """A saved state as it is in its file at `path`: `metadata`, texts by name, and `flat`, tensors by name."""

    path: Path
    metadata: dict[str, str]
    shape: Any
    """The tree, each tensor replaced by its name in `flat`."""
    flat: Mapping[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """The tensors in the order of the tree that was saved. ValueError: it tells of others than there are."""
        try:
            return list(_named(self.shape, self.flat))
        except (KeyError, RecursionError):
            raise ValueError(f"{self.path}: not a saved state, or damaged: tensors are missing") from None

    def build(self, like: S) -> S:
        """The state in the classes, shapes and types of `like`; room and rows are the file's own.

        ValueError when it is the state of another model: nothing of the file chooses what is built.
        """
        try:
            return _rebuild(self.shape, self.flat, like, Free())
        except RecursionError:
            raise ValueError(f"{self.path}: not a saved state, or damaged: nested without end") from None
        except ValueError as error:
            raise ValueError(f"{self.path}: not a saved state of this model, or damaged: {error}") from None


def load(path: str | Path, like: S) -> tuple[S, dict[str, str]]:
    """A saved state in the form of `like`, and its metadata. ValueError as `read` and `Saved.build`."""
    saved = read(path)
    return saved.build(like), saved.metadata


def read(path: str | Path) -> Saved:
    """A saved state, not yet of any form. ValueError when the file is not one, or is damaged."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such state file")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Saved(Path(path), metadata, json.loads(metadata.pop("state")), flat)
    except RecursionError:
        raise ValueError(f"{path}: not a saved state, or damaged: nested without end") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a saved state, or damaged: {' '.join(str(error).split())}") from None


def _describe(node: Any, name: str, flat: dict[str, Tensor]) -> Any:
    """The tree as JSON, each tensor replaced by its name in `flat`."""
    if node is None:
        return None
    if isinstance(node, Tensor):
        flat[name] = node.contiguous()
        return name
    if hasattr(node, "_fields"):
        parts = {f: _describe(part, f"{name}{f}.", flat) for f, part in zip(node._fields, node, strict=True)}
        return {"kind": type(node).__name__, **parts}
    return [_describe(part, f"{name}{i}.", flat) for i, part in enumerate(node)]


def _named(shape: Any, flat: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors that `_describe` has told of."""
    if isinstance(shape, dict):
        shape = [part for name, part in shape.items() if name != "kind"]
    if isinstance(shape, list):
        for part in shape:
            yield from _named(part, flat)
    elif shape is not None:
        yield flat[str(shape)]


def _rebuild(shape: Any, flat: Mapping[str, Tensor], like: Any, free: Free) -> Any:
    """What `_describe` has told of, in the form of `like`. ValueError: it tells of something else."""
    if like is None:
        if shape is not None:
            raise ValueError(f"nothing is wanted where it has {str(shape)[:40]}")
        return None
    if isinstance(like, Tensor):
        return _tensor(shape, flat, like, free)
    if not hasattr(like, "_fields"):
        if not isinstance(shape, list) or len(shape) != len(like):
            raise ValueError(f"a list of {len(like)} is wanted, not {str(shape)[:40]}")
        return tuple(_rebuild(part, flat, one, free) for part, one in zip(shape, like, strict=True))
    kind = type(like)
    if isinstance(shape, dict) and shape.get("kind") != kind.__name__:
        shape, flat = _taken_over(shape, flat, like)
    if not isinstance(shape, dict) or shape.get("kind") != kind.__name__:
        raise ValueError(f"a state of kind {kind.__name__} is wanted, not {str(shape)[:40]}")
    if set(shape) != {"kind", *kind._fields}:
        raise ValueError(f"a {kind.__name__} has {', '.join(kind._fields)}, not {str(sorted(shape))[:80]}")
    frees = [Free(growing(kind).get(name), getattr(kind, "slides", {}).get(name)) for name in kind._fields]
    parts = zip(kind._fields, like, frees, strict=True)
    return kind(*(_rebuild(shape[name], flat, part, free) for name, part, free in parts))


def _taken_over(shape: dict[str, Any], flat: Mapping[str, Tensor], like: Any) -> tuple[Any, Mapping[str, Tensor]]:
    """What is told of a state of another kind, told of the kind of `like` where that takes it over."""
    saved = {name: flat[at] for name, at in shape.items() if isinstance(at, str) and at in flat}
    own = like.earlier(str(shape.get("kind")), saved) if hasattr(like, "earlier") else None
    if own is None:
        return shape, flat
    return shape | {"kind": type(like).__name__}, {**flat, **{shape[name]: x for name, x in own.items()}}


def _tensor(shape: Any, flat: Mapping[str, Tensor], like: Tensor, free: Free) -> Tensor:
    """The tensor of that name: of the shape and type of `like`, but for its rows and the room of what grows.

    Of a window that was not full yet, the places that were are enough.
    """
    if not isinstance(shape, str) or shape not in flat:
        raise ValueError(f"no tensor of the file is named {str(shape)[:40]}")
    found = flat[shape].to(like.device)
    fits = found.ndim == like.ndim and all(
        a == b or d == 0 or (free.grows is not None and d == free.grows % like.ndim) or (d == free.slides and a < b)
        for d, (a, b) in enumerate(zip(found.shape, like.shape, strict=True))
    )
    if not fits or found.dtype != like.dtype:
        raise ValueError(
            f"'{shape}' is {tuple(found.shape)} of {found.dtype}, the model has {tuple(like.shape)} of {like.dtype}"
        )
    if free.slides is None or found.shape[free.slides] == like.shape[free.slides]:
        return found
    rest = list(found.shape)
    rest[free.slides] = like.shape[free.slides] - found.shape[free.slides]
    return torch.cat([found, found.new_zeros(rest)], free.slides)


__all__ = ["Saved", "load", "read", "save"]
