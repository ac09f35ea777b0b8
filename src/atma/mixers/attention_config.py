"""The options of the global mixer (atma.mixers.attention)."""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from atma.mixers.heads import HeadsConfig
from atma.strict import UNSAID, require

CanonInit = Literal["uniform", "previous"]


@dataclass(frozen=True)
class AttentionConfig(HeadsConfig):
    """Heads, core, memory and Canon. Sizes are counts."""

    core: str = "polar"
    """How queries read keys; its own options stand beside these."""
    memory: bool | str = True
    """The third channel, by name, with its own options beside these; true is the gated-delta memory, false none."""
    window: int | None = None
    """Most keys that a query sees, its own among them."""
    window_sinks: int = field(default=0, metadata=UNSAID)
    """Attention sinks: so many first tokens of a text, which every query sees beside its window."""
    memory_scale: bool = field(default=False, metadata=UNSAID)
    """The memory's channel is multiplied, number by number, by a learned α that starts at zero; its output projection
    then does not (mixers.md, formula 7.1)."""
    canon_taps: int = 4
    """Tokens that Canon, the convolution of queries, keys and values, sees; its own among them."""
    canon_init: CanonInit = "previous"
    """"previous" starts the upper half of every key's channels as those of the token before; "uniform" is published."""
    share_query_key_init: bool = True
    """Start every query projection equal to that of its key head, so that equal tokens match from the first step.
    Cores with Canon only: without it every token would match itself. False is the published form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.canon_taps >= 1, "canon_taps", self.canon_taps, "at least 1")
        require(self.window is None or self.window >= 1, "window", self.window, "at least 1, or left out")
        beside = self.window_sinks == 0 or self.window is not None
        require(beside and self.window_sinks >= 0, "window_sinks", self.window_sinks, "0, or more with a window")
        object.__setattr__(self, "memory", {"delta": True, "none": False}.get(str(self.memory), self.memory))


class Settings(NamedTuple):
    """The configuration of a global mixer and of its parts."""

    own: AttentionConfig
    core: Any
    memory: Any
    """None without one."""
