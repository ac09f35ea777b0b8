"""What moves information between tokens: the local gated convolution and the global attention with its memory."""

from atma.mixers.attention import Attention
from atma.mixers.delta_memory import DeltaMemory
from atma.mixers.gated_conv import GatedConv

__all__ = ["Attention", "DeltaMemory", "GatedConv"]
