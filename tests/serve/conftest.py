"""A small model with random weights in every projection, its tokenizer, and engines that audit themselves."""

import functools

import pytest

from atma.config import ModelConfig
from atma.model import Model
from atma.serve.engine import Engine
from atma.serve.request import Event
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer
from tests.harness.invariance import speaking

KIB = 1 << 10
SMALL = EngineConfig(
    memory_bytes=532 * KIB,
    cache_bytes=130 * KIB,
    max_rows=4,
    step_tokens=48,
    page_tokens=16,
    snapshot_tokens=32,
    max_waiting=64,
    quantum=24,
)


@functools.cache
def random_model(
    core: str = "polar", memory: bool = True, window: int | None = None, seed: int = 0, vocabulary: int = 257
) -> Model:
    """Four layers of width 32 over bytes, no projection zero, so that every path speaks in the logits. The core
    "rope+canon" is rope with Canon."""
    core, _, canon = core.partition("+")
    config = ModelConfig(
        vocabulary,
        32,
        depth=4,
        query_heads=2,
        key_value_heads=1,
        head_width=16,
        mlp_multiple=2,
        core=core,
        memory=memory,
        window=window,
        max_half_life=256,
        rope_canon=bool(canon),
    )
    return speaking(config, seed)


class AuditedEngine(Engine):
    """An engine that counts its references again after every step, and what it holds in bytes."""

    def step(self) -> list[Event]:
        events = super().step()
        audit(self)
        return events


def audit(engine: Engine) -> None:
    """Every page is referred to exactly as often as it is in use, and all that is held keeps within the budget."""
    memory, pool = engine.store, engine.store.pool
    expected = [0] * pool.count
    holders = [s.pages for s in [*engine.scheduler.running, *engine.scheduler.waiting]]
    holders += [kept.pages for kept in memory.cache._kept.values()]
    for pages in holders:
        for page in pages.values():
            expected[page] += 1
    assert expected == pool.references
    assert sorted(pool._free) == [page for page, count in enumerate(expected) if count == 0]
    assert memory.used_bytes <= engine.config.memory_bytes
    pending = memory.disk.pending_bytes if memory.disk is not None else 0
    assert pending <= memory.budget.pending_bytes
    assert memory.cache.bytes + memory.budget.pending_bytes <= engine.config.cache_bytes
    assert len(engine.scheduler.running) <= engine.config.max_rows
    assert set(engine.writing.sequences) <= set(engine.scheduler.running)
    for sequence in engine.scheduler.running:
        read = range(pool.first_page(sequence.position), pool.pages_for(sequence.position))
        assert set(read) <= sequence.pages.keys()
        assert memory.most_pages is None or len(sequence.pages) <= memory.most_pages


def finish(engine: Engine, *handles) -> None:
    """Step until these requests are done; a thousand steps without an end are a failure."""
    for _ in range(20_000):
        if all(handle.done for handle in handles):
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


@pytest.fixture
def model() -> Model:
    return random_model()


@pytest.fixture
def engine(model: Model) -> Engine:
    return AuditedEngine(model, byte_tokenizer(), SMALL)
