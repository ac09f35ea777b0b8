"""The memories themselves, between q, k, v and what is read: fast weights with their slow beginnings, and kernels.

Both have `steady()`, `log_keep(x, steady)`, `init_state(batch, capacity)` and `forward(x, qkv, log_keep, state,
segment_ids, steady)`, so that the mixer alone and the third channel of a global mixer take either (mixers.md,
section 4).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.mixers.features import FEATURES, orthonormal, widened
from atma.mixers.neural_config import NeuralConfig, check_sizes, rule_of
from atma.mixers.neural_gates import NeuralGates, Omega, inverse_softplus
from atma.mixers.neural_systems import KernelRule
from atma.mixers.recurrent_decays import Sizes
from atma.ops.backend import backend_for
from atma.ops.fast_weights import (
    Kernel,
    KernelState,
    Memory,
    MemoryState,
    Rule,
    empty,
    empty_kernel,
    fast_weights,
    kernel_memory,
)
from atma.ops.fast_weights.network import network
from atma.ops.fast_weights.retention import retained
from atma.ops.fast_weights.rule import RENORMS
from atma.ops.rows import unit

Figures = dict[str, Tensor]
"""By name, of each row and head (B, H)."""
SMALL_START = 0.02
"""Standard deviation of a matrix under a layer norm, whose gradient at zero is too steep."""


class FastWeights(nn.Module):
    """φ, the gates and the slow weights of a network that every token writes."""

    vectors = ("initial_1", "initial_2", "initial_3", "gain", "shift")

    def __init__(self, config: NeuralConfig, sizes: Sizes) -> None:
        super().__init__()
        assert config.feature is not None
        heads, value, inner = sizes.heads, sizes.value_width, check_sizes(config, sizes)
        self.rule = rule = rule_of(config, inner == value)
        self.feature = FEATURES[config.feature](heads, sizes.key_width, config.degree)
        self.gates = NeuralGates(config, rule, sizes, inner)
        hidden = config.hidden_width or 4 * (value if config.feature == "poly" else sizes.key_width)
        last = inner if rule.network == "matrix" else hidden
        shapes = [(heads, value, last), *[(heads, hidden, inner)] * (rule.matrices - 1)]
        first, second, third = [nn.Parameter(torch.empty(shape)) for shape in shapes] + [None] * (3 - len(shapes))
        self.initial_1, self.initial_2, self.initial_3 = first, second, third
        self.gain = nn.Parameter(torch.empty(heads, value)) if rule.norm else None
        self.shift = nn.Parameter(torch.empty(heads, value)) if rule.norm else None
        self.skip = nn.Parameter(torch.empty(heads, value, inner)) if rule.residual == "skip" else None
        self.scale = 1.0 if rule.norm else value**-0.5
        """Of v: unit length where there is no layer norm (section 4.1)."""

    def initial(self) -> tuple[nn.Parameter, ...]:
        """W⁰, of which there are one, two or three."""
        return tuple(w for w in (self.initial_1, self.initial_2, self.initial_3) if w is not None)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """What is no linear layer, those being set (section 4.9)."""
        self.feature.init_weights()
        self.gates.init_weights()
        for w in self.initial():
            nn.init.normal_(w, 0.0, deviation(self.rule, w.shape[-1]), generator=generator)
        if self.gain is not None and self.shift is not None:
            nn.init.ones_(self.gain)
            nn.init.zeros_(self.shift)
        if self.skip is not None:
            for one in self.skip:
                one.copy_(orthonormal(one.shape[0], one.shape[1], generator))

    def memory(self) -> Memory:
        """The rule and the slow weights as the operation takes them."""
        return Memory(self.rule, self.initial(), self.gain, self.shift, self.skip)

    def init_state(self, batch: int, capacity: int) -> MemoryState:
        """Before the first token; nothing grows. Gradients go through it to W⁰."""
        return empty(self.memory(), batch)

    def steady(self) -> bool:
        """Whether there is a form whose bits are a row's own."""
        return self.feature.steady and backend_for("auto", self.initial()[0], "fast_weights") == "native"

    def log_keep(self, x: Tensor, steady: bool = False) -> Tensor | None:
        """`NeuralGates.log_keep`."""
        return self.gates.log_keep(x, steady)

    def forward(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        log_keep: Tensor | None,
        state: MemoryState | None,
        segment_ids: Tensor | None,
        steady: bool = False,
    ) -> tuple[Tensor, MemoryState]:
        """q (B, H, T, K), k (B, G, T, K) and v (B, G, T, V) as they are, to what is read (B, H, T, V)."""
        q, k, v = map(widened, qkv)
        gates = self.gates(x, log_keep, steady)
        q, k, v = self.feature(q, steady), self.feature(k, steady), v * self.scale
        return fast_weights(q, k, v, gates, self.memory(), state, segment_ids, steady=steady)

    @torch.no_grad()
    def figures(self, x: Tensor, qkv: tuple[Tensor, ...], log_keep: Tensor | None, state: MemoryState) -> Figures:
        """What a diagnosis tells of a call before it is made, means over its tokens, each (B, H).

        `surprise`: ‖f(W; k) − v‖²/‖v‖² of what it has for the call's keys as it stands; 1 is as good as nothing.
        `write_strength`: θ, times Σ ω of a window. `weight_drift`: ‖A − W⁰‖ over all matrices, of kl the duals.
        """
        gates, memory, held = self.gates(x, log_keep), self.memory(), range(len(state.weights))
        pair = self.feature(widened(qkv[1])), widened(qkv[2]) * self.scale
        k, v = (one.repeat_interleave(len(memory.initial[0]) // one.shape[1], 1) for one in pair)
        missed = network(retained(state.weights, state.scale, self.rule), k, memory) - v
        moved = torch.stack([(state.weights[i] - memory.initial[i]).square().sum((-2, -1)) for i in held])
        strength = gates.step if gates.step.ndim == 3 else gates.step.mean(-1)
        written = strength if gates.omega is None else strength * gates.omega.sum(-1)
        surprise = missed.square().sum((-2, -1)) / v.square().sum((-2, -1)).clamp(min=torch.finfo(v.dtype).tiny)
        return {"surprise": surprise, "write_strength": written.mean(-1), "weight_drift": moved.sum(0).sqrt()}


class KernelMemory(nn.Module):
    """Every key and the value written at it, read by exp(s (q·k − 1)) (section 4.7)."""

    def __init__(self, config: NeuralConfig, sizes: Sizes) -> None:
        super().__init__()
        check_sizes(config, sizes)
        assert config.kernel_rule is not None and config.memory_window is not None
        self.rule: KernelRule = config.kernel_rule
        self.normalise, self.window = bool(config.normalise), config.memory_window
        self.widths = sizes.key_width, sizes.value_width
        self.omega = Omega(sizes, self.window)
        self.raw = nn.Parameter(torch.empty(sizes.heads))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """Sharpness √K, linear layers being set."""
        self.omega.init_weights()
        nn.init.constant_(self.raw, inverse_softplus(math.sqrt(self.widths[0])))

    def memory(self) -> Kernel:
        """The kernel as the operation takes it."""
        return Kernel(F.softplus(widened(self.raw)), self.rule, self.window, self.normalise)

    @torch.no_grad()
    def init_state(self, batch: int, capacity: int) -> KernelState:
        """Before the first token, with room for `capacity`."""
        return empty_kernel(self.memory(), batch, capacity, self.widths)

    def steady(self) -> bool:
        """Whether there is a form whose bits are a row's own."""
        return backend_for("auto", self.raw, "fast_weights") == "native"

    def log_keep(self, x: Tensor, steady: bool = False) -> None:
        """Nothing is forgotten."""

    def forward(
        self,
        x: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        log_keep: Tensor | None,
        state: KernelState | None,
        segment_ids: Tensor | None,
        steady: bool = False,
    ) -> tuple[Tensor, KernelState]:
        """As `FastWeights.forward`; values as they are."""
        q, k, v = map(widened, qkv)
        omega, memory = self.omega(x, steady), self.memory()
        return kernel_memory(unit(q, steady), unit(k, steady), v, omega, memory, state, segment_ids, steady=steady)


def memory_of(config: NeuralConfig, sizes: Sizes) -> Any:
    """The memory of a configuration. ValueError: sizes that do not fit it."""
    return (KernelMemory if config.network == "kernel" else FastWeights)(config, sizes)


def deviation(rule: Rule, columns: int) -> float:
    """Of the entries of W⁰. A matrix alone starts at zero, but where its norm is taken or followed."""
    if rule.retention == "kl":
        return 1.0
    if rule.network != "matrix" or rule.retention == "lq" or rule.retention in RENORMS:
        return columns**-0.5
    return SMALL_START if rule.norm else 0.0
