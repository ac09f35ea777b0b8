"""What a forward pass keeps for the backward pass, counted where PyTorch keeps it and fitted by the number of tokens.

Every tensor that autograd saves passes `saved_tensors_hooks`; storages are counted once, parameters not at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atma.config import ModelConfig
from atma.layers import RMSNorm
from atma.mixers import Call
from atma.model import Block
from atma.ops import softcap_loss
from atma.plan.work import layer_of
from atma.train.step import computing

LENGTHS = (128, 256, 512)
"""Lengths in tokens of the rows that are counted, each twice the one before."""


class Saved(NamedTuple):
    """Bytes kept for rows of so many tokens: `fixed` + tokens · (`each` + `by_length` · length)."""

    fixed: float
    each: float
    by_length: float

    def at(self, tokens: float, length: float) -> float:
        """Bytes of `tokens` in rows of `length`."""
        return self.fixed + tokens * (self.each + self.by_length * length)


def saved_bytes(call: Callable[[], object], own: nn.Module) -> int:
    """Bytes of the storages that autograd keeps of a call, without those of the parameters of `own`."""
    parameters = {p.untyped_storage().data_ptr() for p in own.parameters()}
    found: dict[int, int] = {}
    held = []  # so that no storage is freed and its address given to another

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held.append(call())
    return sum(found.values())


def layer_saved(config: ModelConfig, name: str, compute: torch.dtype) -> Saved:
    """What a whole layer of this name keeps."""
    block = layer_of(config, name)
    return _fitted(lambda rows, length: layer_bytes(block, config.width, rows, length, compute))


def layer_bytes(block: Block, width: int, rows: int, length: int, compute: torch.dtype) -> int:
    """Bytes that a layer keeps of rows (rows, length, width)."""
    x = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segments = torch.zeros(rows, length, dtype=torch.int32)

    def call() -> object:
        with computing(torch.device("cpu"), compute):
            return block(x, segment_ids=segments, call=Call(x))

    return saved_bytes(call, block)


class _Ends(nn.Module):
    """What stands around the layers; the head has few words, and its weight counts apart."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.words, self.cap = min(config.vocab_size, 64), config.logit_cap
        self.embed = nn.Embedding(self.words, config.width)
        self.norm = RMSNorm(config.width, config.norm_epsilon, config.norm_plus_one)
        self.head = nn.Linear(config.width, self.words, config.head_bias)


def ends_saved(config: ModelConfig, compute: torch.dtype) -> Saved:
    """What embedding, last norm and loss keep; `fixed` has the head's weight once more if products are not float32."""
    ends = _Ends(config)

    def count(rows: int, length: int) -> int:
        tokens = torch.zeros(rows, length, dtype=torch.int64)

        def call() -> object:
            with computing(torch.device("cpu"), compute):
                hidden = ends.norm(ends.embed(tokens))
                return softcap_loss(hidden, ends.head.weight, ends.head.bias, tokens, ends.cap)

        return saved_bytes(call, ends)

    found = _fitted(count)
    copy = 0 if compute == torch.float32 else config.vocab_size * config.width * compute.itemsize
    return Saved(copy, found.each, found.by_length)


def _fitted(count: Callable[[int, int], int]) -> Saved:
    """From three lengths of one row, the parabola through them."""
    first, second, third = (count(1, length) for length in LENGTHS)
    n = LENGTHS[0]
    by_length = (third - 3 * second + 2 * first) / (6 * n * n)
    each = (second - first) / n - 3 * n * by_length
    return Saved(first - n * (each + n * by_length), each, by_length)
