"""Attention as most public checkpoints have it: grouped-query attention (arXiv 2305.13245) around any core.

Llama, Qwen, LFM2, Gemma, OLMo and their kin differ in biases, in the norms of queries and keys, and in whether a gate
stands behind the heads. What reads the keys is a core as in the global mixer, and a third channel may stand beside it.
"""

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from atma.layers import Linear, RMSNorm
from atma.mixers.attention import Attention, AttentionConfig, Settings
from atma.mixers.base import Place

Norm = Literal["none", "head", "all"]


@dataclass(frozen=True)
class GroupedQueryConfig(AttentionConfig):
    """Biases, norms and gate; rotary softmax attention without a memory, if nothing else is said."""

    core: str = "rotary"
    memory: bool | str = False
    query_key_norm: Norm = "none"
    """RMS norms with learned weights of queries and of keys: of each head by itself, or of all heads together."""
    input_bias: bool = False
    """Biases of the projections to queries, keys, values and gate."""
    output_bias: bool = False
    """A bias of the output projection."""
    output_gate: bool = False
    """Multiply what the heads read by σ of a projection, which lies behind each head's query."""


class GroupedQueryAttention(Attention):
    """q, k, v [and gate] → [RMS] → core → [gate] → out_proj, plus the core's and the memory's channel."""

    Config = GroupedQueryConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = self.own = cast(GroupedQueryConfig, config.own)
        inner, shared = self.heads * self.head_width, self.groups * self.head_width
        self.q_proj = Linear(place.width, inner * (2 if own.output_gate else 1), own.input_bias)
        self.k_proj = Linear(place.width, shared, own.input_bias)
        self.v_proj = Linear(place.width, shared, own.input_bias)
        self.out_proj = Linear(inner, place.width, own.output_bias)
        self.q_norm, self.k_norm = (self._norm(count, place) for count in (self.heads, self.groups))

    def _norm(self, heads: int, place: Place) -> RMSNorm | None:
        if self.own.query_key_norm == "none":
            return None
        width = self.head_width if self.own.query_key_norm == "head" else heads * self.head_width
        return RMSNorm(width, place.epsilon, place.norm_plus_one)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """`Attention.queries`."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        return q.tensor_split((self.key_width,), -1) if self.own.output_gate else (q, None)  # pyright: ignore[reportReturnType]

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`Attention.normed`."""
        return _normed(q, self.q_norm), _normed(k, self.k_norm)


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """x (B, T, heads, K) by a norm of each head, or of all together."""
    if norm is None:
        return x
    whole = cast(RMSNorm, norm).weight.shape[0] != x.shape[-1]
    return norm(x.flatten(2)).unflatten(-1, x.shape[2:]) if whole else norm(x)


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
SMALL = (
    _TINY | {"rotary_theta": 100.0},
    _TINY | {"window": 7, "query_key_norm": "head", "input_bias": True, "output_bias": True, "score_scale": 0.3},
    _TINY | {"query_key_norm": "all", "output_gate": True, "rotary_share": 0.5, "memory": True},
    _TINY | {"window": 5, "window_sinks": 3, "memory": "kda", "memory_scale": True},
    *(_TINY | {"core": "rotary_homotopy", "rotary_canon": True, "start_mix": mix} for mix in (0.0, 0.3, 1.0)),
    _TINY | {"core": "rotary_homotopy", "rotary_share": 0.5, "start_mix": 1.0, "start_fade": 0.4},
    _TINY | {"rotary_share": 0.0, "window": 5},
    _TINY | {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_trained": 16, "rotary_theta": 100.0},
)
