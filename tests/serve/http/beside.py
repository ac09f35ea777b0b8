"""A good client, which asks the same again and again while others misbehave, and is to be told the same."""

import json
import logging
import threading
import time
from typing import Any

from tests.serve.http.conftest import Live, Told

TALK = [{"role": "user", "content": "Are you undisturbed?"}]
GOOD: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": (
        "/v1/completions",
        {"prompt": "undisturbed", "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True},
    ),
    "drawn": ("/v1/chat/completions", {"messages": TALK, "max_tokens": 20, "seed": 5, "logprobs": True, "n": 2}),
    "adapter": ("/v1/completions", {"model": "poet", "prompt": "undisturbed", "max_tokens": 20, "temperature": 0}),
    "vector": ("/v1/embeddings", {"input": ["undisturbed", "vectors"], "encoding_format": "base64"}),
    "message": ("/v1/messages", {"messages": TALK, "max_tokens": 20, "top_k": 1, "stream": True}),
    "response": ("/v1/responses", {"input": "undisturbed", "max_output_tokens": 20, "seed": 6}),
    "held": (
        "/v1/completions",
        {"prompt": "x", "max_tokens": 30, "seed": 7, "structured_outputs": {"regex": "[a-f]{9,20}"}},
    ),
}
SAID = {"text", "content", "logprobs", "embedding", "delta", "output_text", "finish_reason", "stop_reason", "logprob"}
BUSY = (429, 503)


def failures(caplog: Any) -> list[logging.LogRecord]:
    """What the server logged as its own fault, whatever others have its loggers tell besides."""
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


def said(value: Any) -> Any:
    """What an answer says, without ids and times."""
    if isinstance(value, list):
        return [said(part) for part in value]
    if not isinstance(value, dict):
        return value
    own = {k: said(part) for k, part in value.items() if k in SAID}
    return own | {k: said(part) for k, part in value.items() if k not in SAID and isinstance(part, dict | list)}


def told(live: Live, name: str) -> Any:
    """What a good request is answered, which waits as it is told to where the server is busy."""
    path, body = GOOD[name]
    while (answer := live.post(path, body)).status in BUSY:
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
    assert answer.status == 200, (name, answer.status, answer.body)
    return text(answer) if body.get("stream") else said(answer.json())


def text(answer: Told) -> str:
    """Of a stream."""
    found = []
    for line in answer.body.decode().splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            assert "error" not in event, event
            found += [choice["text"] for choice in event.get("choices", ())]
            found.append(event.get("delta", {}).get("text") or "")
    return "".join(found)


class Beside:
    """It goes on in a thread of its own; at the end every answer is compared with the one that it had alone."""

    def __init__(self, live: Live, *names: str) -> None:
        self.live, self.stop = live, threading.Event()
        self.rounds, self.longest, self.different, self.failed = 0, 0.0, list[str](), list[BaseException]()
        self.alone = {name: told(live, name) for name in names or ("stream",)}
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self.stop.is_set():
                began = time.monotonic()
                self.different += [name for name, before in self.alone.items() if told(self.live, name) != before]
                self.longest = max(self.longest, time.monotonic() - began)
                self.rounds += 1
        except BaseException as error:
            self.failed.append(error)

    def __enter__(self) -> "Beside":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.thread.join()
        assert not self.failed
        assert not self.different
        assert self.rounds
