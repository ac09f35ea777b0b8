"""Matrices that travel in bfloat16: of weights in parts, those that a step in bfloat16 would round anyway.

Autocast turns the weight of a linear layer into bfloat16 each time that it is read, and the rounded copy stays until
the backward pass. Here parts are rounded before they are gathered: half as many bytes are sent, and what is gathered is
the copy, which is let go of between the passes with the weights that it was gathered with. The layer still meets a
float32 parameter (`Gathered`), so its products, its gradient in float32 and their sums are those of a step without it.
Whatever else would read such a parameter is refused, for it would read rounded numbers: a class of modules names the
parameters that it reads in float32 in its `exact`.

FSDP's extension points are those of its documentation of tensor subclasses: `fsdp_pre_all_gather` of the part that a
process keeps, and `fsdp_post_all_gather`, which makes the whole.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

LOW = torch.bfloat16


class Rows(Tensor):
    """This process's rows of a matrix, in float32; they are gathered in bfloat16."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        return made.as_subclass(cls) if func is Tensor.to else made  # which is how FSDP brings them to a GPU

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """What is sent: as many rows of each process, those of the last filled up."""
        low = self.new_zeros((-(-outer_size[0] // mesh.size()), *outer_size[1:]), dtype=LOW)
        low[: self.shape[0]].copy_(self)
        return (low,), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole from what has come, the first time; later it comes to the same place."""
        return None if out is not None else (Gathered(outputs[0]), ())


class Gathered(Tensor):
    """A matrix of float32 to whoever asks, that is there in bfloat16 alone and can be read as that alone."""

    low: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, low: Tensor) -> "Gathered":
        shape, strides = low.size(), low.stride()
        made = Tensor._make_wrapper_subclass(cls, shape, strides, dtype=torch.float32, device=low.device)  # pyright: ignore
        made.low = low
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Gathered({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrix, given = args[0], kwargs or {}
        if isinstance(matrix, Gathered):
            if func is torch.ops.aten._to_copy.default and given.get("dtype") == LOW:
                return matrix.low.detach()  # as autograd and autocast see it; nothing is copied
            if func.is_view:
                return cls(func(matrix.low, *args[1:], **given))
            if func.overloadpacket in _LIKE:
                return func(matrix.low, *args[1:], **{"dtype": torch.float32, **given})
        shape = next(tuple(x.shape) for x in args if isinstance(x, Gathered))
        raise ValueError(
            f"a weight {shape} that travels in bfloat16 is read in float32 by {func}: let the class of its module "
            "name it in 'exact', or train in float32 (train.precision)"
        )


_LIKE = tuple(
    getattr(torch.ops.aten, name) for name in ("empty_like", "zeros_like", "new_empty", "new_zeros", "new_full")
)
"""What takes shape and place alone of a tensor."""


def low_names(model: nn.Module, states: bool = False) -> set[str]:
    """The parameters that travel in bfloat16: float32 weights of linear layers that nothing but those holds.

    Not those that a class of modules names in its `exact`, by their names within it. states: whether layers make states
    in training, for which the weight of a layer with an adapter is computed.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    linear: dict[int, set[bool]] = {}
    exact: set[int] = set()
    for place, module in model.named_modules():
        computed = states and isinstance(getattr(type(module), "weight", None), property)
        for name, parameter in module.named_parameters(recurse=False):
            plain = isinstance(module, nn.Linear) and name == "weight" and not computed
            linear.setdefault(id(parameter), set()).add(plain)
        exact |= {id(every[f"{place}.{name}".lstrip(".")]) for name in getattr(type(module), "exact", ())}
    return {
        name
        for name, parameter in model.named_parameters()
        if linear[id(parameter)] == {True} and id(parameter) not in exact and parameter.dtype == torch.float32
    }


def round_before_gathering(model: nn.Module, names: set[str]) -> None:
    """Let these parameters of a model in parts travel in bfloat16 from now on."""
    for name, parameter in model.named_parameters():
        if name in names:
            sharded = cast(Any, parameter)
            sharded._local_tensor = sharded._local_tensor.as_subclass(Rows)
