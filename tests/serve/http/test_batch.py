"""A file of requests becomes a file of answers: those of the routes, a line each, once, also after a break."""

import dataclasses
import json

import pytest

from atma.cli import main
from atma.serve.engine import Engine
from atma.serve.http.batch import LONGEST_ID, Batch, Wrong, already, answer_batch, read
from atma.serve.http.batch_options import BatchOptions
from atma.serve.http.errors import encoded
from atma.serve.http.options import ServerOptions
from atma.serve.http.responses.store import Store
from tests.serve.http.conftest import Live

OPTIONS = BatchOptions(model_name="tiny", memory_budget="48MiB", max_rows=4, max_body="4KiB")
TEXT = {"model": "tiny", "prompt": "Once", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


def line(name, url="/v1/completions", body=TEXT, **fields) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body} | fields)


def batch(folder, tmp_path, lines, options=OPTIONS):
    """The counts, and the answers by their names; those of lines without one in a list."""
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_bytes(b"\n".join(one if isinstance(one, bytes) else one.encode() for one in lines) + b"\n")
    counts = answer_batch(str(folder), asked, answered, options).counts
    told = [json.loads(one) for one in answered.read_text().splitlines()]
    named = {one["custom_id"]: one for one in told if one["custom_id"] is not None}
    assert len(named) == sum(one["custom_id"] is not None for one in told)
    return counts, named, [one for one in told if one["custom_id"] is None]


def test_answers_are_those_of_the_routes(folder, tmp_path, live: Live):
    asked = {
        "a": ("/v1/completions", TEXT | {"prompt": ["one", "two"], "n": 2, "seed": 1, "temperature": 1}),
        "b": ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
        "c": ("/v1/embeddings", {"input": ["x", "y"]}),
        "d": ("/v1/completions", TEXT | {"model": "other"}),
        "e": ("/v1/chat/completions", {"messages": []}),
    }
    counts, told, _ = batch(folder, tmp_path, [line(name, *one) for name, one in asked.items()])
    assert counts == "3 answered, 2 refused, 0 failed"
    for name, (url, body) in asked.items():
        served, own = live.post(url, body), told[name]["response"]
        assert (own["status_code"], told[name]["error"]) == (served.status, None)
        assert len(own["request_id"]) == 32
        own, served = own["body"], served.json()
        assert {key for key in own if own[key] != served.get(key)} <= {"id", "created", "usage"}


def test_answers_in_other_forms_are_those_of_their_routes(folder, tmp_path, live: Live):
    asked = {
        "r": ("/v1/responses", {"input": "Hi", "max_output_tokens": 4, "temperature": 0}),
        "t": ("/v1/responses", {"input": "Hi", "text": {"format": {"type": "xml"}}}),
        "w": ("/v1/responses", {"input": "Hi", "store": "yes"}),
        "m": ("/v1/messages", CHAT),
        "e": ("/v1/messages", {"messages": CHAT["messages"]}),
    }
    lines = [line(name, *one) for name, one in asked.items()]
    counts, told, _ = batch(folder, tmp_path, lines)
    assert counts == "2 answered, 3 refused, 0 failed"
    for name, (url, body) in asked.items():
        served, own = live.post(url, body), told[name]["response"]
        assert own["status_code"] == served.status
        assert undated(own["body"]) == undated(served.json())
    assert told["r"]["response"]["body"]["store"] is False
    assert batch(folder, tmp_path, lines)[0] == "0 answered, 0 refused, 0 failed; 5 were done before"


def undated(answer):
    """An answer without what is another each time: ids, times, and what is kept of it."""
    if isinstance(answer, list):
        return [undated(one) for one in answer]
    if not isinstance(answer, dict):
        return answer
    once = {"id", "created_at", "completed_at", "store", "usage"}
    return {key: undated(one) for key, one in answer.items() if key not in once}


def test_no_answer_of_a_batch_is_kept(folder, tmp_path, monkeypatch):
    def kept(*_):
        raise AssertionError("nobody can ask for it")

    monkeypatch.setattr(Store, "put", kept)
    asked = {"input": "Hi", "max_output_tokens": 2}
    stores = enumerate(({}, {"store": True}, {"store": None}, {"store": False}))
    lines = [line(f"{i}", "/v1/responses", asked | store) for i, store in stores]
    assert batch(folder, tmp_path, lines)[0] == "4 answered, 0 refused, 0 failed"


def test_a_line_that_is_no_request_is_told_and_the_others_are_answered(folder, tmp_path):
    wrong = {
        "m": line("m", method="GET"),
        "u": line("u", "/v1/images"),
        "b": line("b", body=[1]),
        "s": line("s", body=TEXT | {"stream": True}),
        "r": line("r", "/v1/responses", {"input": "x", "stream": True}),
        "g": line("g", "/v1/responses", {"input": "x", "background": True}),
        "p": line("p", "/v1/responses", {"input": "x", "previous_response_id": "resp_1_m"}),
        "a": line("a", "/v1/messages", CHAT | {"stream": True}),
    }
    nameless = [
        "no json",
        "[]",
        line(7),
        line("x" * (LONGEST_ID + 1)),
        line("long", body={"prompt": "x" * 9000}),
        b"\xff",
    ]
    counts, told, lost = batch(folder, tmp_path, ["", line("fine"), *wrong.values(), *nameless, "  ", line("last")])
    assert counts == "2 answered, 14 refused, 0 failed"
    assert {told[name]["error"]["code"] for name in wrong} == {"invalid_line"}
    for name, field in (("s", "stream"), ("r", "stream"), ("g", "background"), ("p", "previous_response_id")):
        assert told[name]["error"]["message"].startswith(f"'{field}': ")
    assert told["fine"]["response"]["body"]["choices"] == told["last"]["response"]["body"]["choices"]
    assert len(lost) == len(nameless)
    assert all(one["response"] is None and one["error"]["message"] for one in lost)


def test_what_has_been_answered_is_not_asked_again(folder, tmp_path):
    lines = [line(f"n{i}", body=TEXT | {"prompt": f"{i}"}) for i in range(30)]
    _, first, _ = batch(folder, tmp_path, lines[:20])
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:12]) + whole[12][:40])  # broken off in the middle of a line
    counts, told, _ = batch(folder, tmp_path, [*lines, lines[3]])
    assert counts == "18 answered, 0 refused, 0 failed; 13 were done before"
    assert told.keys() == {f"n{i}" for i in range(30)}
    for name, one in first.items():
        assert told[name]["response"]["body"]["choices"] == one["response"]["body"]["choices"]


def test_lines_without_a_name_are_refused_once(folder, tmp_path):
    lines = ["no json", line(7), line("fine"), "[]", line("x" * (LONGEST_ID + 1)), "[]"]
    assert batch(folder, tmp_path, lines)[0] == "1 answered, 4 refused, 0 failed; 1 were done before"
    held = (tmp_path / "out.jsonl").read_bytes()
    counts, _, lost = batch(folder, tmp_path, lines)
    assert (counts, len(lost)) == ("0 answered, 0 refused, 0 failed; 6 were done before", 4)
    assert (tmp_path / "out.jsonl").read_bytes() == held
    assert batch(folder, tmp_path, [*lines, "other"])[0].startswith("0 answered, 1 refused")


def test_a_request_that_finds_the_queue_full_is_asked_again(folder, tmp_path, monkeypatch):
    from atma.serve.http import batch as module

    real, refused = module.ask, []

    async def crowded(app, url, body):
        if len(refused) < 5:
            refused.append(url)
            return 429, {}, b"{}"
        return await real(app, url, body)

    monkeypatch.setattr(module, "ask", crowded)
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.01)
    assert batch(folder, tmp_path, [line("a"), line("b")])[0] == "2 answered, 0 refused, 0 failed"
    assert len(refused) == 5


def test_a_key_for_servers_in_the_environment_is_not_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ATMA_API_KEY", "a key")
    assert batch(folder, tmp_path, [line("a")])[0] == "1 answered, 0 refused, 0 failed"


def test_a_failed_engine_answers_nothing(folder, tmp_path, monkeypatch, capsys):
    step, count = Engine.step, iter(range(1_000_000))

    def failing(engine):
        if next(count) < 30:
            return step(engine)
        raise RuntimeError("nobody thought of this")

    monkeypatch.setattr(Engine, "step", failing)
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(line(f"{i}") + "\n" for i in range(60)))
    words = ["--model-name", "tiny", "--memory-budget", "48MiB", "--max-rows", "4"]
    assert main(["batch", str(asked), str(answered), "--model", str(folder), *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("atma: error: the model is failed; run this again")
    told = [json.loads(one) for one in answered.read_text().splitlines()]
    assert 0 < len(told) < 60
    assert {one["response"]["status_code"] for one in told} == {200}
    monkeypatch.undo()
    counts, told, _ = batch(folder, tmp_path, [line(f"{i}") for i in range(60)])
    assert "0 refused, 0 failed" in counts
    assert len(told) == 60


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_a_number_that_json_has_not_is_its_own_lines_matter(folder, tmp_path, number):
    wrong = line("wrong", body=TEXT | {"temperature": "T"}).replace('"T"', number)
    counts, told, _ = batch(folder, tmp_path, [wrong, line("fine")])
    assert counts == "1 answered, 1 refused, 0 failed"
    assert "not finite" in told["wrong"]["error"]["message"]


def test_a_full_disk_is_one_line(folder, tmp_path, monkeypatch, capsys):
    def full(batch, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Batch, "_write", full)
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a") + "\n" + line("b") + "\n")
    assert main(["batch", str(asked), str(answered), "--model", str(folder), "--memory-budget", "48MiB"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "atma: error: No space left on device"


def test_only_what_is_under_way_is_in_memory(folder, tmp_path, monkeypatch):
    from atma.serve.http import batch as module

    real, under_way, most = module.ask, [0], [0]

    async def counted(app, url, body):
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        try:
            return await real(app, url, body)
        finally:
            under_way[0] -= 1

    monkeypatch.setattr(module, "ask", counted)
    batch(folder, tmp_path, [line(f"{i}") for i in range(60)])
    assert most[0] == OPTIONS.together == 8


def test_files_that_make_no_sense_are_one_line(folder, tmp_path, capsys):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert main(["batch", str(asked), str(answered)]) == 2
    asked.write_text(line("a") + "\n")
    assert main(["batch", str(asked), str(asked), "--model", str(folder)]) == 2
    answered.write_text('{"something": "else"}\n')
    assert main(["batch", str(asked), str(answered), "--model", str(folder)]) == 2
    assert main(["batch", str(asked), str(answered), "--memory-budget", "lots"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "no such file of requests" in told[0]
    assert "is the file of requests" in told[1]
    assert "line 1 is no answer of a batch" in told[2]
    assert "'lots' is no size" in told[3]
    assert answered.read_text() == '{"something": "else"}\n'


@pytest.mark.parametrize(
    "held",
    [
        '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n',
        '{"custom_id": 5, "response": null, "error": null}\n',
        '{"custom_id": null, "response": null, "error": null}\n',
        "[" * 100_000 + "\n",
        "dear diary",
        '{"id":"batch_req_1","custom_id":"a","response":{},"error":null}\ndear diary',
        '{"id":"batch_req_1","custom_id":"a","resp',
    ],
)
def test_a_file_that_holds_no_answers_stays_as_it_is(tmp_path, held):
    answered = tmp_path / "out.jsonl"
    answered.write_text(held)
    with pytest.raises(ValueError, match=r"out\.jsonl: .* no answer"):
        already(answered)
    assert answered.read_text() == held


def test_a_file_with_nothing_in_it_takes_answers(tmp_path):
    (tmp_path / "out.jsonl").write_bytes(b"")
    assert already(tmp_path / "out.jsonl") == set()


def test_the_command_answers_and_counts(folder, tmp_path, capsys):
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(line("a", body=CHAT, url="/v1/chat/completions") + "\n")
    words = ["batch", str(asked), str(answered), "--model", str(folder), "--memory-budget", "48MiB", "--max-rows", "4"]
    assert main(words) == 0
    assert capsys.readouterr().out == "1 answered, 0 refused, 0 failed\n"
    assert len(already(answered)) == 1


def test_every_option_of_the_server_but_those_of_connections_is_one_of_a_batch():
    connections = {"host", "port", "api_key", "max_waiting", "reader_seconds", "cors_origin", "root_path"}
    names = {field.name for field in dataclasses.fields(ServerOptions)}
    own = {field.name for field in dataclasses.fields(BatchOptions)}
    assert own == names - connections - {"access_log", "drain_seconds"}
    options = BatchOptions(weights="int8", tool_parser="hermes").server()
    assert (options.weights, options.tool_parser) == ("int8", "hermes")


def test_a_line_is_read_as_it_is():
    assert read(line("é").encode(), 4096) == ("é", "/v1/completions", encoded(TEXT))
    with pytest.raises(Wrong, match="custom_id"):
        read(b"{}", 4096)
