"""Public functions of the systems that linear recurrences come from, as the benchmark calls them.

Each takes q, k, v (B, T, H, ·), the logs of decays, β where there is one, and for a step the memory (B, H, K, V); it
gives the read with queries scaled by 1/√K, and for a step the memory after it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import unwrap
from types import ModuleType

import torch
from torch import Tensor

from atma.bench.available import peer

Function = Callable[..., Sequence[Tensor]]
QWEN, MAMBA = "transformers.models.qwen3_next.modeling_qwen3_next", "transformers.models.mamba2.modeling_mamba2"
MAMBA_CHUNK = 256
"""That of the published configuration."""
FLA_CHUNK = 64
"""Of flash-linear-attention's plain functions; that of KDA takes whole chunks alone."""


def peers_of(
    kind: str, step: bool, length: int, where: tuple[str, torch.device], notes: list[str]
) -> dict[str, Function]:
    """By name, those of a kind in chunks or in a step that are here and take this length; `where`: dtype and device."""
    dtype, device = where
    # The Triton kernels of flash-linear-attention take no float32.
    kernels = device.type == "cuda" and dtype != "float32"
    return _PEERS[kind](step, length, kernels, notes)


def _delta(step: bool, length: int, kernels: bool, notes: list[str]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    if (qwen := peer(QWEN, notes)) is not None:
        name = "recurrent" if step else "chunk"
        # The function itself: the name stands for a Triton kernel where flash-linear-attention is installed.
        found[f"transformers {name}"] = partial(_call, unwrap(getattr(qwen, f"torch_{name}_gated_delta_rule")))
    if kernels and (fla := peer("fla.ops.gated_delta_rule", notes)) is not None:
        name, rule = (
            ("recurrent", fla.fused_recurrent_gated_delta_rule) if step else ("chunk", fla.chunk_gated_delta_rule)
        )
        found[f"fla {name}"] = partial(_call, rule)
    return found


def _kda(step: bool, length: int, kernels: bool, notes: list[str]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    if (naive := peer("fla.ops.kda.naive", notes)) is not None:
        found["fla naive"] = partial(_call, naive.naive_recurrent_kda)
        if not step and length % FLA_CHUNK == 0:
            found["fla naive chunk"] = partial(_call, naive.naive_chunk_kda)
    if kernels and (fla := peer("fla.ops.kda", notes)) is not None:
        name, rule = ("recurrent", fla.fused_recurrent_kda) if step else ("chunk", fla.chunk_kda)
        found[f"fla {name}"] = partial(_call, rule)
    return found


def _gla(step: bool, length: int, kernels: bool, notes: list[str]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    if (naive := peer("fla.ops.gla.naive", notes)) is not None:
        found["fla naive"] = partial(_call_gla, naive.naive_recurrent_gla)
    if kernels and (fla := peer("fla.ops.gla", notes)) is not None:
        name, rule = ("recurrent", fla.fused_recurrent_gla) if step else ("chunk", fla.chunk_gla)
        found[f"fla {name}"] = partial(_call_gla, rule)
    return found


def _mamba2(step: bool, length: int, kernels: bool, notes: list[str]) -> dict[str, Function]:
    found: dict[str, Function] = {}
    if (mamba := peer(MAMBA, notes)) is not None:
        found["transformers step" if step else "transformers chunk"] = partial(_mamba_step if step else _scan, mamba)
    if not step and (simple := peer("fla.ops.simple_gla.naive", notes)) is not None:
        found["fla naive chunk"] = partial(_call_weighed, simple.naive_chunk_simple_gla)
    return found


_PEERS = {"delta": _delta, "kda": _kda, "gla": _gla, "mamba2": _mamba2}


def _call(rule: Callable, *tensors: Tensor) -> Sequence[Tensor]:
    q, k, v, log_decay, beta, *memory = tensors
    return _read(rule(q, k, v, g=log_decay.float(), beta=beta, **_state(memory)), memory)


def _call_gla(rule: Callable, *tensors: Tensor) -> Sequence[Tensor]:
    q, k, v, log_decay, *memory = tensors
    return _read(rule(q, k, v, log_decay, **_state(memory)), memory)


def _call_weighed(rule: Callable, *tensors: Tensor) -> Sequence[Tensor]:
    q, k, v, log_decay, beta = tensors
    q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
    return [rule(q, k, v * beta.unsqueeze(-1), log_decay)[0]]


def _state(memory: list[Tensor]) -> dict[str, object]:
    return {"initial_state": memory[0] if memory else None, "output_final_state": bool(memory)}


def _read(found: Sequence[Tensor], memory: list[Tensor]) -> Sequence[Tensor]:
    return found[:2] if memory else found[:1]


def _scan(mamba: ModuleType, *tensors: Tensor) -> Sequence[Tensor]:
    """Its step Δ is both β and the decay's factor: ours are apart, so values come times β / Δ, which wants float32."""
    q, k, v, *gates = tensors
    log_decay, beta = (x.float() for x in gates)
    values, rate = v * (beta / -log_decay).unsqueeze(-1), -torch.ones(v.shape[2], device=q.device)
    found = unwrap(mamba.mamba2_chunk_scan)(values, -log_decay, rate, k, q * q.shape[-1] ** -0.5, MAMBA_CHUNK)
    return [found[0] if isinstance(found, tuple) else found]


def _mamba_step(mamba: ModuleType, *tensors: Tensor) -> Sequence[Tensor]:
    q, k, v, log_decay, beta, memory = (x[:, 0] if x.ndim < 4 or x.shape[1] == 1 else x for x in tensors)
    state, rate = memory.mT.clone(), -torch.ones(v.shape[1], 1, 1, device=q.device)
    values, step = v * (beta / -log_decay).unsqueeze(-1), -log_decay.unsqueeze(-1)
    read = unwrap(mamba.mamba2_selective_state_update)(state, values, step, rate, k, q * q.shape[-1] ** -0.5)
    return [read.unsqueeze(1), state.mT]
