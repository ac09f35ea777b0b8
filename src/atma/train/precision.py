"""Whether a run computes in bfloat16: asked for, or where the machine gains from it."""

import torch

from atma.config import Precision

LEAST_WIDTH = 64
"""Narrower models spend their time outside matrix products."""


def choose_precision(wanted: Precision, device: torch.device, width: int) -> torch.dtype:
    """The compute type of a run. Weights, optimiser, residual stream and statistics are float32 either way.

    "auto" is bfloat16 where the hardware multiplies it: GPUs that do; CPUs with AVX512-BF16 or AMX from width 64 on.
    On one core of an AVX512-BF16 machine forward and backward of the nano model (width 128) are 1.44 times as fast, of
    nano-test (width 64) 1.15; limited to AVX2 they are 7 and 4 times slower (benchmarks/training_choices.py).
    """
    if wanted != "auto":
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and width >= LEAST_WIDTH and cpu_multiplies_bfloat16()
    return torch.bfloat16 if gains else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether PyTorch reports bfloat16 matrix instructions; False where it reports nothing (older versions)."""
    report = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(report.get("avx512_bf16") or report.get("amx_bf16"))
