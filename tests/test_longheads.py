"""LongHeads against its definition, written out query by query."""

import math

import pytest
import torch
from torch import Tensor

from atma.mixers.heads import Heads
from atma.mixers.policies.base import New, Seat
from atma.mixers.policies.longheads import LongHeads, LongHeadsConfig
from atma.mixers.rope import RopeConfig, RopeCore
from atma.mixers.softmax import SoftmaxConfig, SoftmaxCore
from atma.ops import use_backend
from tests.ops.backends import FAST

H, G, K, W, BUDGET = 4, 2, 8, 6, 24


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def key_of(core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one chunk and head, q, k and v (w, K) without positions."""
    place = torch.arange(len(q))[None]
    q, k = (core.turned(x[None, None], place)[0, 0] for x in (q, k))
    o = ((q @ k.T / math.sqrt(K)).softmax(-1) @ v).mean(0)
    return (o @ k.T / math.sqrt(K)).softmax(-1) @ k


def oracle(core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What is read (H, T, K), of q (H, T, K), k and v (G, T, K)."""
    out = torch.zeros_like(q)
    for h in range(H):
        own_k, own_v = k[h * G // H], v[h * G // H]
        for t in range(q.shape[1]):
            current = t // W
            chosen = list(range(current + 1))
            if len(chosen) > BUDGET // W:
                some = {n: slice(n * W, n * W + W) for n in range(1, current - 1)}
                likeness = {n: float(q[h, t] @ key_of(core, q[h, at], own_k[at], own_v[at])) for n, at in some.items()}
                best = sorted(likeness, key=lambda n: (-likeness[n], n))[: BUDGET // W - 3]
                chosen = [0, *sorted(best), current - 1, current]
            keys, values = [], []
            for slot, n in enumerate(chosen):
                end = min(n * W + W, t + 1)
                place = slot * W + torch.arange(end - n * W)[None]
                keys.append(core.turned(own_k[None, None, n * W : end], place)[0, 0])
                values.append(own_v[n * W : end])
            place = torch.tensor([[(len(chosen) - 1) * W + t % W]])
            query = core.turned(q[None, None, h, t : t + 1], place)[0, 0, 0]
            out[h, t] = (core.scale * torch.cat(keys) @ query).softmax(-1) @ torch.cat(values)
    return out


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("rotary", [False, True])
@torch.no_grad()
def test_each_query_reads_the_chunks_that_it_is_to_read_as_if_they_stood_side_by_side(rotary, backend):
    heads = Heads(None, H, G, K, None)
    core = RopeCore(RopeConfig(), heads) if rotary else SoftmaxCore(SoftmaxConfig(), heads)
    policy = LongHeads(LongHeadsConfig(W, BUDGET), Seat(heads, core, 0, 1, str))
    q, k, v = drawn(1, H, 70, K, seed=1), drawn(1, G, 70, K, seed=2), drawn(1, G, 70, K, seed=3)
    with use_backend(backend):
        cache, found = policy.init_cache(1, 70, q), []
        for start, part in zip((0, 1, 30), (slice(1), slice(1, 30), slice(30, 70)), strict=True):
            at = torch.tensor([start], dtype=torch.int32)
            pieces = tuple(x[:, :, part] for x in (q, k, v))
            turned = core.turn(pieces[0], pieces[1], at, None)
            read, _, cache = policy(New(*turned, pieces[2], pieces[0], pieces[1], at), cache, None)
            found.append(read)
    torch.testing.assert_close(torch.cat(found, 2)[0], oracle(core, q[0], k[0], v[0]), rtol=1e-9, atol=1e-9)


def test_a_budget_that_is_no_chunks_is_told():
    with pytest.raises(ValueError, match="'budget' must be a multiple of chunk = 256, three of them at least, not 512"):
        LongHeadsConfig(256, 512)
