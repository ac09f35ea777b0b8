"""Whether a run computes in bfloat16: asked for, or where the machine gains from it."""

import torch

from atma.config import Precision


def choose_precision(wanted: Precision, device: torch.device, width: int) -> torch.dtype:
    """The compute type of a run: weights, optimiser and statistics stay float32 either way.

    "auto" is bfloat16 on a GPU that has it and float32 on a CPU.
    """
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32
