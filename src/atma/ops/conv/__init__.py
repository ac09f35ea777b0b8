"""Causal depthwise convolution with a carried tail and document boundaries."""

from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation

LANES = 16
"""Channels come in multiples of this for the compiled gated convolution: a vector of the widest machine."""


def causal_conv(
    x: Tensor, weight: Tensor, tail: Tensor | None = None, segment_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y[t] = Σ_w weight[:, w] · x[t − W + 1 + w], taps outside the document read zero.

    x (B, T, C); weight (C, W), its last tap sees the current token; tail (B, W−1, C): inputs before x (None: zeros);
    segment_ids (B, T), equal within a document, only without a tail. Returns (B, T, C) in x's dtype.
    """
    check_tensors("x weight tail", x, weight, tail)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be (batch, length, channels), none of them 0, not {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1] or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be ({x.shape[-1]}, taps ≥ 1) for x of shape {tuple(x.shape)}, not {tuple(weight.shape)}"
        )
    expected = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    if tail is not None and tuple(tail.shape) != expected:
        raise ValueError(f"tail must be {expected}, not {tuple(tail.shape)}")
    if tail is not None and segment_ids is not None:
        raise ValueError("segment_ids marks packed documents in training; a call with a tail continues one document")
    check_indices("segment_ids", segment_ids, (x.shape[0], x.shape[1]), x.device)
    weight = weight.to(x.dtype)
    chosen = implementation("conv", backend_for(backend, x, "conv"))
    return chosen.causal_conv(x, weight, tail, segment_ids)


def gated_conv(h: Tensor, weight: Tensor, segment_ids: Tensor | None = None, backend: str = "auto") -> Tensor:
    """c ⊙ conv(b ⊙ u) of h = [b, c, u] (maths.md, section 2), as a local mixer without a state computes it.

    h (B, T, 3C); weight (C, W) and segment_ids (B, T) as in `causal_conv`. Returns (B, T, C) in h's dtype. Compiled, it
    is one pass over h, and keeps only h for its gradient.
    """
    check_tensors("h weight", h, weight)
    channels = weight.shape[0]
    if h.ndim != 3 or weight.ndim != 2 or 0 in h.shape or 0 in weight.shape or h.shape[-1] != 3 * channels:
        raise ValueError(f"h {tuple(h.shape)} and weight {tuple(weight.shape)} must be (B, T, 3C) and (C, W), none 0")
    if channels % LANES == 0 and backend_for(backend, h, "conv") == "native":
        check_indices("segment_ids", segment_ids, (h.shape[0], h.shape[1]), h.device)
        return implementation("conv", "native").gated_conv(h, weight.to(h.dtype), segment_ids)
    b, c, u = h.chunk(3, -1)
    return c * causal_conv(b * u, weight, None, segment_ids, backend)


__all__ = ["causal_conv", "gated_conv"]
