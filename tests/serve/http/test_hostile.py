"""Many clients that mean no good, at once: who means well beside them is told the same bits, and nothing stays."""

import multiprocessing
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest

from atma.serve.http import guard, protocol
from atma.serve.http.allocator import few_heaps
from tests.serve.http.beside import GOOD, Beside, failures, told
from tests.serve.http.conftest import Live, descriptors
from tests.serve.http.hostile import ATTACKS, besiege
from tests.serve.http.test_garbage import GROWTH, resident


@pytest.fixture
def short(full: Live, monkeypatch):
    """A server with the heaps of the command, that waits for seconds where it else waits for a minute."""
    few_heaps()
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 3)
    monkeypatch.setattr(guard, "BODY_SECONDS", 3)
    monkeypatch.setattr(full.process.server.config.http, "reader_seconds", 0.5)
    monkeypatch.setattr(full.process.server.config, "timeout_keep_alive", 1)


def besieged(live: Live, clients: int, visits: int, seed: int = 0) -> Counter[str]:
    """How often each attack was made, by clients in a process of their own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(besiege, live.port, clients, visits, seed).result()


def left_over(live: Live) -> dict[str, int]:
    """What is held for requests under way, which is nothing when there are none."""
    app = live.process.server.config.app
    responses = next(route for route in app.app.routes if route.path == "/v1/responses").endpoint.__self__
    engine = live.service.require().engine
    assert responses.store.bytes == sum(kept.size for kept in responses.store._kept.values()) <= responses.store.total
    memory, states = engine.engine.store, engine.engine.store.cache._kept.values()
    held = {page for one in states for page in one.pages.values()}
    return {
        "bodies": app._held,
        "answers": responses.routes.room.held,
        "talks": responses.talks.held,
        "readers": len(engine._readers),
        "handles": len(engine.engine.answers.handles),
        "pages": memory.budget.pages - memory.pool.free - len(held),
    }


def comes_to(value, most: int, seconds: float = 300) -> bool:
    """Whether a number falls to `most` before long."""
    until = time.monotonic() + seconds
    while value() > most and time.monotonic() < until:
        time.sleep(0.05)
    return value() <= most


def check_besieged(live: Live, caplog, clients: int, visits: int) -> str:
    """All of it; what to tell of it."""
    alone = {name: told(live, name) for name in GOOD}
    with caplog.at_level("ERROR", "atma.serve"):
        besieged(live, clients, visits, 99)  # what is remembered has been, and memory taken that so many clients take
        assert live.settled()
        tasks, files, began = live.tasks(), descriptors(), resident()
        with Beside(live, "stream", "drawn", "adapter") as first, Beside(live, "vector", "message", "held") as second:
            seen = besieged(live, clients, visits)
        assert live.settled()
    assert set(seen) == {attack.__name__ for attack in ATTACKS}
    assert not failures(caplog)
    assert comes_to(live.tasks, tasks)
    assert comes_to(descriptors, files)
    assert set(left_over(live).values()) == {0}, left_over(live)
    assert {name: told(live, name) for name in GOOD} == alone
    grown = resident() - began
    assert grown < GROWTH
    rounds, longest = first.rounds + second.rounds, max(first.longest, second.longest)
    return f"{sum(seen.values())} visits; {rounds} rounds beside, the longest {longest:.1f} s; {grown >> 10} KiB more"


@pytest.mark.slow
def test_sixty_four_hostile_clients_change_nobodys_bits_and_leave_nothing(full: Live, short, caplog, capsys):
    told = check_besieged(full, caplog, 64, len(ATTACKS))
    with capsys.disabled():
        print(f"\n{told}")
