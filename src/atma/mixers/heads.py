"""What the parts of a global mixer are told of it: attention cores and memories."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from atma.mixers.base import Mixer, Place
from atma.ops.chosen import Sums
from atma.ops.paged.pages import Pages
from atma.strict import check_fields, require

Held = Tensor | Pages
"""Keys or values: those of the call, those that a state holds, or pages of them."""


class Heads(NamedTuple):
    """The heads that a part works for."""

    place: Place
    heads: int
    """H, query heads."""
    groups: int
    """G, heads of keys and values."""
    head_width: int
    """K."""
    window: int | None
    """Most keys that a query sees, its own among them; None for all."""


class Core(nn.Module):
    """How queries read keys and values: `read, added = core(q, k, v, start, segment_ids)`.

    Built as `cls(config, heads)` with its own frozen `Config`. read (B, H, T, K) goes through the mixer's gate and
    output projection; added (B, T, D), or None, is a channel of its own.
    """

    Config: ClassVar[type]
    plain_softmax: ClassVar[bool] = False
    """Whether it is softmax over the visible keys and nothing else, so that the sums of parts of them can be added."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.window = heads.window

    @classmethod
    def canon(cls, config: Any) -> bool:
        """Whether the mixer convolves q, k and v (Canon) before this core."""
        return True

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Set every parameter; here nothing is learned."""

    def turn(self, q: Tensor, k: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """q (B, H, T, K) and k (B, G, T, K) with their positions in them; here there are none."""
        return q, k

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """x (B, H, T, K) with the given positions (B or 1, T) in it."""
        return x

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See the class. start (B,) is where each row's first query stands, None without a state."""
        raise NotImplementedError(f"{type(self).__name__} reads nothing")

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:
        """What scores q·k are multiplied by (B, H, T), and the logit of the null sink, None without one.

        q (B, H, T, K); count (B or 1, T): visible keys of each query.
        """
        raise NotImplementedError(f"{type(self).__name__} tells nothing of its scores")

    def scored(self, q: Tensor, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """`scale_and_null` of queries that see `last` (B, T) int32 keys each."""
        return self.scale_and_null(q, last)

    def assemble(self, sums: Sums, null: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What `forward` gives, in `dtype`, of the sums over whatever keys are read, and the null's logit (B, H, T)."""
        raise NotImplementedError(f"{type(self).__name__} is not made of sums over keys")

    def handed(self, direction: Tensor, magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What a polar core gives of a direction (B, H, T, K) and a magnitude (B, H, T). ValueError: it is none."""
        raise ValueError(f"{type(self).__name__} has no direction and magnitude, which alone are certified")

    @property
    def assembles(self) -> bool:
        """Whether it is made of sums over keys, so that some of them may be left out."""
        forward, assemble = (
            next(cls for cls in type(self).__mro__ if name in vars(cls)) for name in ("forward", "assemble")
        )
        return forward is assemble and assemble is not Core

    def toward_own(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, own: tuple[Tensor, Tensor], strength: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` with each head's map of weights w moved to the identity, (1 − s) w + s I: diagnosis asks for it.

        own: key and value (B, G, T, K) of each query's own token; strength s (H,), from 0 to 1.
        """
        raise NotImplementedError(f"{type(self).__name__} has no map of weights that could be moved")

    def channels(self) -> dict[str, nn.Linear]:
        """The projections of what is added, by name."""
        return {}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`, of the core; the mixer has seen to it that attention is compiled."""
        return False


@dataclass(frozen=True)
class HeadsConfig:
    """How many heads, and how wide. Sizes are counts."""

    query_heads: int = 8
    """H, heads that read."""
    key_value_heads: int = 2
    """G, heads of keys and values, each read by H/G query heads."""
    head_width: int = 128
    """K, numbers of a query, a key and a value."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("query_heads", "key_value_heads", "head_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        divides = self.query_heads % self.key_value_heads == 0
        require(divides, "key_value_heads", self.key_value_heads, f"a divisor of query_heads = {self.query_heads}")


class Memory(nn.Module):
    """A third channel beside what is attended: `y, state = memory(x, q, k, v, state)`.

    Built as `cls(config, heads)` with its own frozen `Config`. It reads the mixer's q, k and v without positions, and
    ends in a projection `out_proj` that starts at zero. It takes its decays from `log_decay(x)`, where it has any.
    """

    Config: ClassVar[type]
    out_proj: nn.Linear

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Set every parameter."""
        raise NotImplementedError(f"{type(self).__name__} does not set its parameters")

    def init_state(self, batch: int) -> Any:
        """What an empty memory is: a tensor, or a NamedTuple of tensors, batch first."""
        raise NotImplementedError(f"{type(self).__name__} holds nothing")

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: Any, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, T, D), q (B, H, T, K), k and v (B, G, T, K) and a state or None. Returns (B, T, D) and the state."""
        raise NotImplementedError(f"{type(self).__name__} computes nothing")

    @property
    def forgets(self) -> bool:
        """Whether it has decays, which `log_decay` then tells."""
        return hasattr(self, "log_decay")

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`, of the memory."""
        return False


class Sinks(NamedTuple):
    """The first tokens of each row's text, beside a window."""

    keys: Tensor
    """(B, G, s, K), zero where the text has not come so far."""
    values: Tensor
    length: Tensor
    """(B,): tokens before this call."""


class Attended(NamedTuple):
    """What the queries of a call read, and what the state then holds."""

    keys: Held
    """(B, G, S, K)."""
    values: Held
    start: Tensor | None
    """(B,): where among the keys each row's first query stands; None without a state, and then it is the first."""
    held: tuple[Held, Held] | None = None
    """The keys and values of the state after the call."""
    ring: bool = False
    """Whether these are a window's as they lie, the newest at its own place, and not in the order of positions."""
    sinks: Sinks | None = None
    """The first tokens of the text, where a state holds them beside a window."""


class Projected(NamedTuple):
    """What a core reads: q and gate (B, H, T, K), k and v (B, G, T, K), and the Canon inputs (B, T, ·) behind them.

    The gate is None where there is none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    inputs: tuple[Tensor, Tensor, Tensor]


class Attending(Mixer):
    """A mixer whose queries read keys, as diagnosis and the distractor loss look at it."""

    core: Core
    seat: Heads
    """What its parts are told of it."""
    memory: Memory | None
    groups: int
    head_width: int
    width: int
    """D, of the stream."""

    def project(self, x: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> Projected:
        """x (B, T, D) to what the core reads, before positions."""
        raise NotImplementedError(f"{type(self).__name__} projects nothing")

    def attended(self, state: Any, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
        """What queries see that come with new k and v (B, G, T, K), positions in them, behind a state or without one.

        It consumes the state, as the call of the mixer does. `in_order`: keys are wanted in the order of positions,
        where those of a single query might else lie in any.
        """
        raise NotImplementedError(f"{type(self).__name__} holds nothing")


__all__ = ["Attended", "Attending", "Core", "Heads", "HeadsConfig", "Held", "Memory", "Projected", "Sinks"]
