"""Browsers of other origins, proxies with a prefix, logs, metrics and their dashboard, and the schema of answers."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from atma.serve.http import schemas
from atma.serve.http.logs import JsonLines, logs
from atma.serve.http.options import ServerOptions
from atma.serve.http.responses.schemas import ResponseAnswer
from tests.serve.http.conftest import OPTIONS, Live

ROOT = Path(__file__).parents[3]
PAGE = "https://app.example"
TEXT = {"prompt": "Once", "max_tokens": 3, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
ASKS = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
def behind(folder):
    """A server with a key, for one page of elsewhere, behind a proxy's prefix."""
    options = dataclasses.replace(
        OPTIONS, api_key="secret", cors_origin=f"{PAGE}, http://other.example:3000", root_path="/models/mine/"
    )
    server = Live(folder, options)
    yield server
    server.stop()


def test_no_page_of_elsewhere_may_ask_by_default(live: Live):
    told = live.ask("OPTIONS", "/v1/completions", headers=ASKS)
    assert told.status == 405
    assert not [name for name in told.headers if name.startswith("access-control")]
    assert "access-control-allow-origin" not in live.post("/v1/completions", TEXT, {"origin": PAGE}).headers


def test_a_browser_is_told_before_it_asks_and_needs_no_key_for_that(behind: Live):
    told = behind.ask("OPTIONS", "/v1/completions", headers=ASKS | {"access-control-request-private-network": "true"})
    assert (told.status, told.body) == (204, b"")
    assert told.headers["access-control-allow-origin"] == PAGE
    assert told.headers["access-control-allow-headers"] == ASKS["access-control-request-headers"]
    assert "POST" in told.headers["access-control-allow-methods"]
    assert told.headers["access-control-allow-private-network"] == "true"
    assert "Origin" in told.headers["vary"]
    strange = behind.ask("OPTIONS", "/v1/completions", headers=ASKS | {"access-control-request-headers": "a b;c"})
    assert "access-control-allow-headers" not in strange.headers
    assert behind.ask("OPTIONS", "/v1/completions", headers={"origin": PAGE}).status == 401
    foreign = behind.ask("OPTIONS", "/v1/completions", headers=ASKS | {"origin": "https://evil.example"})
    assert foreign.status == 401
    assert "access-control-allow-origin" not in foreign.headers


def test_an_allowed_page_may_read_answers_and_refusals(behind: Live):
    key = {"authorization": "Bearer secret"}
    for headers, status in ((key, 200), ({}, 401)):
        told = behind.post("/v1/completions", TEXT, headers | {"origin": PAGE})
        assert told.status == status
        assert told.headers["access-control-allow-origin"] == PAGE
        assert "x-request-id" in told.headers["access-control-expose-headers"]
    told = behind.post("/v1/completions", TEXT | {"stream": True}, key | {"origin": "http://other.example:3000"})
    assert told.headers["access-control-allow-origin"] == "http://other.example:3000"
    evil = behind.post("/v1/completions", TEXT, key | {"origin": PAGE + ".evil"})
    assert (evil.status, evil.headers["vary"]) == (200, "Origin")
    assert "access-control-allow-origin" not in evil.headers


def test_any_page_may_ask_a_server_that_says_so(folder):
    live = Live(folder, dataclasses.replace(OPTIONS, cors_origin="*"))
    try:
        assert live.post("/v1/completions", TEXT, {"origin": "null"}).headers["access-control-allow-origin"] == "*"
    finally:
        live.stop()


def test_a_prefix_is_taken_off_by_the_proxy_or_here(behind: Live):
    key = {"authorization": "Bearer secret"}
    for prefix in ("", "/models/mine"):
        assert behind.ask("GET", prefix + "/health").json()["status"] == "ready"
        assert behind.ask("GET", prefix + "/").headers["content-type"].startswith("text/html")
        assert behind.post(prefix + "/v1/completions", TEXT, key).status == 200
        assert behind.ask("GET", prefix + "/v1/models/tiny", headers=key).json()["id"] == "tiny"
    schema = behind.ask("GET", "/models/mine/openapi.json", headers=key).json()
    assert schema["servers"] == [{"url": "/models/mine"}]
    bare = behind.ask("GET", "/models/mine")
    assert (bare.status, bare.headers["location"]) == (307, "/models/mine/")
    assert behind.ask("GET", "/models/mine/health/", headers=key).status == 404
    for path in ("/models/mine/v1/models", "/models/minex/health", "/models/mine/models/mine/v1/models"):
        assert behind.ask("GET", path).status == 401


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cors_origin", "app.example"),
        ("cors_origin", "https://app.example/page"),
        ("cors_origin", "null"),
        ("root_path", "mine"),
        ("root_path", "/a b"),
        ("root_path", "/v1"),
        ("root_path", "/a/../b"),
        ("access_log", "xml"),
    ],
)
def test_options_that_make_no_sense_are_refused(field, value):
    with pytest.raises(ValueError, match=re.escape(value)):
        ServerOptions(**{field: value})


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/metrics", "/openapi.json", "/", "/tokenizer_info", "/none"]
)
def test_whatever_is_had_by_get_is_asked_for_by_head(live: Live, path):
    got, asked = live.ask("GET", path), live.ask("HEAD", path)
    assert (asked.status, asked.body) == (got.status, b"")
    assert asked.headers["content-type"] == got.headers["content-type"]


def samples(live: Live) -> dict[str, list[dict[str, str]]]:
    """The labels of every sample, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(live.ask("GET", "/metrics").body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_metrics_name_the_model_and_tell_of_the_process(live: Live):
    live.post("/v1/completions", TEXT)
    found = samples(live)
    own = [labels for name, several in found.items() if name.startswith("atma_") for labels in several]
    assert {labels["model_name"] for labels in own} == {"tiny"}
    assert found["process_resident_memory_bytes"] == [{}]
    assert {"process_cpu_seconds_total", "process_open_fds", "process_start_time_seconds"} <= found.keys()


def test_the_dashboard_shows_metrics_that_there_are(live: Live):
    live.post("/v1/completions", TEXT | {"best_of": 7})
    live.post("/v1/completions", TEXT)
    board = json.loads((ROOT / "deploy/grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    named = {name for text in asked for name in re.findall(r"\b(?:atma|process)_[a-z_]+", text)}
    assert len(named) > 20
    assert named - samples(live).keys() == set()
    for kind in ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens", "http_requests", "cache_hits"):
        assert f"atma_{kind}_total" in named


def test_the_panels_of_the_dashboard_tell_apart_by_labels_that_there_are_and_lie_beside_each_other(live: Live):
    live.post("/v1/completions", TEXT | {"best_of": 7})
    found, places = samples(live), set()
    for panel in json.loads((ROOT / "deploy/grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {"instance"}  # of Prometheus itself
            metrics = re.findall(r"\b(?:atma|process)_[a-z_]+", target["expr"])
            assert all(names <= labels.keys() for metric in metrics for labels in found[metric])
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not own & places
        places |= own


def validated(live: Live, kind, told) -> None:
    assert told.status in (200, 503), told.body
    kind.model_validate(told.json(), strict=True)


def test_answers_are_what_the_schema_says(live: Live):
    ids = {"return_token_ids": True}
    validated(live, schemas.ChatAnswer, live.post("/v1/chat/completions", CHAT))
    scored = CHAT | ids | {"logprobs": True, "top_logprobs": 2, "n": 2}
    validated(live, schemas.ChatAnswer, live.post("/v1/chat/completions", scored))
    validated(live, schemas.TextAnswer, live.post("/v1/completions", TEXT | ids | {"logprobs": 2, "echo": True}))
    validated(live, schemas.TextAnswer, live.post("/v1/completions", TEXT))
    for encoding in ("float", "base64"):
        told = live.post("/v1/embeddings", {"input": "x", "encoding_format": encoding})
        validated(live, schemas.EmbeddingAnswer, told)
    asked = {"messages": CHAT["messages"], "max_tokens": 3}
    validated(live, schemas.MessageAnswer, live.post("/v1/messages", asked))
    validated(live, schemas.CountAnswer, live.post("/v1/messages/count_tokens", {"messages": CHAT["messages"]}))
    validated(live, ResponseAnswer, live.post("/v1/responses", {"input": "x", "max_output_tokens": 3}))
    validated(live, schemas.TokenizeAnswer, live.post("/tokenize", {"prompt": "x"}))
    validated(live, schemas.DetokenizeAnswer, live.post("/detokenize", {"tokens": [1]}))
    validated(live, schemas.ModelsAnswer, live.ask("GET", "/v1/models"))
    validated(live, schemas.ModelAnswer, live.ask("GET", "/v1/models/tiny"))
    validated(live, schemas.HealthAnswer, live.ask("GET", "/health"))
    validated(live, schemas.TokenizerAnswer, live.ask("GET", "/tokenizer_info"))
    schemas.ErrorAnswer.model_validate(live.post("/v1/completions", {}).json(), strict=True)
    schemas.MessageErrorAnswer.model_validate(live.post("/v1/messages", {}).json(), strict=True)


def test_the_schema_has_every_route_and_no_status_that_never_comes(live: Live):
    schema = live.ask("GET", "/openapi.json").json()
    for path, operations in schema["paths"].items():
        assert ("head" in operations) == ("get" in operations)
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            if method == "head":
                assert not any("content" in told for told in operation["responses"].values())
                continue
            told = operation["responses"]["200"]["content"]
            assert path == "/metrics" or told["application/json"]["schema"]["$ref"].endswith("Answer")
            if path != "/metrics":
                wrong = operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"]
                assert wrong.endswith("/MessageErrorAnswer" if "/messages" in path else "/ErrorAnswer")
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    sent = [body for name, body in schema["components"]["schemas"].items() if name.endswith("Body")]
    assert sent and all(body["additionalProperties"] == {"type": "null"} for body in sent)
    assert "text/event-stream" in schema["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]


def logged(folder, form, capsys) -> list[str]:
    """What a server writes to stderr for an answer, a refusal and a message of its own."""
    capsys.readouterr()
    with logs(form):
        live = Live(folder, dataclasses.replace(OPTIONS, access_log=form))
        try:
            live.post("/v1/completions", TEXT | {"prompt": "a secret"}, {"x-request-id": "mine"})
            live.post("/v1/completions", TEXT | {"best_of": 3})
        finally:
            live.stop()
    return capsys.readouterr().err.splitlines()


def test_a_log_of_json_has_one_object_for_each_request_and_nothing_of_its_text(folder, capsys):
    told = [json.loads(line) for line in logged(folder, "json", capsys)]
    first, second = (one for one in told if one.get("route") == "/v1/completions")
    assert (first["id"], first["route"], first["method"], first["status"]) == ("mine", "/v1/completions", "POST", 200)
    assert (first["prompt_tokens"], first["answer_tokens"], first["error"]) == (9, 3, None)
    assert 0 < first["first_token_seconds"] <= first["seconds"]
    assert (second["status"], second["error"]) == (400, "invalid_value")
    assert any("draining" in one.get("message", "") for one in told)
    assert "secret" not in json.dumps(told)


def test_a_log_that_is_off_tells_no_requests(folder, capsys):
    told = "\n".join(logged(folder, "off", capsys))
    assert "draining" in told
    assert "/v1/completions" not in told


def test_a_fault_is_one_line_of_json():
    try:
        raise KeyError("x")
    except KeyError as error:
        given = (KeyError, error, error.__traceback__)
    record = logging.LogRecord("atma.serve", logging.ERROR, "here", 1, "id=%s: fault", ("7",), given)
    told = json.loads(JsonLines().format(record))
    assert (told["level"], told["message"]) == ("error", "id=7: fault")
    assert "KeyError" in told["error"]


def test_the_container_runs_as_nobody_in_particular_and_is_asked_for_its_health():
    text = (ROOT / "deploy/Dockerfile").read_text()
    user, health = text.index("USER atma"), text.index("HEALTHCHECK")
    assert user < health < text.index("ENTRYPOINT")
    assert "/health" in text
    command = json.loads(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1])  # pyright: ignore
    assert command[:3] == ["nano", "--host", "0.0.0.0"]
