"""Polar attention, and softmax attention for the controls, over the same streamed statistics."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation, own_precision, recording
from atma.ops.segments import document_start

FEW_QUERIES = 16
"""Queries up to which the operations around the sums cost more than the sums: compiled, without gradients, they are two
passes."""


@own_precision
def polar_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length_gain: Tensor,
    null_base: Tensor,
    null_slope: Tensor,
    magnitude_slope: Tensor,
    null_value: Tensor,
    start: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int | None = None,
    count_limit: int | None = None,
    sharpening: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Direction and magnitude of what each query sees (maths.md, section 4; ATMA, arXiv 2606.25156).

    q (B, H, T, K); k, v (B, G, S, K) with H a multiple of G; length_gain, null_base, null_slope, magnitude_slope (H,);
    null_value (H, K). start (B,) int: keys already held before this call, so query i of row b stands at position
    start[b] + i and sees keys up to it; keys beyond are ignored (None: all zero). segment_ids (B, T), training only: a
    query sees its own document, positions count from that document's start. window: only the last `window` keys.
    count_limit: number of visible keys n beyond which the null floor grows no more and the temperature's ln n grows
    `sharpening` times as fast (None: both as published, at any n).
    Returns direction (B, H, T, K), of length at most 1, and magnitude (B, H, T) in [0, 1), in q's dtype; statistics are
    float32 for lower precisions.
    """
    scalars = (length_gain, null_base, null_slope, magnitude_slope, null_value)
    check_tensors("q k v length_gain null_base null_slope magnitude_slope null_value", q, k, v, *scalars)
    check_shapes(q, k, v, start, segment_ids, window)
    check_scalars(q.shape[1], q.shape[3], scalars, count_limit)
    work = torch.promote_types(q.dtype, torch.float32)
    first, last = visible_range(q, start, segment_ids, window)
    if q.shape[2] <= FEW_QUERIES and not recording() and backend_for(backend, q, "polar") == "native":
        wide = tuple(x.to(work) for x in scalars)
        attend = implementation("polar", "native").attend
        c, magnitude = attend(q, k, v, first, last, wide, count_limit, sharpening)
        return c.to(q.dtype), magnitude.to(q.dtype)
    count = (last - first).to(work)
    temperature, floor = temperature_and_floor(count, length_gain, null_base, null_slope, count_limit, sharpening)
    S, L, Q, M = statistics_of(backend, q)(q, k, v, temperature * q.shape[-1] ** -0.5, first, last)
    c, magnitude = fold(S, L, Q, temperature * floor - M, magnitude_slope.to(work), null_value.to(work))
    return c.to(q.dtype), magnitude.to(q.dtype)


@own_precision
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    start: Tensor | None = None,
    segment_ids: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention at `scale`, arguments as in `polar_attention`. Returns (B, H, T, K) in q's dtype."""
    check_tensors("q k v", q, k, v)
    check_shapes(q, k, v, start, segment_ids, window)
    first, last = visible_range(q, start, segment_ids, window)
    scales = torch.full((1,), scale, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    S, L, _, _ = statistics_of(backend, q)(q, k, v, scales.expand(q.shape[:-1]), first, last)
    return (S / L.unsqueeze(-1)).to(q.dtype)


def temperature_and_floor(
    count: Tensor,
    length_gain: Tensor,
    null_base: Tensor,
    null_slope: Tensor,
    count_limit: int | None = None,
    sharpening: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """t and ν (B, H, T), by which the logits of a query that sees n keys are t s and t ν (maths.md, section 4).

    count (B, T): n, floating, whose dtype the results have; length_gain, null_base, null_slope (H,). With m = min(n,
    count_limit): t = 1 + sp(length_gain) (ln m + sharpening ln(n/m)) and ν = null_base + sp(null_slope) √ln(m + 1).
    """
    count = count[:, None]
    gain, base, slope = (x.to(count.dtype)[:, None] for x in (length_gain, null_base, null_slope))
    log_count = count.log()
    if count_limit is not None:
        count = count.clamp(max=count_limit)
        log_count = count.log() + sharpening * (log_count - count.log())
    return 1 + F.softplus(gain) * log_count, base + F.softplus(slope) * (count + 1).log().sqrt()


def statistics_of(backend: str, q: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The `statistics(q, k, v, scale, first, last)` of a backend for q: S (B, H, T, K), L, Q and M (B, H, T).

    Query i of row b sees the keys first[b, i] ≤ s < last[b, i]; its logits are a = scale[b, i] q·k, and M = max a,
    L = Σ e^(a−M), Q = Σ e^(2(a−M)), S = Σ e^(a−M) v, float32 or wider. M is a constant for gradients: what is built
    from the sums does not depend on it.
    """
    return implementation("polar", backend_for(backend, q, "polar")).statistics


def fold(
    S: Tensor, L: Tensor, Q: Tensor, null_logit: Tensor, magnitude_slope: Tensor, null_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Direction (…, K) and magnitude from the streamed sums and the null's logit relative to their maximum M."""
    shift = null_logit.detach().clamp(min=0)
    p0, small = (null_logit - shift).exp(), (-shift).exp()
    kept = L * small
    Z = kept + p0
    d = S * small.unsqueeze(-1) + p0.unsqueeze(-1) * null_value[:, None]
    c = d / torch.maximum(torch.linalg.vector_norm(d, dim=-1, keepdim=True), 1e-6 * Z.detach().unsqueeze(-1))
    effective = L.square() / Q * (kept / Z)
    return c, torch.tanh(F.softplus(magnitude_slope)[:, None] * effective.log1p())


def logits_of(
    q: Tensor, last: Tensor, scalars: tuple[Tensor, ...], count_limit: int | None, sharpening: float
) -> tuple[Tensor, Tensor]:
    """t / √K and t ν (B, H, T) of queries q (B, H, T, K) that see last (B, T) int32 keys, float32 or wider.

    scalars: length_gain, null_base and null_slope (H,), as in `temperature_and_floor`.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    if not recording() and backend_for("auto", q, "polar") == "native":
        wide = tuple(x.to(work) for x in scalars)
        logit_scalars = implementation("polar", "native").logit_scalars
        return logit_scalars(q, torch.zeros_like(last), last, wide, count_limit, sharpening)
    gain, base, slope = scalars
    temperature, floor = temperature_and_floor(last.to(work), gain, base, slope, count_limit, sharpening)
    return temperature * q.shape[-1] ** -0.5, temperature * floor


def folded(
    sums: tuple[Tensor, Tensor, Tensor, Tensor], null: Tensor, magnitude_slope: Tensor, null_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Direction (B, H, T, K) and magnitude (B, H, T) of S, L, Q, M and the null's logit (B, H, T), compiled where it
    can be."""
    S, L, Q, M = sums
    slope, value = magnitude_slope.to(S.dtype), null_value.to(S.dtype)
    if not recording() and backend_for("auto", S, "polar") == "native":
        return implementation("polar", "native").folded(S, L, Q, M, null, slope, value)
    return fold(S, L, Q, null - M, slope, value)


def visible_range(
    q: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """first and last (B, T) int32: the query at index i sees the keys first[i] ≤ s < last[i], itself the last."""
    index = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
    last = index.expand(q.shape[0], -1) + 1 if start is None else start.to(torch.int32)[:, None] + index + 1
    first = torch.zeros_like(last)
    if segment_ids is not None:
        first = document_start(segment_ids)
    if window is not None:
        first = torch.maximum(first, last - window)
    return first, last


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, segment_ids: Tensor | None, window: int | None
) -> None:
    """ValueError with the offending value when the arguments of an attention do not fit each other."""
    if q.ndim != 4 or k.ndim != 4 or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q and k must be (B, H, T, K) and (B, G, S, K), none 0, not {tuple(q.shape)}, {tuple(k.shape)}"
        )
    batch, heads, length, width = q.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != width or heads % k.shape[1] != 0:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if start is None and k.shape[2] != length:
        raise ValueError(f"without start there must be one key per query: {length} queries, {k.shape[2]} keys")
    if start is not None and segment_ids is not None:
        raise ValueError("segment_ids marks packed documents in training; a call with a start continues one document")
    check_indices("start", start, (batch,), q.device)
    check_indices("segment_ids", segment_ids, (batch, length), q.device)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if start is not None and length > 1 and start.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in start.aminmax())  # one query is not made to wait for it
        if low < 0 or high + length > k.shape[2]:
            raise ValueError(f"start must leave room for {length} of {k.shape[2]} keys; found {low} to {high}")


def check_scalars(heads: int, width: int, scalars: tuple[Tensor, ...], count_limit: int | None) -> None:
    """ValueError with the offending value when the scalars of polar attention are not one number, or row, per head."""
    names = ("length_gain", "null_base", "null_slope", "magnitude_slope")
    for name, value in zip(names, scalars[:4], strict=True):
        if value.shape != (heads,):
            raise ValueError(f"{name} must be ({heads},), one number per query head, not {tuple(value.shape)}")
    if scalars[4].shape != (heads, width):
        raise ValueError(f"null_value must be {(heads, width)}, one row per query head, not {tuple(scalars[4].shape)}")
    if count_limit is not None and count_limit < 1:
        raise ValueError(f"count_limit must be at least 1, not {count_limit}")


__all__ = ["polar_attention", "softmax_attention", "temperature_and_floor"]
