"""START HERE. The whole model: embed → blocks → norm → head, one code for training, prefill and decoding.

    hidden, state = model(tokens, state)      # (B, T, D); no (B, T, vocabulary) tensor is built here
    logits = model.logits(hidden)

`None` in, `None` out: training keeps no state. With a state, tokens continue each row from where it stands, so prefill
in chunks and decoding token by token are the same call as reading everything at once (maths.md, section 1).
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atma.config import ModelConfig
from atma.display import count_text, facts_html, facts_text
from atma.layers import MLP, RMSNorm, init_linear
from atma.mixers import Call, Mixer
from atma.mixers.stretches import Stretch
from atma.narrow import NarrowLinear, numbers_in, width_in
from atma.ops import softcap_loss
from atma.ops.dense import linear
from atma.ops.loss import NOT_SCORED, softcap
from atma.state import ModelState, capacity

SCORED = 256
"""Rows whose logits a narrow head computes at once for a loss."""


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)), where there is an MLP; norms may stand behind them, too or instead."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm_mixer, self.norm_mixed = _norms(config)
        self.mixer = config.mixer(layer)
        inner = config.mlp_multiple * config.width if config.mlp_width is None else config.mlp_width
        self.norm_mlp, self.norm_mlp_out = _norms(config) if inner else (None, None)
        self.mlp = MLP(config.width, inner, config.mlp_gate, config.mlp_bias) if inner else None

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Zero output projections: at the start a block is the identity."""
        self.mixer.init_weights(generator)
        if self.mlp is not None:
            init_linear(self.mlp.in_proj, generator)
            init_linear(self.mlp.out_proj, generator, zero=True)

    def forward(
        self, x: Tensor, state: Any = None, *, segment_ids: Tensor | None = None, call: Call | None = None
    ) -> tuple[Tensor, Any]:
        """x (B, T, D) to (B, T, D)."""
        normed = _normed(x, self.norm_mixer)
        if call is not None and call.stretch is not None:
            mixed = self.mixer.forward_shard(normed, call.stretch, call)
        else:
            record = {"call": call} if self.mixer.reads_call else {}
            mixed, state = self.mixer(normed, state, segment_ids=segment_ids, **record)
        x = x + _normed(mixed, self.norm_mixed)
        return (x if self.mlp is None else x + _normed(self.mlp(_normed(x, self.norm_mlp)), self.norm_mlp_out)), state


def _norms(config: ModelConfig) -> tuple[RMSNorm | None, RMSNorm | None]:
    """The norms before and after a part of a block."""
    before, after = config.norms != "after", config.norms != "before"
    new = functools.partial(RMSNorm, config.width, config.norm_epsilon, config.norm_plus_one)
    return new() if before else None, new() if after else None


def _normed(x: Tensor, norm: RMSNorm | None) -> Tensor:
    return x if norm is None else norm(x)


def computed_again(names: Sequence[str], every: int) -> list[int]:
    """Which of layers of these names are computed again where one of `every` is.

    Those of one name stand together while they are counted, so that some of each are among them, not all of one kind.
    """
    return sorted(range(len(names)), key=names.__getitem__)[::every]


class Model(nn.Module):
    """A language model of configuration `config`, freshly initialised from `generator` (None: the global one)."""

    def __init__(self, config: ModelConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.selection: str | None = None
        """The selection policy that is set on it, with its options; None: every key is read (`atma.select`)."""
        self.checkpointing = 0
        """In training, of one of so many blocks keep only what it reads, and compute the rest again for its gradients;
        1: of each, 0: of none."""
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_epsilon, config.norm_plus_one)
        self.head = nn.Linear(config.width, config.vocab_size, config.head_bias)
        first: dict[str, Mixer] = {}
        for name, block in zip(config.layers, self.blocks, strict=True):
            kind, mixer = config.named()[name].kind, cast(Block, block).mixer
            if first.setdefault(kind, mixer) is not mixer:
                mixer.share_weights(first[kind])
        self.init_weights(generator)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Zero output projections, nothing else (maths.md, section 6): all learn from the third step on."""
        nn.init.normal_(self.embed.weight, generator=generator)
        init_linear(self.head, generator, zero=True)
        for block in self.blocks:
            cast(Block, block).init_weights(generator)
            cast(Block, block).mixer.embedded(self.embed.weight)

    def init_state(self, batch: int, capacity: int) -> ModelState:
        """An empty state with room for `capacity` tokens in each of `batch` rows."""
        if batch < 1 or capacity < 1:
            raise ValueError(f"a state needs at least one row and room for one token, not batch {batch}, {capacity}")
        length = torch.zeros(batch, dtype=torch.int32, device=self.embed.weight.device)
        return ModelState(length, tuple(cast(Block, block).mixer.init_state(batch, capacity) for block in self.blocks))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        segment_ids: Tensor | None = None,
        noise: int | None = None,
        stretch: Stretch | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """tokens (B, T) int64 to hidden (B, T, D) after the last norm, and the state moved on by T (None for None).

        segment_ids (B, T), training only: packed documents that see nothing of each other. noise, training only: the
        seed of what layers draw. stretch, training only: of rows that several processes share, whose stretch the tokens
        are, and the documents in place of segment_ids. ValueError when a row would pass the state's capacity.
        """
        self._check(tokens, state, segment_ids)
        return self.unchecked(tokens, state, segment_ids, noise, stretch)

    def unchecked(
        self,
        tokens: Tensor,
        state: ModelState | None,
        segment_ids: Tensor | None = None,
        noise: int | None = None,
        stretch: Stretch | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """`forward` for a caller that knows its tokens to fit: no length is read, so the device is not waited for."""
        x = self.enter(tokens)
        call, states = Call(x, noise=noise, stretch=stretch), []
        some = self.checkpointing and state is None and torch.is_grad_enabled()
        again = computed_again(self.config.layers, self.checkpointing) if some else ()
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[i]
            if i in again:
                # A block that is computed again must come to its end where it hands its state to another process.
                run = functools.partial(checkpoint, block, use_reentrant=False, early_stop=stretch is None)
                x, after = run(x, before, segment_ids=segment_ids, call=call, preserve_rng_state=False)
            else:
                x, after = block(x, before, segment_ids=segment_ids, call=call)
            states.append(after)
        hidden = self.norm(x)
        return hidden, None if state is None else ModelState(state.length + tokens.shape[1], tuple(states))

    def enter(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 to what the first block reads (B, T, D)."""
        x, scale = self.embed(tokens), self.config.embedding_scale
        return x if scale == 1 else x * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (…, D) to soft-capped logits (…, vocabulary), float32 or wider."""
        work = torch.promote_types(hidden.dtype, torch.float32)
        raw = _scores(self.head, hidden).to(work)
        return softcap(raw if self.head.bias is None else raw + self.head.bias, self.config.logit_cap)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Nats per token (B, T) of targets (B, T) int64 under hidden (B, T, D); target −100 gives 0 and no gradient."""
        if isinstance(self.head, NarrowLinear):
            return _read_loss(self, hidden, targets)
        return softcap_loss(hidden, self.head.weight, self.head.bias, targets, self.config.logit_cap)

    def facts(self) -> dict[str, str]:
        """What it is, by name: layers, sizes, parameters."""
        weight, count, width = self.embed.weight, numbers_in(self), width_in(self)
        told = str(weight.dtype).removeprefix("torch.")
        where = f"{told if width is None else f'{width} and {told}'} on {weight.device}"
        return self.config.facts() | {"parameters": f"{count:,} ({count_text(count)}), {where}"}

    def __repr__(self) -> str:
        return facts_text("Model", self.facts())

    def _repr_html_(self) -> str:
        return facts_html("Model", self.facts())

    def _check(self, tokens: Tensor, state: ModelState | None, segment_ids: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be (batch, length ≥ 1), not {tuple(tokens.shape)}")
        if state is None or torch.compiler.is_compiling():
            return
        if segment_ids is not None:
            raise ValueError("segment_ids marks packed documents in training; a state continues one document a row")
        room = capacity(state)
        if room and int(state.length.max()) + tokens.shape[1] > room:
            reached = int(state.length.max())
            raise ValueError(
                f"{tokens.shape[1]} tokens after {reached} pass the state's capacity of {room}; grow it first"
            )


def _scores(head: nn.Linear, hidden: Tensor) -> Tensor:
    """hidden (…, D) to scores (…, vocabulary) in its dtype, before the bias."""
    if isinstance(head, NarrowLinear):
        return head.unbiased(hidden)
    return linear(hidden, head.weight.to(hidden.dtype), None)


def _read_loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    """`Model.loss` of a head that has no gradient: so many rows at once that their logits are few."""
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    nats = [
        F.cross_entropy(model.logits(some), goals, ignore_index=NOT_SCORED, reduction="none")
        for some, goals in zip(rows.split(SCORED), wanted.split(SCORED), strict=True)
    ]
    return torch.cat(nats).view(targets.shape)
