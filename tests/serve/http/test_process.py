"""The command: what it refuses before it begins, what it says while it loads, and how it ends."""

import dataclasses
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from atma.cli import main
from atma.commands import serve as command
from atma.serve.http.options import ServerOptions, byte_count
from atma.serve.http.service import Service
from tests.serve.http.conftest import OPTIONS, Live

ENDLESS = {"prompt": "on and on", "max_tokens": 100_000, "ignore_eos": True, "stream": True}


def failing(capsys, *arguments) -> str:
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    assert main(["serve", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if not line.startswith("atma: loading")]
    assert len(lines) == 1, told
    assert lines[0].startswith("atma: error: ")
    return lines[0]


def test_other_machines_need_a_key(capsys, monkeypatch, folder):
    monkeypatch.delenv("ATMA_API_KEY", raising=False)
    for host in ("0.0.0.0", "::"):
        assert f"--host {host} can be reached from other machines: set ATMA_API_KEY" in failing(
            capsys, folder, "--host", host
        )
    assert "visible ASCII" in failing(capsys, folder, "--api-key", "")
    monkeypatch.setenv("ATMA_API_KEY", "from the environment")
    assert "visible ASCII" in failing(capsys, folder)


def test_a_port_that_is_taken_is_one_line(capsys, folder, live: Live):
    told = failing(capsys, folder, "--port", live.port)
    assert told == (
        f"atma: error: cannot listen at 127.0.0.1 port {live.port}: Address already in use; name another --port"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonexistent"], "nonexistent: no such model folder"),
        (["nano", "--memory-budget", "lots"], "'lots' is no size; write it like 2GiB"),
        (["nano", "--memory-budget", "1KiB", "--port", "0"], "leaves no page"),
        (["nano", "--port", "70000"], "'--port' must be from 0 to 65535, not 70000"),
        (["nano", "--host", "no.such.host.invalid"], "no such address"),
        (["nano", "--drain-seconds", "-1"], "--drain-seconds"),
        (["nano", "--max-rows", "0"], "max_rows"),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, arguments, told):
    assert told in failing(capsys, *arguments)


def test_a_damaged_model_is_one_line(capsys, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors" in failing(capsys, broken, "--port", 0)


def test_packages_that_are_missing_are_named_with_the_mend(capsys, monkeypatch):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert failing(capsys, "nano") == "atma: error: the server needs more packages: pip install 'atma-lm[serve]'"


def test_sizes_are_read_as_people_write_them():
    sizes = {"2GiB": 2 << 30, "512 MiB": 512 << 20, "1.5GB": 1_500_000_000, "1048576": 1 << 20, "4kib": 4096, "7b": 7}
    assert {text: byte_count(text) for text in sizes} == sizes
    for bad in ("", "GiB", "1 2", "-1", "1e9", "２GiB"):
        with pytest.raises(ValueError, match="is no size"):
            byte_count(bad)
    config = ServerOptions(memory_budget="1GiB", max_rows=400).engine_config()
    assert (config.memory_bytes, config.cache_bytes, config.step_tokens) == (1 << 30, 384 << 20, 800)


class Loading:
    """A server whose model waits to be loaded."""

    def __init__(self, folder, monkeypatch) -> None:
        self.go = threading.Event()
        build = Service._engine

        def slow(service):
            self.go.wait(60)
            return build(service)

        monkeypatch.setattr(Service, "_engine", slow)
        monkeypatch.setattr(Service, "state", property(lambda service: service._state))
        starter = threading.Thread(target=lambda: setattr(self, "live", Live(folder)))
        ports: list[int] = []
        before = Live.__init__

        def noting(live, *rest):
            self.live = live
            ports.append(0)
            before(live, *rest)

        monkeypatch.setattr(Live, "__init__", noting)
        starter.start()
        self.live: Live
        while not ports or self.live.__dict__.get("loop") is None:
            time.sleep(0.01)
        self.starter = starter


def test_while_it_loads_health_is_503_and_requests_are_told_to_wait(folder, monkeypatch):
    loading = Loading(folder, monkeypatch)
    live = loading.live
    try:
        for told in (live.ask("GET", "/health"), live.post("/v1/completions", {"prompt": "x"})):
            assert told.status == 503
            assert int(told.headers["retry-after"]) >= 1
        assert live.ask("GET", "/health").json()["status"] == "loading"
        assert live.post("/v1/completions", {"prompt": "x"}).error()["code"] == "loading"
        assert live.ask("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
        assert live.ask("GET", "/metrics").status == live.ask("GET", "/").status == 200
        loading.go.set()
        loading.starter.join(300)
        assert live.ask("GET", "/health").status == 200
    finally:
        loading.go.set()
        live.stop()


def test_a_server_that_still_loads_ends_when_asked(folder, monkeypatch):
    loading = Loading(folder, monkeypatch)
    began = time.monotonic()
    loading.live.stop()
    assert time.monotonic() - began < 120
    loading.go.set()
    loading.starter.join(300)


def test_draining_lets_answers_end_and_takes_no_new_ones(folder):
    live = Live(folder, dataclasses.replace(OPTIONS, drain_seconds=300))
    told: list = []
    asked = {"prompt": "last words", "max_tokens": 400, "ignore_eos": True, "stream": True}
    thread = threading.Thread(target=lambda: told.append(live.post("/v1/completions", asked)))
    thread.start()
    while not live.stats()["writing"]:
        time.sleep(0.005)
    assert live.loop is not None
    live.loop.call_soon_threadsafe(live.process.end)
    while live.service.state != "draining":
        time.sleep(0.001)
    health, refused = live.ask("GET", "/health"), live.post("/v1/completions", asked)
    assert (health.status, health.json()["status"]) == (503, "draining")
    assert (refused.status, refused.error()["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    thread.join()
    assert told[0].events()[-1]["choices"][0]["finish_reason"] == "length"
    live.stop()


def test_what_does_not_end_in_time_is_aborted_and_told(folder):
    live = Live(folder, dataclasses.replace(OPTIONS, drain_seconds=0.2))
    told: list = []
    bodies = [ENDLESS | {"max_tokens": 20_000}, ENDLESS | {"max_tokens": 20_000, "stream": False}]
    threads = [threading.Thread(target=lambda b=b: told.append(live.post("/v1/completions", b))) for b in bodies]
    for thread in threads:
        thread.start()
    while live.stats()["writing"] < 2:
        time.sleep(0.005)
    live.stop()
    for thread in threads:
        thread.join()
    whole, streamed = sorted(told, key=lambda t: -t.status)
    assert (whole.status, whole.error()["code"]) == (503, "draining")
    assert (streamed.status, streamed.events()[-1]["error"]["code"]) == (200, "draining")


class Started:
    """The command in a process of its own."""

    def __init__(self, folder, *options) -> None:
        command = [sys.executable, "-m", "atma", "serve", str(folder), "--port", "0", *options]
        pipe = subprocess.PIPE
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # tests in the background inherit it as ignored
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=os.environ | {"OMP_NUM_THREADS": "1"})
        signal.signal(signal.SIGINT, before)
        self.opened: list = []
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().decode()
        self.port = int(self.said.split("http://127.0.0.1:")[1].split()[0])

    def stream(self, body: dict) -> http.client.HTTPResponse:
        """A stream that has begun."""
        wire = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        wire.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = wire.getresponse()
        response.readline()
        self.opened += [response, wire]
        return response

    def ended(self, seconds: float) -> tuple[int, str]:
        try:
            error = self.process.communicate(timeout=seconds)[1]
        finally:
            self.process.kill()
            for one in self.opened:
                one.close()
        return self.process.returncode, error.decode()


def test_sigterm_ends_the_process_with_status_0_once_answers_have_ended(folder, tmp_path):
    started = Started(folder, "--cache-dir", str(tmp_path / "states"))
    stream = started.stream(ENDLESS | {"max_tokens": 300})
    started.process.send_signal(signal.SIGTERM)
    text = stream.read().decode()
    status, error = started.ended(300)
    assert status == 0
    assert '"finish_reason":"length"' in text
    assert text.endswith("data: [DONE]\n\n")
    assert "Traceback" not in error
    assert "on and on" not in error
    assert list((tmp_path / "states").iterdir())


def test_a_second_signal_ends_the_process_at_once(folder):
    started = Started(folder, "--drain-seconds", "600")
    started.stream(ENDLESS | {"max_tokens": 20_000})
    started.process.send_signal(signal.SIGINT)
    while http_status(started.port) != 503:
        time.sleep(0.01)
    started.process.send_signal(signal.SIGINT)
    status, error = started.ended(300)
    assert status == -signal.SIGINT
    assert "Traceback" not in error


def http_status(port: int) -> int:
    wire = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    wire.request("GET", "/health")
    try:
        return wire.getresponse().status
    finally:
        wire.close()
