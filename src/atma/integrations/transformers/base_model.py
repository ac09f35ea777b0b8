"""`AtmaModel`: any model of atma without its head, as transformers knows one.

The forward pass is `atma.model.Model`'s (atma.integrations.transformers.core). What is here turns what transformers
passes (masks, positions, caches) into what a model reads: tokens, a state, ids of packed documents.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from atma.integrations.transformers.cache import StateLayer, joined, layers_of, spread
from atma.integrations.transformers.configuration import AtmaConfig
from atma.integrations.transformers.core import Core, checkpointed, watched
from atma.integrations.transformers.layout import Layout, documents, layout
from atma.integrations.transformers.pretrained import (
    AtmaPreTrainedModel,
    built,
    fixed_buffers,
    set_where_unset,
    shared_names,
    unset,
)
from atma.integrations.transformers.ragged import read_ragged
from atma.state import ModelState, capacity, grow

logger = logging.get_logger(__name__)
_IGNORED = {"cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids", "num_items_in_batch"}
"""What callers of every model pass, and none of ours needs."""
_ROOM = 256
"""Tokens that a new state has room for beside those of its first call."""


class AtmaModel(AtmaPreTrainedModel):
    """Embedding, blocks and the last norm: tokens to hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012

    def __init__(self, config: AtmaConfig) -> None:
        super().__init__(config)
        model = built(config.model_config())
        self.settings = model.config
        self.embed, self.blocks, self.norm = model.embed, model.blocks, model.norm
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None
        self._every = 1
        self._tied_weights_keys = shared_names(self)
        self._fixed = fixed_buffers(self)
        self.post_init()

    def core(self, head: nn.Module | None = None) -> Core:
        """The model's own code over the modules as they now are."""
        return Core(self.settings, self.embed, cast(Any, self.blocks), self.norm, head)

    def _initialize_own(self) -> None:
        for name, value in self._fixed.items():
            self.get_buffer(name).copy_(value)
        if unset(self):
            core = self.core(nn.Linear(1, 1))
            set_where_unset(self, core.init_weights)

    def checkpoint(self, enable: bool, function: Any, every: int) -> None:
        """Compute every `every`-th block again in the backward pass, by a function like `torch.utils.checkpoint`."""
        self.gradient_checkpointing, self._gradient_checkpointing_func, self._every = enable, function, every

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) int64, or inputs_embeds (B, T, D), to last_hidden_state (B, T, D) and a cache.

        attention_mask (B, ≥ T): 0 for padding, on the left or the right of each row. position_ids (B, T): where they
        begin again a packed document begins, as seq_idx (B, T) and cu_seq_lens_q (N + 1,) tell it. ValueError names
        what does not fit.
        """
        _require_known(kwargs)
        inputs = _inputs(input_ids, inputs_embeds)
        if cu_seq_lens_q is not None and seq_idx is None and position_ids is None:
            seq_idx = documents(inputs.shape[1], cu_seq_lens_q)
        how = layout((inputs.shape[0], inputs.shape[1]), attention_mask, position_ids, seq_idx)
        if self._keeps_state(use_cache, cache, how):
            layers = layers_of(cache := DynamicCache(config=self.config) if cache is None else cache, len(self.blocks))
        else:
            layers, cache = None, None
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if layers is None:
            hidden, seen = self._read(inputs, how, bool(wanted))
        else:
            hidden, seen = self._continue(inputs, how, layers, bool(wanted), kwargs.get("kept"))
        return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache, hidden_states=seen)

    def _keeps_state(self, use_cache: bool | None, cache: Cache | None, how: Layout) -> bool:
        """Whether a call goes on from a state and leaves one. ValueError for packed documents with a cache."""
        asked = use_cache if use_cache is not None else cache is not None
        if self.gradient_checkpointing and self.training:
            if use_cache:
                logger.warning_once("use_cache=True is not for gradient checkpointing: no cache is kept.")
            return False
        if how.begins is not None and asked:
            raise ValueError(
                "packed documents are for training, a cache continues one text a row: pass use_cache=False"
            )
        by_itself = self.config.use_cache and not self.training and how.begins is None
        return by_itself if use_cache is None and cache is None else bool(asked)

    def _read(self, inputs: Tensor, how: Layout, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Without a state: whole texts, padding and other documents set apart."""
        core, seen = self.core(), []
        if self.gradient_checkpointing and self.training:
            core.blocks = checkpointed(core.blocks, self._gradient_checkpointing_func, self._every)
        core.blocks = watched(core.blocks, seen) if wanted else core.blocks
        hidden, _ = core.read(inputs, None, how.segment_ids())
        if how.real is not None:
            hidden = hidden.masked_fill(~how.real[..., None], 0)
        return hidden, (*seen, hidden) if wanted else None

    def _continue(
        self, inputs: Tensor, how: Layout, layers: list[StateLayer], wanted: bool, kept: int | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """From the state that the layers hold, and leave there what it becomes."""
        length, count = layers[0].length, inputs.shape[1]
        if (unread := layers[0].unread) is not None:
            inputs = torch.cat([unread if inputs.ndim == 2 else self.embed(unread), inputs], 1)
            length -= unread.shape[1]
            real = how.real
            how = how if real is None else how._replace(real=torch.cat([real.new_ones(unread.shape), real], 1))
        parts = [inputs.shape[1]]
        if layers[0].record_past and kept and kept < parts[0]:
            parts = [parts[0] - kept, kept]
        found = []
        for part, real in zip(inputs.split(parts, 1), _split(how.real, parts), strict=True):
            found.append(self._move(part, real, layers, length, wanted))
            length += part.shape[1]
        whole = torch.cat(found, 2)[:, :, -count:] if len(found) > 1 else found[0][:, :, -count:]
        return whole[-1], tuple(whole) if wanted else None

    def _move(self, inputs: Tensor, real: Tensor | None, layers: list[StateLayer], length: int, wanted: bool) -> Tensor:
        """One call from `length` tokens on, to what each block read, if wanted, and hidden states: (·, B, T, D)."""
        state = joined(layers)
        if state is None:
            state = self.new_state(inputs.shape[0], inputs.shape[1] + _ROOM)
            spread(layers, state, 0)
        if (rows := state.length.shape[0]) != inputs.shape[0]:
            raise ValueError(f"the cache holds {rows} rows, the call has {inputs.shape[0]}")
        if real is not None and real.all():
            real = None
        for layer in layers:
            layer.remember(inputs if real is None and inputs.ndim == 2 else None)
        state = roomy(joined(layers) or state, length + inputs.shape[1])
        found, state = self._stacked(inputs, state, real, wanted)
        spread(layers, state, length + inputs.shape[1])
        return found

    def _stacked(
        self, inputs: Tensor, state: ModelState, real: Tensor | None, wanted: bool
    ) -> tuple[Tensor, ModelState]:
        def read(part: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
            core, seen = self.core(), []
            core.blocks = watched(core.blocks, seen) if wanted else core.blocks
            hidden, after = core.read(part, state)
            return torch.stack([*seen, hidden], 2), cast(ModelState, after)

        if real is None:
            found, state = read(inputs, state)
        else:
            found, state = read_ragged(read, inputs, state, real)
        if found is None:
            layers = len(self.blocks) + 1 if wanted else 1
            found = self.norm.weight.new_zeros(*inputs.shape[:2], layers, int(self.config.hidden_size or 0))
        return found.movedim(2, 0), state

    def new_state(self, rows: int, room: int) -> ModelState:
        """An empty state (`Model.init_state`)."""
        return self.core().init_state(rows, room)


def roomy(state: ModelState, tokens: int) -> ModelState:
    """The same state with room for so many tokens; where it has to grow, for twice as many as it had."""
    room = capacity(state)
    return grow(state, max(tokens, 2 * room)) if room and tokens > room else state


def _inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, not both or neither")
    inputs = input_ids if inputs_embeds is None else inputs_embeds
    assert inputs is not None
    name, dimensions = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
    if inputs.ndim != dimensions or inputs.shape[1] == 0:
        raise ValueError(f"{name} must have {dimensions} dimensions and at least one token, not {tuple(inputs.shape)}")
    return inputs


def _require_known(given: dict[str, Any]) -> None:
    """TypeError for an argument that would change nothing, ValueError for attentions, of which mixers give none."""
    if given.get("output_attentions"):
        raise ValueError("output_attentions: mixers of atma give no attention maps; see atma diagnose")
    for name, value in given.items():
        if name not in _IGNORED and name not in ("output_attentions", "kept") and value is not None:
            raise TypeError(f"forward() got an unexpected argument '{name}'")


def _split(real: Tensor | None, parts: list[int]) -> list[Tensor | None]:
    return [None] * len(parts) if real is None else list(real.split(parts, 1))


__all__ = ["AtmaModel"]
