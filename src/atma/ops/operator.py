"""Custom operators with a gradient by hand, each registered by one call."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor

from atma.ops.backend import recording


def operator(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None,
    shapes: Callable[..., Any],
    results: tuple[str, ...] = ("y",),
    like: Mapping[str, str] | None = None,
) -> Callable[..., Any]:
    """`forward` as it is where nothing is recorded, else as the operator `name` of `torch.library`.

    shapes: the results without data, of the same arguments. backward (None: no gradient) takes the gradients of the
    first results, and after them what it asks for by the names of forward's arguments and of `results`: only that is
    kept. Results without a gradient are constants. It returns the gradients of forward's first arguments, in their
    order; that of an absent one is empty. `like`: which argument of backward a gradient is shaped as, where it is not
    the one of its own name.
    """
    operation = torch.library.custom_op(name, forward, mutates_args=())
    operation.register_fake(shapes)
    if backward is not None:
        _differentiable(operation, f"{name}_backward", forward, backward, results, like or {})

    def call(*arguments: Any) -> Any:
        return (operation if recording() else forward)(*arguments)

    return call


def _differentiable(
    operation: Any, name: str, forward: Callable, backward: Callable, results: tuple[str, ...], like: Mapping[str, str]
) -> None:
    names, taken = tuple(signature(forward).parameters), tuple(signature(backward).parameters)
    kept = [name for name in taken if name in names or name in results]
    given = len(taken) - len(kept)  # results that have a gradient
    count = len(get_args(signature(backward).return_annotation)) or 1
    gradient_operation = torch.library.custom_op(name, backward, mutates_args=())

    @gradient_operation.register_fake
    def _(*arguments):
        at = dict(zip(taken, arguments, strict=True))
        shaped = [at[like.get(name, name)] for name in names[:count]]
        found = tuple(shaped[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in shaped)
        return found[0] if count == 1 else found

    def save(ctx: Any, inputs: tuple, output: Any) -> None:
        output = output if isinstance(output, tuple) else (output,)
        at = dict(zip(results, output, strict=True)) | dict(zip(names, inputs, strict=True))
        tensors = [at[name] if isinstance(at[name], Tensor) else None for name in kept]
        ctx.save_for_backward(*tensors)
        ctx.numbers = [None if isinstance(at[name], Tensor) else at[name] for name in kept]
        ctx.absent = [x is None for x in inputs]
        ctx.mark_non_differentiable(*output[given:])
        ctx.set_materialize_grads(True)

    def gradient(ctx: Any, *gradients: Tensor) -> tuple:
        tensors = ctx.saved_tensors  # read once: under activation checkpointing they are computed again for it
        held = [number if x is None else x for x, number in zip(tensors, ctx.numbers, strict=True)]
        found = gradient_operation(*gradients[:given], *held)
        found = (found,) if count == 1 else tuple(found)
        found += (None,) * (len(names) - count)
        return tuple(None if absent else x for x, absent in zip(found, ctx.absent, strict=True))

    operation.register_autograd(gradient, setup_context=save)


__all__ = ["operator"]
