"""Attention with narrow queries and keys: its cache holds qk_rank numbers a key in place of head_width.

Either the projections are so narrow from the start; or they are of full width, and what enters the scores keeps the
directions in which the keys of a trained model vary, which `atma compress` finds (DR-RL; mixers.md, section 5.7).
What is attended is as wide as ever: keys are widened when they are read, so memory is saved and not time.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.mixers.attention import Attention, AttentionConfig, Settings
from atma.mixers.base import Place
from atma.mixers.heads import Attended, Core, Held
from atma.ops.polar import visible_range
from atma.ops.polar.held import hold
from atma.strict import require


@dataclass(frozen=True)
class LowRankConfig(AttentionConfig):
    """The rank; softmax attention without positions or memory, if nothing else is said."""

    core: str = "nope"
    memory: bool | str = False
    qk_rank: int = 32
    """Numbers of each held key, r."""
    directions: bool = False
    """Project head_width wide and keep r fixed directions, as `atma compress` writes it, not r wide from the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.head_width if self.directions else self.head_width - 1
        require(1 <= self.qk_rank <= most, "qk_rank", self.qk_rank, f"from 1 to {most} of head_width {self.head_width}")
        require(self.window is None, "window", self.window, "left out: a window's cache is small as it is")
        turned = self.core != "rope" or self.directions or self.qk_rank % 4 == 0
        require(turned, "qk_rank", self.qk_rank, 'a multiple of 4 for core = "rope"')
        alone = self.directions or self.memory is False
        require(alone, "memory", self.memory, "false: it reads queries and keys of head_width, not of qk_rank")


class LowRankState(NamedTuple):
    """Of `LowRankAttention`: as `GlobalState`, with keys of qk_rank numbers, and not in pages."""

    length: Tensor
    keys: Tensor  # (B, G, capacity, r)
    values: Tensor  # (B, G, capacity, K)
    q_tail: Tensor | None
    k_tail: Tensor | None
    v_tail: Tensor | None
    memory: Any

    grows = {"keys": 2, "values": 2}  # noqa: RUF012 (a field otherwise)


class Narrowed(Core):
    """A core between which and its keys there are only r numbers a key.

    `turn` gives wide queries and narrow keys, `widened` what the core reads of them. With directions Q (G, K, r) these
    are Q Qᵀ q, Qᵀ k and Q Qᵀ k, turned where they are wide; without, both are r wide, turned so and filled up with
    zeros.
    """

    def __init__(self, inner: Core, width: int, directions: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.inner, self.width, self.window = inner, width, inner.window
        self.register_buffer("directions", directions)
        self.directions: Tensor | None

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Core.init_weights`; the directions are not learned."""
        self.inner.init_weights(generator)

    def turn(self, q: Tensor, k: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Core.turn`, keys (B, G, T, r) narrow. With directions, places count from the row's start."""
        if self.directions is None:
            q, k = self.inner.turn(q, k, start, segment_ids)
            return self.widened(q), k
        _, last = visible_range(q, start, None, None)
        return self.turned(q, last - 1), k @ self.directions.to(k.dtype)

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """`Core.turned`, of what is not narrowed yet."""
        if self.directions is None:
            return self.widened(self.inner.turned(x, position))
        Q = self.directions.to(x.dtype).repeat_interleave(x.shape[1] // self.directions.shape[0], 0)
        return self.inner.turned(x @ Q @ Q.mT, position)

    def widened(self, k: Tensor) -> Tensor:
        """k (B, G, S, r), of the places from 0 on, as the core reads it (B, G, S, K)."""
        if self.directions is None:
            return F.pad(k, (0, self.width - k.shape[-1]))
        place = torch.arange(k.shape[2], device=k.device, dtype=torch.int32)[None]
        return self.inner.turned(k @ self.directions.to(k.dtype).mT, place)

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`Core.forward`, of what is widened."""
        return self.inner(q, k, v, start, segment_ids)

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        """`Core.scale_and_null`."""
        return self.inner.scale_and_null(q, count)

    def channels(self) -> dict[str, nn.Linear]:
        """`Core.channels`."""
        return self.inner.channels()


class LowRankAttention(Attention):
    """`Attention` whose state holds r numbers a key."""

    Config = LowRankConfig

    def __init__(self, config: Settings, place: Place) -> None:
        super().__init__(config, place)
        own = config.own
        assert isinstance(own, LowRankConfig)
        self.rank, directions = own.qk_rank, None
        if own.directions:
            directions = torch.eye(self.head_width)[:, : self.rank].repeat(self.groups, 1, 1)
        else:
            require(
                own.core in ("nope", "rope"), "core", own.core, "a softmax core, nope or rope, where qk_rank is trained"
            )
        self.core = Narrowed(self.core, self.head_width, directions)

    def key_width_of(self, own: AttentionConfig) -> int:
        """`Attention.key_width_of`."""
        assert isinstance(own, LowRankConfig)
        return own.head_width if own.directions else own.qk_rank

    def init_state(self, batch: int, capacity: int) -> LowRankState:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Attention.init_state`."""
        length, _, values, *rest = super().init_state(batch, capacity)
        assert isinstance(values, Tensor)
        return LowRankState(length, values.new_zeros(batch, self.groups, capacity, self.rank), values, *rest)

    def attended(self, state: Any, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
        """`Attending.attended`: narrow k behind those held, all of them widened."""
        core = self.core
        assert isinstance(core, Narrowed)
        if state is None:
            return Attended(core.widened(k), v, None)
        keys, values = (
            hold(held, held, new, new, state.length)[0] for held, new in ((state.keys, k), (state.values, v))
        )
        return Attended(core.widened(keys), values, state.length, (keys, values))

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: there is no such form of widened keys."""
        return False


_TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8}
SMALL = (
    {**_TINY, "qk_rank": 4, "core": "rope", "rope_canon": True},
    {**_TINY, "qk_rank": 3, "directions": True, "core": "rope"},
    {**_TINY, "qk_rank": 5, "directions": True, "core": "polar", "memory": True},
)
