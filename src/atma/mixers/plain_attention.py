"""Softmax attention without a surround: queries and keys of something else than the layer's input (2510.11602).

No norm, no Canon, no positions, no gate: q and k are projections of a source, v of x, and the heads' reads go through
one projection that starts at zero. With the token embedding as source it is StaticQK; with the rows of a frozen table,
one a position, RndEmbQK and FixedSeqQK (mixers.md, section 5.4).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Call, Mixer, Place
from atma.mixers.heads import Attended, Heads, HeadsConfig
from atma.mixers.held import GlobalState, State, behind
from atma.mixers.softmax import SoftmaxConfig, SoftmaxCore
from atma.mixers.window import WindowState
from atma.ops.backend import backend_for
from atma.ops.dense import rms_norm
from atma.ops.segments import tokens_before
from atma.strict import require


@dataclass(frozen=True)
class PlainConfig(HeadsConfig):
    """Sizes are counts."""

    window: int | None = None
    """Most keys that a query sees, its own among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.window is None or self.window >= 1, "window", self.window, "at least 1, or left out")


class PlainAttention(Mixer):
    """softmax(q kᵀ / √K) v of q, k = Linear(source) and v = Linear(x); a subclass says what the source is."""

    Config = PlainConfig

    def __init__(self, config: PlainConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads, self.groups = config, config.query_heads, config.key_value_heads
        self.width, self.epsilon = place.width, place.epsilon
        self.held_width = config.head_width
        inner, shared = self.heads * config.head_width, self.groups * config.head_width
        self.q_proj = Linear(place.width, inner, bias=False)
        self.k_proj = Linear(place.width, shared, bias=False)
        self.v_proj = Linear(place.width, shared, bias=False)
        self.out_proj = Linear(inner, place.width, bias=False)
        self.core = SoftmaxCore(
            SoftmaxConfig(), Heads(place, self.heads, self.groups, config.head_width, config.window)
        )

    def init_state(self, batch: int, capacity: int) -> State:
        """Room for `capacity` keys, or those of the window, in each of `batch` rows; none held yet."""
        weight, window = self.v_proj.weight, self.config.window
        held = weight.new_zeros(batch, self.groups, window or capacity, self.held_width)
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        kind = WindowState if window else GlobalState
        return kind(length, held, held.clone(), None, None, None, None)

    def project(self, source: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """source and x (B, T, D) to q (B, H, T, K), k and v (B, G, T, K)."""
        made = (self.q_proj(source), self.k_proj(source), self.v_proj(x))
        q, k, v = (z.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2) for z in made)
        return q, k, v

    def read(self, q: Tensor, seen: Attended, segment_ids: Tensor | None) -> Tensor:
        """What the queries (B, H, T, K) read (B, H, T, K)."""
        return self.core(q, seen.keys, seen.values, seen.start, segment_ids)[0]

    def attend(
        self, source: Tensor, x: Tensor, state: State | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, State | None]:
        """`Mixer.forward` with q and k made of source (B, T, D)."""
        q, k, v = self.project(source, x)
        seen = behind(state, k, v)
        y = self.out_proj(self.read(q, seen, segment_ids).transpose(1, 2).flatten(2))
        if state is None:
            return y, None
        assert seen.held is not None
        return y, type(state)(state.length + x.shape[1], *seen.held, None, None, None, None)

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`: what is attended."""
        return {"read": self.out_proj}

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: with the compiled operations it is, as it is."""
        return on and all(backend_for("auto", self.v_proj.weight, name) == "native" for name in ("dense", "polar"))

    @property
    def reach(self) -> int | None:
        """`Mixer.reach`."""
        return None if self.config.window is None else self.config.window - 1


class StaticQK(PlainAttention):
    """The source is the RMS-normalised embedding of each token: who attends to whom is a matter of words alone."""

    reads_call = True

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        segment_ids: Tensor | None = None,
        call: Call | None = None,
    ) -> tuple[Tensor, State | None]:
        """x (B, T, D) to y (B, T, D). ValueError without the record of the model's call, where the embedding is."""
        if call is None:
            raise ValueError("static_qk reads the token embedding: give it the record of the model's call as call=")
        source = rms_norm(call.embedding.to(x.dtype), None, self.width, self.epsilon)
        return self.attend(source, x, state, segment_ids)


@dataclass(frozen=True)
class PositionConfig(PlainConfig):
    """And the table of positions."""

    maximum: int = 2048
    """Positions that there are; a longer text is refused."""
    table_seed: int = 0
    """Of the table's numbers, N(0, 1): RndEmbQK."""
    table_tokens: tuple[int, ...] = ()
    """Tokens of a text, at least `maximum`, whose first embeddings are the table in place of that: FixedSeqQK."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.maximum >= 1, "maximum", self.maximum, "at least 1")
        require(0 <= self.table_seed < 2**32, "table_seed", self.table_seed, "of 32 bits, 0 or more")
        count = len(self.table_tokens)
        enough = count == 0 or (count >= self.maximum and min(self.table_tokens) >= 0)
        require(enough, "table_tokens", count, f"at least maximum = {self.maximum} ids of tokens, or none")


class PositionQK(PlainAttention):
    """The source of token n is row n of a frozen table, RMS-normalised: who attends to whom is a matter of places."""

    Config = PositionConfig
    config: PositionConfig

    def __init__(self, config: PositionConfig, place: Place) -> None:
        super().__init__(config, place)
        generator = torch.Generator().manual_seed(config.table_seed)
        self.register_buffer("table", torch.randn(config.maximum, place.width, generator=generator))
        self.table: Tensor

    @torch.no_grad()
    def embedded(self, weight: Tensor) -> None:
        """`Mixer.embedded`: the table is the first embeddings of the fixed text, where there is one."""
        if self.config.table_tokens:
            tokens = torch.tensor(self.config.table_tokens[: self.config.maximum], device=weight.device)
            largest = int(tokens.max())
            require(largest < len(weight), "table_tokens", largest, f"below vocab_size = {len(weight)}")
            self.table.copy_(weight[tokens])

    def forward(
        self, x: Tensor, state: State | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """x (B, T, D) to y (B, T, D). ValueError for a text longer than `maximum`."""
        index = torch.arange(x.shape[1], device=x.device)
        if segment_ids is not None:
            position = tokens_before(segment_ids)
        else:
            position = index.expand(x.shape[:2]) if state is None else state.length[:, None] + index
        self._check(position)
        source = rms_norm(self.table[position.long()].to(x.dtype), None, self.width, self.epsilon)
        return self.attend(source, x, state, segment_ids)

    def _check(self, position: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if (last := int(position.max())) >= self.config.maximum:
            raise ValueError(
                f"a text of {last + 1} tokens passes the {self.config.maximum} positions of position_qk; "
                "train one with a larger 'maximum', or shorten the text"
            )


SMALL = ({"query_heads": 2, "key_value_heads": 1, "head_width": 8, "window": 7},)
