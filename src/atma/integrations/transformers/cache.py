"""Our state as a cache of transformers: each layer of a `DynamicCache` holds the state of one block.

`DynamicCache(config=model.config)` makes it, as `generate` does. What is asked of a cache (reordering for beams,
repeating, choosing rows, cutting back) is done by `atma.state`, so a layer may hold anything a mixer remembers.

A state cannot in general forget its last tokens. Where a cache is told to record its past, as assisted decoding tells
it, each call leaves a branch of what it began with, and cutting back means: take the branch, and read the tokens that
stay once more, with the next call.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from atma import state as states
from atma.state import ModelState

LAYER_TYPE = "atma_state"


class Past(NamedTuple):
    """A call that is remembered: what it began with, and the tokens (B, T) it read, None where some were padding."""

    state: ModelState
    length: int
    tokens: Tensor | None


class StateLayer(CacheLayerMixin):
    """The state of one block. `state` is one of a model of that block alone, None before the first call."""

    _layer_type = LAYER_TYPE
    is_compileable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state: ModelState | None = None
        self.length = 0
        """Tokens of every row that have been given to the cache, padding among them."""
        self.unread: Tensor | None = None
        """Tokens (B, n) that are to be read before those of the next call."""
        self.record_past = False
        self.past: list[Past] = []

    def hold(self, state: ModelState, length: int) -> None:
        """Take the state after a call that has brought the layer to `length` tokens."""
        self.state, self.length, self.unread, self.is_initialized = state, length, None, True

    def remember(self, tokens: Tensor | None) -> None:
        """Keep what the next call begins with, and its tokens, if the past is recorded."""
        if self.record_past and self.state is not None:
            self.past.append(Past(states.branch(self.state), self.length, tokens))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There are no keys to begin with."""
        raise TypeError("a layer of atma's state takes no keys and values: the model itself moves it on")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """There are no keys to add to."""
        raise TypeError("a layer of atma's state takes no keys and values: the model itself moves it on")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a call of so many will have before it and in it, and none that have left."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens given to the cache."""
        return self.length

    def get_max_length(self) -> int:
        """No most tokens."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, −1 before the first call."""
        return -1 if self.state is None else self.state.length.shape[0]

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether tokens can be taken back: the past is recorded, or all that is held grows with the text."""
        return self.record_past or self._grows_only()

    def activate_past_recording(self) -> None:
        """From now on every call keeps what it began with, until `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last −`tokens_to_remove` tokens. ValueError where they cannot be forgotten."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes back a negative number of tokens, not {tokens_to_remove}")
        target = self.length + tokens_to_remove
        if target < 0:
            raise ValueError(f"cannot take back {-tokens_to_remove} of {self.length} tokens")
        if tokens_to_remove and self.state is not None:
            self._return_to(target)
        self.past = []

    def _return_to(self, target: int) -> None:
        if self.unread is not None and target >= self.length - self.unread.shape[1]:
            self.unread, self.length = self.unread[:, : self.unread.shape[1] - (self.length - target)], target
            return
        past = next((one for one in reversed(self.past) if one.length <= target), None)
        if past is None and self.state is not None and self._grows_only() and self.unread is None:
            short = self.length - target
            self.state = states.transform(self.state, lambda name, x: x - short if name == states.LENGTH else x)
            self.length = target
            return
        if past is None or (past.tokens is None and past.length < target):
            raise ValueError(
                "this model's memory cannot forget tokens it has read: call cache.activate_past_recording() before the "
                "calls that may be taken back"
            )
        keep = target - past.length
        self.state, self.length = past.state, target
        self.unread = past.tokens[:, :keep] if past.tokens is not None and keep else None

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length, self.unread, self.past, self.is_initialized = None, 0, None, [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx`, some of them more than once."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.state is not None:
            self._take(torch.arange(self.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        """States are not offloaded."""
        raise ValueError("a layer of atma's state stays on its device: leave cache_implementation out")

    def prefetch(self) -> None:
        """Not needed: the model finds the state where its own call has left it."""

    def _take(self, index: Tensor) -> None:
        if self.state is None:
            return
        index = index.to(self.state.length.device)
        self.state = states.rows(self.state, index)
        self.unread = None if self.unread is None else self.unread[index]
        self.past = [Past(states.rows(one.state, index), one.length, _chosen(one.tokens, index)) for one in self.past]

    def _grows_only(self) -> bool:
        return self.state is not None and not any(leaf.carried for leaf in states.leaves(self.state))


def _chosen(tokens: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tokens is None else tokens[index]


def layers_of(cache: Any, depth: int) -> list[StateLayer]:
    """The layers of a cache for `depth` blocks; an empty cache is given them. ValueError: it is for other models."""
    if isinstance(cache, Cache) and not cache.layers:
        cache.layers.extend(StateLayer() for _ in range(depth))
    layers = getattr(cache, "layers", [])
    if len(layers) != depth or not all(isinstance(layer, StateLayer) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"the cache has {len(layers)} layers of {', '.join(kinds) or type(cache).__name__}, the model {depth} "
            "states: make it DynamicCache(config=model.config), or leave it out"
        )
    return cast(list[StateLayer], layers)


def joined(layers: Sequence[StateLayer]) -> ModelState | None:
    """The state of the whole model, None before the first call."""
    parts = [layer.state for layer in layers]
    if parts[0] is None or any(part is None for part in parts):
        return None
    return ModelState(parts[0].length, tuple(part.blocks[0] for part in parts if part is not None))


def spread(layers: Sequence[StateLayer], state: ModelState, length: int) -> None:
    """Give each layer its part of a state after a call that has brought it to `length` tokens."""
    for layer, block in zip(layers, state.blocks, strict=True):
        layer.hold(ModelState(state.length, (block,)), length)


__all__ = ["LAYER_TYPE", "StateLayer", "joined", "layers_of", "spread"]
