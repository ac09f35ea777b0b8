"""Paths of the residual stream: what the mixer and the MLP of each layer add to it, taken away or weighed otherwise.

The last stream is the sum of the embedding and of what all layers add, so that each addition goes two ways: straight to
what the head reads, and through all later layers (path ensemble, arXiv 2308.06548, of which pruning takes away
straight paths and EnsembleScale weighs them). "whole" is both ways, "straight" the first alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from atma.model import Model

Way = Literal["whole", "straight"]
BRANCHES = ("mixer", "mlp")


class Path(NamedTuple):
    """What one branch of one layer adds to the stream."""

    layer: int
    branch: str
    way: Way = "whole"

    def __str__(self) -> str:
        return f"the {self.branch} of layer {self.layer}" + (" at the head" if self.way == "straight" else "")


def paths(model: Model, way: Way) -> list[Path]:
    """Every path of a model."""
    blocks = enumerate(model.blocks)
    return [Path(layer, branch, way) for layer, block in blocks for branch in BRANCHES if getattr(block, branch)]


@contextmanager
def weighed(model: Model, path: Path, factor: float) -> Iterator[None]:
    """Inside, what the path adds counts `factor` times, its biases too; 0 takes it away. ValueError: no such path."""
    if path.branch not in BRANCHES or not 0 <= path.layer < len(model.blocks):
        raise ValueError(f"there is no {path}; layers are 0 to {len(model.blocks) - 1}, each with mixer and mlp")
    branch = getattr(model.blocks[path.layer], path.branch)
    if branch is None:
        raise ValueError(f"{path}: the model has no MLPs")
    with ExitStack() as stack:
        if path.way == "whole":
            stack.callback(branch.register_forward_hook(_times(factor)).remove)
        else:
            added: list[Tensor] = []
            stack.callback(branch.register_forward_hook(_keep(added)).remove)
            stack.callback(model.norm.register_forward_pre_hook(_beside(added, factor - 1)).remove)
        yield


def _added(result: Any) -> Tensor:
    """What a mixer (y, state) or an MLP returned for the stream."""
    return result[0] if isinstance(result, tuple) else result


def _times(factor: float) -> Callable[..., Any]:
    def hook(_module: nn.Module, _given: tuple[Any, ...], result: Any) -> Any:
        y = _added(result)
        scaled = y * factor if factor else y.new_zeros(y.shape)
        return (scaled, *result[1:]) if isinstance(result, tuple) else scaled

    return hook


def _keep(added: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _given: tuple[Any, ...], result: Any) -> None:
        added[:] = [_added(result)]

    return hook


def _beside(added: list[Tensor], more: float) -> Callable[..., Any]:
    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0] + more * added.pop(), *given[1:])

    return hook


__all__ = ["BRANCHES", "Path", "Way", "paths", "weighed"]
