"""The operations under the mixers. Each folder holds its public function, its oracle and its fast path."""

from atma.ops.backend import backend_for, use_backend
from atma.ops.conv import causal_conv, gated_conv
from atma.ops.fast_weights import fast_weights, kernel_memory
from atma.ops.loss import softcap_loss
from atma.ops.polar import polar_attention, softmax_attention
from atma.ops.recurrent import gated_delta, recurrence

__all__ = [
    "backend_for",
    "causal_conv",
    "fast_weights",
    "gated_conv",
    "gated_delta",
    "kernel_memory",
    "polar_attention",
    "recurrence",
    "softcap_loss",
    "softmax_attention",
    "use_backend",
]
