"""Two replicas under Ray Serve on this machine, asked through Ray's own proxy.

Ray runs in a process of its own: its import raises warnings, and nothing of it may stay in the tests' process.
"""

import contextlib
import dataclasses
import http.client
import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from atma.checkpoint import save_model
from atma.serve.http.affinity import HEADER
from atma.serve.ray import build
from atma.tokenizer import byte_tokenizer
from tests.serve.conftest import random_model

ABSENT = importlib.util.find_spec("ray") is None
KEY = "a-key-of-the-tests"
REPLICA = "x-atma-replica"
LONG = {"max_tokens": 20_000, "ignore_eos": True, "stream": True}

DRIVER = """
import json, sys
import ray
from ray import serve
from atma.serve.ray import build

args, port = json.loads(sys.argv[1]), int(sys.argv[2])
ray.init(address="local", num_cpus=4, include_dashboard=False)
serve.start(http_options={"port": port})
serve.run(build(args))
print("ready", flush=True)
for line in sys.stdin:
    verb, what = line.split()
    if verb == "kill":
        ray.kill(ray.get_actor(f"SERVE_REPLICA::default#atma#{what}", namespace="serve"))
    else:
        serve.run(build(args | {"max_tokens": what}))
    print("done", flush=True)
serve.shutdown()
ray.shutdown()
"""


def with_ray(test):
    """Slow, and skipped where ray is absent."""
    return pytest.mark.slow(pytest.mark.skipif(ABSENT, reason="needs pip install 'atma-lm[ray]'")(test))


@dataclasses.dataclass
class Told:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def cached(self) -> int:
        return self.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


class Replicas:
    """A Ray of its own with the application; `command` tells the process that holds it."""

    def __init__(self, folder, home, **environment: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = (home / "log").open("w+")
        args = {"model": str(folder), "model_name": "tiny", "replicas": "2", "cpus": "0.5", "memory_budget": "96MiB"}
        own = {
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "ATMA_API_KEY": KEY,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        own |= {"RAY_worker_niceness": "0"}  # else Ray gives its workers what other processes leave
        command = [sys.executable, "-c", DRIVER, json.dumps(args | {"max_body": "64KiB"}), str(self.port)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | own | environment, **pipes)
        self._wait_for("ready")

    def command(self, verb: str, what: str) -> None:
        self.process.stdin.write(f"{verb} {what}\n")
        self.process.stdin.flush()
        self._wait_for("done")

    def open(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None):
        """A connection, and the response that has begun on it."""
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        usual = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        wire.request(method, path, data, usual | (headers or {}))
        return wire, wire.getresponse()

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Told:
        wire, response = self.open(method, path, body, headers)
        with contextlib.closing(wire):
            return Told(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def chat(self, talk: list, headers: dict[str, str] | None = None) -> Told:
        told = self.ask(
            "POST", "/v1/chat/completions", {"messages": talk, "max_tokens": 6, "ignore_eos": True}, headers
        )
        assert told.status == 200, told.body
        return told

    def metric(self, name: str) -> dict[str, float]:
        """A metric of every replica."""
        text = self.ask("GET", "/metrics").body.decode()
        found = re.findall(rf'^{name}{{(?:[^}}]*,)?replica="(\w+)"[^}}]*}} (\S+)', text, re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    def end(self) -> None:
        self.process.stdin.close()
        for line in self.process.stdout:
            print(line)
        self.process.wait(120)
        self.process.stdout.close()
        self.log.close()

    def _wait_for(self, word: str) -> None:
        for line in self.process.stdout:
            if line.strip() == word:
                return
        self.log.seek(0)
        told = self.log.read()[-4000:]
        self.end()
        raise AssertionError(told)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "tiny"
    save_model(path, random_model(), byte_tokenizer())
    return path


@pytest.fixture(scope="module")
def live(folder, tmp_path_factory) -> Iterator[Replicas]:
    running = Replicas(folder, tmp_path_factory.mktemp("home"))
    yield running
    running.end()


def conversation(live: Replicas, begin: str, turns: int, headers: dict[str, str] | None = None) -> list[Told]:
    talk, answers = [{"role": "user", "content": begin}], []
    for _ in range(turns):
        answers.append(live.chat(talk, headers))
        talk += [answers[-1].json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
        talk[-2] = {key: talk[-2][key] for key in ("role", "content")}
    return answers


def until(holds: Callable[[], Any], seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.2)
    return value


@with_ray
def test_both_replicas_answer(live: Replicas):
    seen = set()
    until(lambda: seen.add(live.ask("GET", "/health").headers[REPLICA]) or len(seen) == 2)


@with_ray
def test_every_conversation_stays_on_one_replica_and_they_spread_over_both(live: Replicas):
    homes = set()
    for number in range(30):
        answers = conversation(live, f"conversation {number}", 3)
        assert len({told.headers[REPLICA] for told in answers}) == 1
        assert len({told.headers[HEADER] for told in answers}) == 1
        assert all(told.cached > 0 for told in answers[1:])
        homes.add(answers[0].headers[REPLICA])
        if number >= 5 and len(homes) == 2:
            break
    assert len(homes) == 2


@with_ray
def test_a_name_of_the_clients_own_decides_and_comes_back(live: Replicas):
    for name in ("mine", "another-1"):
        told = [live.chat([{"role": "user", "content": f"{name} {i}"}], {HEADER: name}) for i in range(6)]
        assert {one.headers[HEADER] for one in told} == {name}
        assert len({one.headers[REPLICA] for one in told}) == 1


@with_ray
def test_an_answer_is_gone_on_from_and_told_whichever_replica_is_asked(live: Replicas):
    asked, homes = {"max_output_tokens": 4, "temperature": 0}, set()
    for number in range(30):
        first = live.ask("POST", "/v1/responses", asked | {"input": f"a question {number}"})
        identity = first.json()["id"]
        assert (first.status, first.json()["store"]) == (200, True)
        later = asked | {"input": "and then?", "previous_response_id": identity}
        for headers in ({}, {}, {}, {HEADER: f"another-{number}"}):
            told = live.ask("POST", "/v1/responses", later, headers)
            assert (told.status, told.headers[REPLICA]) == (200, first.headers[REPLICA]), told.body
            assert live.ask("GET", f"/v1/responses/{told.json()['id']}").json() == told.json()
            items = live.ask("GET", f"/v1/responses/{told.json()['id']}/input_items").json()["data"]
            assert [item["role"] for item in items] == ["user", "assistant", "user"]
        assert live.ask("DELETE", f"/v1/responses/{identity}").status == 200
        assert {live.ask("GET", f"/v1/responses/{identity}").status for _ in range(4)} == {404}
        homes.add(first.headers[REPLICA])
        if number >= 3 and len(homes) == 2:
            break
    assert len(homes) == 2


@with_ray
def test_a_stream_is_whole_and_ends_with_done(live: Replicas):
    for number in range(6):
        asked = {"prompt": f"text {number}", "max_tokens": 12, "ignore_eos": True}
        whole = live.ask("POST", "/v1/completions", asked | {"temperature": 0}).json()["choices"][0]["text"]
        told = live.ask("POST", "/v1/completions", asked | {"temperature": 0, "stream": True})
        assert told.headers["content-type"].startswith("text/event-stream")
        *events, end, last = told.body.decode().split("\n\n")
        assert (end, last) == ("data: [DONE]", "")
        assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events) == whole


@with_ray
def test_streams_arrive_as_they_are_written_and_end_when_the_client_leaves(live: Replicas):
    gone = sum(live.metric("atma_disconnects_total").values())
    wires = []
    for number in range(4):
        wire, response = live.open("POST", "/v1/completions", LONG | {"prompt": f"on and on {number}"})
        assert b'"text"' in [response.readline() for _ in range(20)][-2]  # ten events of 20,000
        wires += [response, wire]
    assert until(lambda: sum(live.metric("atma_requests_running").values()) == 4)
    for one in wires:
        one.close()
    until(lambda: sum(live.metric("atma_requests_running").values()) == 0)
    until(lambda: sum(live.metric("atma_disconnects_total").values()) >= gone + 4)


@with_ray
def test_the_openai_client_works(live: Replicas):
    url = f"http://127.0.0.1:{live.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=600) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        talk: Any = [{"role": "user", "content": "hello"}]
        asked: Any = {"model": "tiny", "messages": talk, "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**asked, extra_body={"nonsense": 1})
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


@with_ray
@pytest.mark.parametrize(
    ("status", "code", "path", "body", "headers"),
    [
        (400, "invalid_value", "/v1/chat/completions", {"messages": "x"}, {}),
        (400, "invalid_json", "/v1/completions", b"{", {}),
        (400, "invalid_value", "/v1/completions", {"prompt": "x", "nonsense": 1}, {}),
        (401, "invalid_api_key", "/v1/completions", {"prompt": "x"}, {"authorization": "Bearer wrong"}),
        (401, "invalid_api_key", "/metrics", None, {"authorization": ""}),
        (404, "not_found", "/v1/nothing", {}, {}),
        (413, "too_large", "/v1/completions", {"prompt": "x" * 70_000}, {}),
        (415, "content_type", "/v1/completions", {"prompt": "x"}, {"content-type": "text/plain"}),
    ],
)
def test_errors_keep_their_form(live: Replicas, status, code, path, body, headers):
    told = live.ask("GET" if body is None else "POST", path, body, headers)
    assert told.status == status, told.body
    assert told.json()["error"]["code"] == code
    assert set(told.json()["error"]) == {"message", "type", "param", "code"}


@with_ray
def test_a_request_has_one_id_and_metrics_tell_replicas_apart(live: Replicas):
    wire, response = live.open("GET", "/health", headers={"x-request-id": "my-id"})
    with contextlib.closing(wire):
        assert response.headers.get_all("x-request-id") == ["my-id"]
        response.read()
    assert len(live.metric("atma_memory_budget_bytes")) == 2


@with_ray
def test_a_new_version_lets_answers_under_way_end(live: Replicas):
    told: list[Told] = []
    asked = [{"prompt": f"last words {i}", "max_tokens": 600, "ignore_eos": True, "stream": True} for i in range(4)]
    threads = [threading.Thread(target=lambda b=b: told.append(live.ask("POST", "/v1/completions", b))) for b in asked]
    before = set(live.metric("atma_requests_running"))
    for thread in threads:
        thread.start()
    until(lambda: sum(live.metric("atma_requests_running").values()) >= 1)
    live.command("renew", "17")
    for thread in threads:
        thread.join(120)
    ends = [one.body.decode().split("\n\n")[-3:] for one in told]
    assert [end[1:] for end in ends] == [["data: [DONE]", ""]] * 4
    assert [json.loads(end[0][6:])["choices"][0]["finish_reason"] for end in ends] == ["length"] * 4
    until(lambda: len(live.metric("atma_requests_running")) == 2)
    assert before.isdisjoint(live.metric("atma_requests_running"))


@with_ray
def test_the_service_goes_on_when_a_replica_is_killed(live: Replicas):
    first = conversation(live, "a long story", 1)[0].headers[REPLICA]
    live.command("kill", first)
    until(lambda: live.ask("GET", "/health").status == 200 and statuses(live) == {200})
    answers = conversation(live, "a long story", 3)
    assert first not in {told.headers[REPLICA] for told in answers}
    until(lambda: len(live.metric("atma_memory_budget_bytes")) == 2)


def statuses(live: Replicas) -> set[int]:
    asked = {"prompt": "x", "max_tokens": 1}
    return {live.ask("POST", "/v1/completions", asked | {"cache_salt": str(i)}).status for i in range(10)}


@with_ray
def test_where_the_proxy_knows_the_header_nothing_is_passed_on(folder, tmp_path):
    live = Replicas(folder, tmp_path, RAY_SERVE_SESSION_ID_HEADER_KEY=HEADER)
    try:
        homes = set()
        for number in range(12):
            answers = conversation(live, f"conversation {number}", 3, {HEADER: f"talk-{number}"})
            assert len({told.headers[REPLICA] for told in answers}) == 1
            assert all(told.cached > 0 for told in answers[1:])
            homes.add(answers[0].headers[REPLICA])
        assert len(homes) == 2
        assert b"passed on" not in live.ask("GET", "/metrics").body
    finally:
        live.end()


@with_ray
def test_without_a_key_only_the_proxys_own_machine_is_answered():
    told = subprocess.run(
        [sys.executable, "-c", "from atma.serve.ray.forward import _is_local as f\n"
         "print([f({'client': c}) for c in [('127.0.0.1', 1), ('::1', 1), ('10.0.0.8', 1), ('host', 1), None]])"],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    assert told.stdout.strip() == "[True, True, False, False, False]"


STAND_IN = """
import sys
from types import ModuleType
for name in ("ray", "ray.serve", "ray.exceptions", "ray.serve.exceptions"):
    sys.modules[name] = ModuleType(name)
sys.modules["ray"].serve = sys.modules["ray.serve"]
sys.modules["ray.exceptions"].RayError = sys.modules["ray.serve.exceptions"].RayServeException = OSError
from atma.serve.ray.forward import BODIES, PASSED_ON, Forwarding

here = Forwarding.__new__(Forwarding)
"""
NAMES = """
def name(path, body, routed=False, headers=[]):
    here._routed = routed
    return here._elsewhere({"headers": headers}, body.encode(), BODIES[path])

turns = '"max_tokens": 3, "messages": [{"role": "user", "content": "Hi"}]'
told = name("/v1/messages", '{"system": "Be brief.", %s}' % turns)
system = turns.replace("[{", '[{"role": "system", "content": "Be brief."}, {')
print(told is not None, told == name("/v1/chat/completions", "{%s}" % system), name("/v1/messages", "{}"))

later = '{"input": "x", "previous_response_id": "resp_1_x"}'
mine, other = [(b"x-atma-affinity", b"x")], [(b"x-atma-affinity", b"y")]
print(*(name("/v1/responses", later, *given) for given in ((), (True, mine), (True, other), (False, other))))
"""
AWAY = """
import asyncio
import contextlib
from types import SimpleNamespace
from atma.serve.http.affinity import AWAY

class Handle:
    def options(self, session_id):
        return self

    @contextlib.asynccontextmanager
    async def choose_replica(self):
        if self.home is None:
            raise OSError("gone")
        yield SimpleNamespace(replica_id=self.home)

async def app(scope, receive, send):
    assert (await receive())["body"] == BODY
    print(scope["case"], scope.get(AWAY))

async def receive():
    return {"body": BODY}

BODY, handle = b'{"input": "x"}', Handle()
here.app, here.replica, here._handle, here._routed, here._passing = app, "me", handle, False, 0
for case, home, most, passed in (
    ("home:", "me", 1, False),
    ("unreachable:", None, 1, False),
    ("busy:", "other", 1, False),
    ("homeless:", "other", 0, False),
    ("alone:", "other", None, False),
    ("passed on:", "other", 1, True),
):
    handle.home, here.most, here._passing = home, most, case == "busy:"
    scope = {"case": case, "method": "POST", "path": "/v1/responses", "headers": [], PASSED_ON: passed}
    asyncio.run(here._answer(scope, receive, None))
"""


def without_ray(script: str) -> list[str]:
    """What a script says that needs nothing of Ray but its names, so that it runs anywhere."""
    command = [sys.executable, "-c", STAND_IN + script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()


def test_a_conversation_has_the_same_home_in_the_words_of_either_api():
    assert without_ray(NAMES) == ["True True None", "x None x x"]


def test_what_is_answered_away_from_home_is_not_to_be_kept():
    told = without_ray(AWAY)
    assert told == [
        "home: None",
        "unreachable: True",
        "busy: True",
        "homeless: False",
        "alone: None",
        "passed on: None",
    ]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"replica": 2}, "unknown key 'replica'; did you mean 'replicas'"),
        ({"replicas": "two"}, "'replicas': Input should be a valid integer.*not 'two'"),
        ({"replicas": "0"}, "'replicas' must be at least 1, not 0"),
        ({"cpus": "0"}, "'cpus' must be more than 0"),
        ({"memory_budget": "lots"}, "'lots' is no size"),
        ({"port": "9000"}, "'port' 9000: Ray's proxies listen"),
        ({"model": "nonexistent"}, "nonexistent: no such model folder"),
    ],
)
def test_arguments_that_make_no_sense_are_named(args, told, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match=told):
        build(args)


def test_a_missing_ray_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'atma-lm[ray]'")):
        build({})
