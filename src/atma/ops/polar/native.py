"""The streamed statistics by the compiled kernel (ops/native/polar.cpp): float32, float64 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.paged import native as paged
from atma.ops.paged.pages import Pages
from atma.ops.polar.operator import statistics_operator
from atma.ops.polar.poison import kept_apart

_FIELDS = (
    "batch heads queries width groups keys threads q_batch q_head q_query k_batch k_head k_key v_batch v_head v_key "
    "scale_batch scale_head scale_query q k v scale first last S L Q M grad_q grad_k grad_v"
)


def statistics(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference's arguments and results. bfloat16 is read as it is; sums are float32."""
    return _operation(q, k, v, scale, first, last)


def attend(
    q: Tensor,
    k: Tensor | Pages,
    v: Tensor | Pages,
    first: Tensor,
    last: Tensor,
    scalars: tuple[Tensor, ...],
    count_limit: int | None,
    sharpening: float,
) -> tuple[Tensor, Tensor]:
    """The whole of polar attention without gradients, for few queries: three calls in place of some forty operations.

    scalars: length_gain, null_base, null_slope, magnitude_slope (H,) and null_value (H, K), float32 or wider. Returns
    direction (B, H, T, K) and magnitude (B, H, T) in their dtype.
    """
    magnitude_slope, null_value = scalars[3:]
    scale, null = logit_scalars(q, first, last, scalars[:3], count_limit, sharpening)
    if isinstance(k, Pages) and isinstance(v, Pages):
        S, L, Q, M = paged.statistics(q, k, v, scale, first, last)
    else:
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        S, L, Q, M = _forward(q, k, v, scale, first, last)
    return folded(S, L, Q, M, null, magnitude_slope, null_value)


def folded(
    S: Tensor, L: Tensor, Q: Tensor, M: Tensor, null: Tensor, magnitude_slope: Tensor, null_value: Tensor
) -> tuple[Tensor, Tensor]:
    """`fold`, compiled; null is the null's logit itself."""
    S, null, magnitude_slope, null_value = (x.contiguous() for x in (S, null, magnitude_slope, null_value))
    direction, magnitude = torch.empty_like(S), torch.empty_like(L)
    fields = "rows heads queries width S L Q M null magnitude_slope null_value direction magnitude"
    places = native.addresses(S, L, Q, M, null, magnitude_slope, null_value, direction, magnitude)
    native.call("polar_fold", S.dtype, fields, (L.numel(), *S.shape[1:], *places))
    return direction, magnitude


def logit_scalars(
    q: Tensor,
    first: Tensor,
    last: Tensor,
    scalars: tuple[Tensor, ...],
    count_limit: int | None,
    sharpening: float,
) -> tuple[Tensor, Tensor]:
    """t / √K and t ν (B, H, T) of `temperature_and_floor`, compiled; scalars: length_gain, null_base, null_slope."""
    first, last, (gain, base, slope) = first.contiguous(), last.contiguous(), (x.contiguous() for x in scalars)
    scale, null = (torch.empty(q.shape[:-1], dtype=gain.dtype) for _ in range(2))
    fields = "batch heads queries width count_limit first last length_gain null_base null_slope scale null sharpening"
    places = native.addresses(first, last, gain, base, slope, scale, null)
    native.call("polar_scalars", gain.dtype, fields, (*q.shape, count_limit or 0, *places, sharpening))
    return scale, null


@kept_apart
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = torch.empty(q.shape, dtype=scale.dtype)
    L, Q, M = (torch.empty(q.shape[:-1], dtype=scale.dtype) for _ in range(3))
    _call("polar_forward", (q, k, v, scale, first, last), (S, L, Q, M), (None, None, None))
    return S, L, Q, M


def _backward(
    grad_S: Tensor,
    grad_L: Tensor,
    grad_Q: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    M: Tensor,
    first: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q = torch.empty(q.shape, dtype=M.dtype)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=M.dtype) for x in (k, v))
    given = tuple(x.contiguous() for x in (grad_S, grad_L, grad_Q, M))
    _call("polar_backward", (q, k, v, scale, first, last), given, (grad_q, grad_k, grad_v))
    grad_scale = (grad_q * q).sum(-1)
    return grad_q.mul_(scale.unsqueeze(-1)).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_scale


def _call(name: str, inputs: tuple[Tensor, ...], rows: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
    q, k, v, scale, first, last = inputs
    dtype = q.dtype if q.dtype == k.dtype == v.dtype else scale.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    first, last = first.contiguous(), last.contiguous()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *scale.stride())
    places = native.addresses(q, k, v, scale, first, last, *rows, *grads)
    values = (*q.shape, k.shape[1], k.shape[2], torch.get_num_threads(), *strides, *places)
    native.call(name, q.dtype, _FIELDS, values)


_operation = statistics_operator("atma::attention_statistics_native", _forward, _backward)
