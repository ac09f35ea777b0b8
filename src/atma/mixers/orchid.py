"""Orchid, causal: a long convolution whose kernel follows the text (mixers.md, section 5.1; after 2402.18508).

The kernel is one that is learned and one that is made of how the text so far correlates with itself. The latter is made
anew after every C-th token of the text, on a grid of positions and not of calls. Many tokens are computed by Fourier
transforms, a chunk of the grid at a time; a single one by the sums as they are written.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Mixer, Place
from atma.mixers.gated_conv import advance, init_taps
from atma.ops import causal_conv
from atma.ops.segments import document_start
from atma.strict import check_fields, require

TAPS = 3
RATE = 0.98
"""ρ at the start."""
_TINY = 1e-6
"""Beside the correlation at lag 0, by which the others are divided."""


@dataclass(frozen=True)
class OrchidConfig:
    """Sizes are counts."""

    lags: int = 128
    """L, of the long convolution."""
    chunk: int = 64
    """C, tokens from one making of the kernel to the next."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("lags", "chunk"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class OrchidState(NamedTuple):
    """What the convolutions have last read, and the kernel; the sums are float32 or wider."""

    length: Tensor  # (B,) int32
    gate_tail: Tensor  # (B, 2, 3·D): inputs of the convolution of a, b and y₀
    kernel_tail: Tensor  # (B, 2, D): inputs of that of κ
    z: Tensor  # (B, D, L − 1), the newest first
    c: Tensor  # (B, D, L − 1): κ, the newest first
    correlation: Tensor  # (B, D, L): r
    kernel: Tensor  # (B, D, L): h


class Kernel(NamedTuple):
    """What is learned of the long convolution."""

    static: Tensor  # (D, L)
    mix: Tensor  # (D, 3): of the lag before, the lag itself and the one behind
    log_rate: Tensor  # (D,): log ρ


class Grid(NamedTuple):
    """Where the tokens of a call lie when all rows share one grid of chunks, with idle ones around them."""

    slot: Tensor | None
    """(B, T): of each token; None: as they come."""
    chunks: int
    real: Tensor
    """(B or 1, chunks): tokens of each chunk that are not idle."""
    end: Tensor
    """(B or 1, chunks): the place in the chunk behind the last of them."""
    position: Tensor | None
    """(B, chunks): of each chunk's first place in its document; None: nothing lies before the first but the tail."""


class Orchid(Mixer):
    """(a, b, y₀) = conv(Linear(x)), κ = conv(x); y = out_proj(a ⊙ ((static + h) ∗ (b ⊙ y₀))), h of κ's correlation."""

    Config = OrchidConfig

    def __init__(self, config: OrchidConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        width = place.width
        self.in_proj = Linear(width, 3 * width, bias=False)
        self.gate_taps = nn.Parameter(torch.empty(3 * width, TAPS))
        self.kernel_taps = nn.Parameter(torch.empty(width, TAPS))
        self.static = nn.Parameter(torch.empty(width, config.lags))
        self.mix = nn.Parameter(torch.empty(width, 3))
        self.rate = nn.Parameter(torch.empty(width))
        self.out_proj = Linear(width, width, bias=False)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`: the static kernel N(0, 1/L) e^(−τ λ), λ from 1/L to 1 over the channels; no mix."""
        super().init_weights(generator)
        init_taps(self.gate_taps, generator)
        init_taps(self.kernel_taps, generator)
        width, lags = self.static.shape
        slope = torch.logspace(-math.log(lags), 0, width, math.e, device=self.static.device)
        fading = torch.exp(-slope[:, None] * torch.arange(lags, device=self.static.device))
        nn.init.normal_(self.static, std=lags**-0.5, generator=generator).mul_(fading)
        nn.init.zeros_(self.mix)
        nn.init.constant_(self.rate, math.log(RATE / (1 - RATE)))

    def init_state(self, batch: int, capacity: int) -> OrchidState:
        """Zeros; `capacity` has no part in it."""
        weight, (width, lags) = self.static, self.static.shape
        sums = [weight.new_zeros(batch, width, lags, dtype=_work(weight)) for _ in range(2)]
        past = [weight.new_zeros(batch, width, lags - 1) for _ in range(2)]
        tails = [weight.new_zeros(batch, TAPS - 1, size * width) for size in (3, 1)]
        return OrchidState(torch.zeros(batch, dtype=torch.int32, device=weight.device), *tails, *past, *sums)

    def forward(
        self, x: Tensor, state: OrchidState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, OrchidState | None]:
        """x (B, T, D) to y (B, T, D)."""
        h = self.in_proj(x)
        tails = (None, None) if state is None else (state.gate_tail.to(h.dtype), state.kernel_tail.to(x.dtype))
        a, b, u = causal_conv(h, self.gate_taps, tails[0], segment_ids).chunk(3, -1)
        c, z = causal_conv(x, self.kernel_taps, tails[1], segment_ids), b * u
        work = _work(x)
        kernel = Kernel(self.static.to(work), self.mix.to(work), F.logsigmoid(self.rate.to(work)))
        if state is None:
            o = from_beginning(z, c, kernel, self.config.chunk, segment_ids)
            return self.out_proj(a * o.to(a.dtype)), None
        o, *after = (step if x.shape[1] == 1 else proceed)(z, c, kernel, self.config.chunk, state)
        gate_tail, kernel_tail = (
            advance(tail, new.to(tail.dtype)) for tail, new in ((state.gate_tail, h), (state.kernel_tail, x))
        )
        length = state.length + x.shape[1]
        return self.out_proj(a * o.to(a.dtype)), OrchidState(length, gate_tail, kernel_tail, *after)

    def channels(self) -> dict[str, nn.Linear]:
        """`Mixer.channels`."""
        return {"read": self.out_proj}

    @property
    def reach(self) -> int:
        """`Mixer.reach`."""
        return self.config.lags - 1 + TAPS - 1


def refreshed(r: Tensor, mix: Tensor) -> Tensor:
    """(5.2): h of r, both (…, D, L)."""
    whole = F.pad(r / (r[..., :1] + _TINY), (1, 1))
    return mix[:, :1] * whole[..., :-2] + mix[:, 1:2] * whole[..., 1:-1] + mix[:, 2:] * whole[..., 2:]


def step(z: Tensor, c: Tensor, kernel: Kernel, chunk: int, state: OrchidState) -> tuple[Tensor, ...]:
    """(5.1) to (5.3) of one token a row, z and c (B, 1, D): o (B, 1, D), and z, c, r and h of the state after it."""
    rate, work = kernel.log_rate.exp()[:, None], kernel.static.dtype
    zs, cs = (torch.cat([new.mT.to(past.dtype), past], -1) for new, past in ((z, state.z), (c, state.c)))
    o = ((kernel.static + state.kernel) * zs.to(work)).sum(-1)
    r = rate * state.correlation + (1 - rate) * (cs[..., :1].to(work) * cs.to(work))
    due = ((state.length + 1) % chunk == 0)[:, None, None]
    return o.unsqueeze(1), zs[..., :-1], cs[..., :-1], r, torch.where(due, refreshed(r, kernel.mix), state.kernel)


def proceed(z: Tensor, c: Tensor, kernel: Kernel, chunk: int, state: OrchidState) -> tuple[Tensor, ...]:
    """`step` of many tokens z and c (B, T, D)."""
    before = [past.flip(-1).mT for past in (state.z, state.c)]
    zs, cs = (torch.cat([past, new.to(past.dtype)], 1) for past, new in zip(before, (z, c), strict=True))
    o, r, h = convolve(zs, cs, kernel, chunk, shifted_grid(state.length, z.shape[1], chunk), state)
    kept = z.shape[1]
    return o, zs[:, kept:].mT.flip(-1), cs[:, kept:].mT.flip(-1), r, h


def from_beginning(z: Tensor, c: Tensor, kernel: Kernel, chunk: int, segment_ids: Tensor | None) -> Tensor:
    """o of texts z and c (B, T, D) without a state, or of packed documents."""
    if segment_ids is None:
        return convolve(z, c, kernel, chunk, plain_grid(z, chunk), None)[0]
    return convolve(z, c, kernel, chunk, packed_grid(segment_ids, chunk), None, document_start(segment_ids))[0]


def plain_grid(x: Tensor, chunk: int) -> Grid:
    """Of rows x (B, T, …) that begin with their texts."""
    chunks = -(-x.shape[1] // chunk)
    real = (x.shape[1] - chunk * torch.arange(chunks, device=x.device)).clamp(max=chunk)[None]
    return Grid(None, chunks, real, real, None)


def shifted_grid(length: Tensor, tokens: int, chunk: int) -> Grid:
    """Of so many tokens in rows that stand at `length` (B,): as many idle ones before as the row is into its chunk."""
    phase = (length.long() % chunk)[:, None]
    chunks = (tokens - 1 + chunk - 1) // chunk + 1  # that the row furthest into its chunk can need
    begins = chunk * torch.arange(chunks, device=length.device)
    end = (phase + tokens - begins).clamp(0, chunk)
    real = (end - (phase - begins).clamp(min=0)).clamp(min=0)
    return Grid(phase + torch.arange(tokens, device=length.device), chunks, real, end, None)


def packed_grid(segment_ids: Tensor, chunk: int) -> Grid:
    """Of documents (B, T), each of which begins a chunk; there are idle tokens behind its last."""
    position = torch.arange(segment_ids.shape[1], device=segment_ids.device) - document_start(segment_ids).long()
    number = (position % chunk == 0).long().cumsum(1) - 1
    chunks = int(number.max()) + 1
    begins = position.new_zeros(len(position), chunks).scatter(1, number, position - position % chunk)
    real = position.new_zeros(len(position), chunks).scatter_add(1, number, torch.ones_like(number))
    return Grid(number * chunk + position % chunk, chunks, real, real, begins)


def convolve(
    z: Tensor,
    c: Tensor,
    kernel: Kernel,
    chunk: int,
    grid: Grid,
    state: OrchidState | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(5.1) to (5.3) in chunks: o (B, T, D), and r and h (B, D, L) behind them.

    z and c (B, T, D), or with a state (B, L − 1 + T, D), those of before it first. starts (B, T): where in the call the
    document of each token begins. A number that is none stays where the sums have it: transforms would spread it.
    """
    work, lags = kernel.static.dtype, kernel.static.shape[1]
    before = 0 if state is None else lags - 1
    spoilt = _spoilt(z, lags, starts)[:, before:]
    zs = _windows(z.to(work).masked_fill(~torch.isfinite(z), 0), grid, chunk, lags, before)
    cs = _windows(c.to(work), grid, chunk, lags, before)
    hs, r, h = _kernels(_correlations(cs, kernel.log_rate, grid, lags), kernel, grid, chunk, state)
    size = chunk + lags
    spectrum = torch.fft.rfft(zs, size) * torch.fft.rfft(kernel.static + hs, size)
    o = torch.fft.irfft(spectrum, size)[..., lags - 1 : lags - 1 + chunk].transpose(2, 3).flatten(1, 2)
    # The places of the call's tokens.
    o = o[:, : spoilt.shape[1]] if grid.slot is None else o.gather(1, grid.slot.unsqueeze(-1).expand(spoilt.shape))
    return o.masked_fill(spoilt, torch.nan), r, h


def _windows(x: Tensor, grid: Grid, chunk: int, lags: int, before: int) -> Tensor:
    """Each chunk of x (B, before + T, D) behind the L − 1 tokens before it (B, chunks, D, L − 1 + C)."""
    size = lags - 1 + grid.chunks * chunk
    if grid.slot is None:
        laid = F.pad(x, (0, 0, lags - 1, size - (lags - 1) - x.shape[1]))
    else:
        slot = grid.slot + lags - 1
        if before:
            slot = torch.cat([slot[:, :1] - torch.arange(before, 0, -1, device=x.device), slot], 1)
        laid = x.new_zeros(x.shape[0], size, x.shape[2]).scatter(1, slot.unsqueeze(-1).expand(x.shape), x)
    near = laid.unfold(1, lags - 1 + chunk, chunk)
    if grid.position is None:
        return near
    other = grid.position.unsqueeze(-1) + torch.arange(1 - lags, chunk, device=x.device) < 0
    return near.masked_fill(other.unsqueeze(2), 0)


def _correlations(cs: Tensor, log_rate: Tensor, grid: Grid, lags: int) -> Tensor:
    """What each chunk adds to r at its end (B, chunks, D, L): (1 − ρ) Σ_t ρ^(tokens behind t) κ_t κ_{t−τ}."""
    chunk = cs.shape[-1] - lags + 1
    behind = (grid.end.unsqueeze(-1) - 1 - torch.arange(chunk, device=cs.device)).unsqueeze(2)
    idle = (behind < 0) | (behind >= grid.real[:, :, None, None])  # in front, places of the tail
    share = -torch.expm1(log_rate)[:, None] * torch.exp(log_rate[:, None] * behind.clamp(min=0))
    size = chunk + lags
    own = torch.fft.rfft((share * cs[..., lags - 1 :]).masked_fill(idle, 0), size)
    return torch.fft.irfft(own.conj() * torch.fft.rfft(cs, size), size)[..., :lags].flip(-1)


def _kernels(
    added: Tensor, kernel: Kernel, grid: Grid, chunk: int, state: OrchidState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """h of each chunk (B, chunks, D, L), and r and h (B, D, L) after the last."""
    zero = torch.zeros_like(added[:, 0])
    r, h = (zero, zero) if state is None else (state.correlation, state.kernel)
    decay = torch.exp(kernel.log_rate[:, None] * grid.real[:, :, None, None])
    due = (grid.end == chunk)[:, :, None, None]
    hs = []
    for i in range(grid.chunks):
        if grid.position is not None:
            begun = (grid.position[:, i] == 0)[:, None, None]
            r, h = r.masked_fill(begun, 0), h.masked_fill(begun, 0)
        hs.append(h)
        r = decay[:, i] * r + added[:, i]
        h = torch.where(due[:, i], refreshed(r, kernel.mix), h)
    return torch.stack(hs, 1), r, h


def _spoilt(z: Tensor, lags: int, starts: Tensor | None) -> Tensor:
    """Which of the outputs at z (B, S, D) reach back, in their document, to a number that is none."""
    index = torch.arange(z.shape[1], device=z.device)[None, :, None]
    last = torch.where(torch.isfinite(z), -lags, index).cummax(1).values
    near = index - last < lags
    return near if starts is None else near & (last >= starts.unsqueeze(-1))


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


SMALL = ({"lags": 6, "chunk": 4}, {"lags": 9, "chunk": 16})
