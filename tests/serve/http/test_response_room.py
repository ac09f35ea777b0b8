"""What conversations that Responses go on from take until they are answered: counted, bounded, given back."""

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from atma.serve.http.errors import RESPONSES
from atma.serve.http.responses.routes import Responses
from tests.serve.http.conftest import Live

ASKED = {"input": "Hello", "max_output_tokens": 5, "temperature": 0}


@pytest.fixture
def responses(live: Live) -> Responses:
    """The routes of the server."""
    app: Any = live.process.server.config.app
    found = next(route.endpoint.__self__ for route in app.app.routes if route.path == RESPONSES)
    assert isinstance(found, Responses)
    assert live.settled() and found.talks.held == 0
    return found


@pytest.fixture
def kept(live: Live) -> str:
    """An answer that can be gone on from."""
    return live.post(RESPONSES, ASKED).json()["id"]


@pytest.fixture
def crowded(live: Live, responses: Responses, kept: str):
    """Room for all but a byte of the conversation, until what is given here is called; then for all."""
    taken = responses.talks.total - size(responses, kept) + 1
    responses.talks.held += taken

    def free() -> None:
        assert live.loop is not None
        live.loop.call_soon_threadsafe(responses.talks.give, taken)

    yield free
    assert live.settled() and responses.talks.held == 0


def size(responses: Responses, identity: str) -> int:
    return len(responses.store._kept[identity].talk)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.005)


def test_a_conversation_is_counted_while_it_is_gone_on_from_and_no_longer(live: Live, responses, kept, monkeypatch):
    held, answered = [], responses.routes.answered

    async def noted(*given):
        held.append(responses.talks.held)
        return await answered(*given)

    monkeypatch.setattr(responses.routes, "answered", noted)
    later = ASKED | {"previous_response_id": kept}
    for body in (ASKED, later, later | {"stream": True}):
        assert live.post(RESPONSES, body).status == 200
        assert live.settled() and responses.talks.held == 0
    assert held == [0, size(responses, kept), size(responses, kept)]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, 400),
        ({"model": "other"}, 404),
        ({"max_output_tokens": 10**8}, 400),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}}]}, 400),
    ],
)
def test_what_is_refused_gives_its_room_back(live: Live, responses, kept, fields, status):
    assert live.post(RESPONSES, ASKED | {"previous_response_id": kept} | fields).status == status
    assert live.settled() and responses.talks.held == 0


@pytest.mark.parametrize("listed", [False, True])
def test_who_finds_no_room_waits_until_there_is(live: Live, responses, kept, crowded, listed):
    told = []

    def ask() -> None:
        body = ASKED | {"previous_response_id": kept}
        told.append(
            live.ask("GET", f"{RESPONSES}/{kept}/input_items") if listed else live.post(RESPONSES, body),
        )

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: responses.talks._turn.locked() or not asking.is_alive())
    assert not told, "it was answered without room"
    assert live.post(RESPONSES, ASKED).status == 200, "who goes on from nothing needs none"
    assert not told
    crowded()
    asking.join(60)
    assert [one.status for one in told] == [200]


def test_who_leaves_while_waiting_takes_nothing(live: Live, responses, kept, crowded):
    body = json.dumps(ASKED | {"previous_response_id": kept}).encode()
    head = f"POST {RESPONSES} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    held = responses.talks.held
    with socket.create_connection(("127.0.0.1", live.port), timeout=60) as wire:
        wire.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(responses.talks._turn.locked)
    until(lambda: not responses.talks._turn.locked())
    assert responses.talks.held == held
    crowded()


def test_what_there_never_is_room_for_is_refused(live: Live, responses, kept, monkeypatch):
    monkeypatch.setattr(responses.talks, "total", size(responses, kept) - 1)
    refused = live.post(RESPONSES, ASKED | {"previous_response_id": kept})
    assert (refused.status, refused.error()["code"], refused.error()["param"]) == (400, "answer_too_large", "input")
    listed = live.ask("GET", f"{RESPONSES}/{kept}/input_items")
    assert (listed.status, listed.error()["code"]) == (400, "answer_too_large")
    assert responses.talks.held == 0


def test_there_is_room_for_every_conversation_that_is_kept(responses):
    assert responses.talks.total == responses.store.total
