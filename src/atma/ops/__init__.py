"""The operations under the mixers. Each folder holds its public function, its oracle and its fast path."""

from atma.ops.backend import backend_for, use_backend
from atma.ops.conv import causal_conv, gated_conv
from atma.ops.loss import softcap_loss
from atma.ops.polar import polar_attention, softmax_attention
from atma.ops.recurrent import gated_delta, recurrence

__all__ = [
    "backend_for",
    "causal_conv",
    "gated_conv",
    "gated_delta",
    "polar_attention",
    "recurrence",
    "softcap_loss",
    "softmax_attention",
    "use_backend",
]
