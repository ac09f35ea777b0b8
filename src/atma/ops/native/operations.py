"""How each of PyTorch's own operations is recorded: the table that a `Recorder` looks in.

A kernel here is given the recorder, the result's tensor, and all arguments of the operation in the order of its schema.
What an operation of the table also allows, but no kernel computes, is refused by `Unrecordable`. An operation in place
is recorded as the one that is not, with its own argument as the result.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atma.ops.native import arranging
from atma.ops.native.strided import COMPARISONS, Unrecordable, along, pointwise, product

if TYPE_CHECKING:
    from atma.ops.native.recorder import Recorder

aten = torch.ops.aten
Kernel = Callable[..., None]
FEW_ROWS = 8
"""Rows of a product by a constant matrix; with more, PyTorch's own takes less time than its calls cost."""


def kernel_of(function: Any) -> Kernel | None:
    """The kernel of an operation, in place or not. None: it has none."""
    name, overload = function._schema.name.removeprefix("aten::"), function._overloadname
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return KERNELS.get(function if packet is None else getattr(packet, overload, None))


def _of(form: str, *only: Any) -> Kernel:
    """Of one tensor, with the options `only`; without any here they change no number."""

    def record(_: "Recorder", y: Tensor, x: Tensor, *options: Any) -> None:
        if only and options != only:
            raise Unrecordable(f"{form} with the options {options} has no compiled kernel")
        pointwise(form, y, x)

    return record


def _both(form: str) -> Kernel:
    return lambda _, y, a, b: pointwise(form, y, a, b)


def _scaled(form: str, turned: bool = False) -> Kernel:
    """a ± alpha b, or `turned` b ± alpha a."""

    def record(recorder: "Recorder", y: Tensor, a: Any, b: Any, alpha: float = 1) -> None:
        a, b = (b, a) if turned else (a, b)
        if alpha != 1:
            b = recorder.run(aten.mul.Tensor, b, alpha) if isinstance(b, Tensor) else b * alpha
        pointwise(form, y, a, b)

    return record


def _logical(form: str) -> Kernel:
    """Of bools, as 0 and 1."""

    def record(_: "Recorder", y: Tensor, a: Tensor, b: Any = 0) -> None:
        if a.dtype != torch.bool or (isinstance(b, Tensor) and b.dtype != torch.bool):
            raise Unrecordable("operations on the bits of numbers have no compiled kernel")
        pointwise(form, y, a, b)

    return record


def _along(form: str) -> Kernel:
    """One number of a row each, over some dimensions, one after the other."""

    def record(recorder: "Recorder", y: Tensor, x: Tensor, dims: Any = None, keep: bool = False, *_: Any) -> None:
        over = sorted(_dimensions(x, dims), reverse=True)
        for dim in over[:-1]:
            shorter = recorder.place(torch.empty([1 if d == dim else n for d, n in enumerate(x.shape)], dtype=y.dtype))
            along(form, shorter, x, dim)
            x = shorter
        kept = y if keep else y.view([1 if d in over else n for d, n in enumerate(x.shape)])
        along(form, kept, x, over[-1]) if over else pointwise("copy", y, x)

    return record


def _dimensions(x: Tensor, dims: Any) -> set[int]:
    if dims is None or dims == []:
        return set(range(x.ndim))
    return {dim % max(x.ndim, 1) for dim in ([dims] if isinstance(dims, int) else dims)} if x.ndim else set()


def _total(form: str) -> Kernel:
    return lambda recorder, y, x, *_: _along(form)(recorder, y, x)


def _each(form: str) -> Kernel:
    """A row of numbers for a row, along one dimension."""
    return lambda _, y, x, dim, *__: along(form, y, x, dim) if x.ndim else along(form, y[None], x[None], 0)


def _length(recorder: "Recorder", y: Tensor, x: Tensor, order: float, dims: Any, keep: bool, *_: Any) -> None:
    if order != 2 or not x.ndim:
        raise Unrecordable("a norm other than the Euclidean one has no compiled kernel")
    _along("length")(recorder, y, x, dims, keep)


def _clamp(_: "Recorder", y: Tensor, x: Tensor, low: float | None = None, high: float | None = None) -> None:
    pointwise("copy", y, x)
    if low is not None:
        pointwise("maximum", y, y, low)
    if high is not None:
        pointwise("minimum", y, y, high)


def _power(_: "Recorder", y: Tensor, x: Any, exponent: Any) -> None:
    if isinstance(exponent, int | float) and exponent == 2:
        pointwise("mul", y, x, x)
    elif not y.dtype.is_floating_point:
        raise Unrecordable(f"the power {exponent} of integers has no compiled kernel")
    elif isinstance(exponent, int | float) and exponent == 0.5:
        pointwise("sqrt", y, x)
    else:
        pointwise("power", y, x, exponent)


def _lerp(recorder: "Recorder", y: Tensor, x: Tensor, end: Tensor, weight: Any) -> None:
    step = recorder.run(aten.mul.Tensor, recorder.run(aten.sub.Tensor, end, x), weight)
    pointwise("add", y, x, step)


def _addc(multiply: Any) -> Kernel:
    def record(recorder: "Recorder", y: Tensor, x: Tensor, a: Tensor, b: Tensor, value: float) -> None:
        _scaled("add")(recorder, y, x, recorder.run(multiply, a, b), value)

    return record


def _layer_norm(
    recorder: "Recorder", y: Tensor, x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float
) -> None:
    if len(shape) != 1:
        raise Unrecordable("a layer norm of more than one dimension has no compiled kernel")
    centred = recorder.run(aten.sub.Tensor, x, recorder.run(aten.mean.dim, x, [-1], True))
    square = recorder.run(aten.mean.dim, recorder.run(aten.mul.Tensor, centred, centred), [-1], True)
    pointwise("mul", y, centred, recorder.run(aten.rsqrt.default, recorder.run(aten.add.Tensor, square, eps)))
    for form, x in (("mul", weight), ("add", bias)):
        if x is not None:
            pointwise(form, y, y, x)


def _triangle(keep: Callable[[Tensor, int], Tensor]) -> Kernel:
    def record(recorder: "Recorder", y: Tensor, x: Tensor, diagonal: int) -> None:
        mask = recorder.constant(keep(torch.ones(x.shape[-2:], dtype=torch.bool), diagonal))
        pointwise("where", y, mask, x, 0.0)

    return record


def _product(recorder: "Recorder", y: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None) -> None:
    """Of matrices or of as many in a row."""
    if b.ndim == 2 and a.shape[0] > FEW_ROWS and not recorder.depends(b):
        raise Unrecordable(f"{a.shape[0]} rows by a constant matrix (more than {FEW_ROWS}) are left to PyTorch")
    if y.ndim == 2:
        y, a, b = y[None], a[None], b[None]
    product(y, a, b, add)


def _added_product(
    recorder: "Recorder", y: Tensor, add: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float
) -> None:
    if beta != 1 or alpha != 1:
        raise Unrecordable("a sum and a product with factors has no compiled kernel")
    _product(recorder, y, a, b, add)


def _attention(recorder: "Recorder", y: Tensor, *arguments: Any) -> None:
    """softmax(q kᵀ · scale + mask) v of (B, H, T, K), (B, H, S, K) and (B, H, S, K)."""
    q, k, v, dropout, causal, mask, scale = arguments
    if dropout or causal or q.shape[:2] != k.shape[:2]:
        raise Unrecordable("attention with dropout, a causal mask or groups of heads has no compiled kernel")
    scores = recorder.place(torch.empty(*q.shape[:3], k.shape[2], dtype=q.dtype))
    for row in range(len(q)):
        product(scores[row], q[row], k[row].mT)
    pointwise("mul", scores, scores, q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        pointwise("add", scores, scores, mask)
    weights = recorder.run(aten._softmax.default, scores, -1, False)
    for row in range(len(q)):
        product(y[row], weights[row], v[row])


KERNELS: dict[Any, Kernel] = {
    **arranging.KERNELS,
    aten.abs.default: _of("abs"),
    aten.floor.default: _of("floor"),
    aten.sqrt.default: _of("sqrt"),
    aten.rsqrt.default: _of("rsqrt"),
    aten.exp.default: _of("exp"),
    aten.exp2.default: _of("exp2"),
    aten.expm1.default: _of("expm1"),
    aten.log.default: _of("log"),
    aten.log1p.default: _of("log1p"),
    aten.tanh.default: _of("tanh"),
    aten.cos.default: _of("cos"),
    aten.sin.default: _of("sin"),
    aten.erf.default: _of("erf"),
    aten.sigmoid.default: _of("sigmoid"),
    aten.log_sigmoid_forward.default: _of("log_sigmoid"),
    aten.silu.default: _of("silu"),
    aten.gelu.default: _of("gelu", "none"),
    aten.softplus.default: _of("softplus", 1, 20),
    aten.elu.default: _of("elu", 1, 1, 1),
    aten.relu.default: lambda _, y, x: pointwise("maximum", y, x, 0),
    aten.neg.default: lambda _, y, x: pointwise("mul", y, x, -1),
    aten.reciprocal.default: lambda _, y, x: pointwise("div", y, 1, x),
    aten.add.Tensor: _scaled("add"),
    aten.add.Scalar: _scaled("add"),
    aten.sub.Tensor: _scaled("sub"),
    aten.sub.Scalar: _scaled("sub"),
    aten.rsub.Tensor: _scaled("sub", turned=True),
    aten.rsub.Scalar: _scaled("sub", turned=True),
    aten.mul.Tensor: _both("mul"),
    aten.mul.Scalar: _both("mul"),
    aten.div.Tensor: _both("div"),
    aten.div.Scalar: _both("div"),
    aten.remainder.Tensor: _both("remainder"),
    aten.remainder.Scalar: _both("remainder"),
    aten.floor_divide.default: _both("floor_divide"),
    aten.maximum.default: _both("maximum"),
    aten.minimum.default: _both("minimum"),
    **{getattr(getattr(aten, name), kind): _both(name) for name in COMPARISONS for kind in ("Scalar", "Tensor")},
    aten.pow.Tensor_Scalar: _power,
    aten.pow.Tensor_Tensor: _power,
    aten.pow.Scalar: _power,
    aten.lerp.Scalar: _lerp,
    aten.lerp.Tensor: _lerp,
    aten.addcmul.default: _addc(aten.mul.Tensor),
    aten.addcdiv.default: _addc(aten.div.Tensor),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda _, y, x, high: _clamp(_, y, x, None, high),
    aten.logical_and.default: _logical("minimum"),
    aten.logical_or.default: _logical("maximum"),
    aten.logical_not.default: _logical("eq"),
    aten.bitwise_and.Tensor: _logical("minimum"),
    aten.bitwise_or.Tensor: _logical("maximum"),
    aten.bitwise_not.default: _logical("eq"),
    aten.where.self: lambda _, y, mask, a, b: pointwise("where", y, mask, a, b),
    aten.masked_fill.Scalar: lambda _, y, x, mask, value: pointwise("where", y, mask, value, x),
    aten.masked_fill.Tensor: lambda _, y, x, mask, value: pointwise("where", y, mask, value, x),
    aten.tril.default: _triangle(torch.tril),
    aten.triu.default: _triangle(torch.triu),
    aten.sum.default: _total("sum"),
    aten.sum.dim_IntList: _along("sum"),
    aten.mean.default: _total("mean"),
    aten.mean.dim: _along("mean"),
    aten.amax.default: _along("largest"),
    aten.amin.default: _along("smallest"),
    aten.any.default: _total("largest"),
    aten.any.dim: _along("largest"),
    aten.all.default: _total("smallest"),
    aten.all.dim: _along("smallest"),
    aten.logsumexp.default: _along("logsumexp"),
    aten.linalg_vector_norm.default: _length,
    aten.cumsum.default: _each("cumsum"),
    aten._softmax.default: _each("softmax"),
    aten._log_softmax.default: _each("log_softmax"),
    aten.native_layer_norm.default: _layer_norm,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.mv.default: lambda recorder, y, a, x: _product(recorder, y[:, None], a, x[:, None]),
    aten.dot.default: lambda recorder, y, a, b: _product(recorder, y[None, None], a[None], b[:, None]),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
"""What is recorded, each in place too."""
