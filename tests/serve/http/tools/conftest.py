"""A server with a chat template of tools in each form of calls, for all files of this folder.

`FORMS` of a file names those that its tests are for; without it they are for every form.
"""

from typing import Any

import openai
import pytest

from atma.checkpoint import save_model
from atma.tokenizer import Tokenizer, byte_tokenizer
from tests.serve.conftest import random_model
from tests.serve.http.conftest import OPTIONS, Live
from tests.serve.http.nearly_right import WEATHER

TALK = [{"role": "user", "content": "What is it like in Oslo?"}]
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"weather": WEATHER, "now": {"type": "object", "maxProperties": 0}}
TEMPLATE = """{%- if tools %}{{ tools | tojson }}SIGN{% endif -%}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}
{%- for call in m.tool_calls %}{% set f = call.function %}[{{ call.id }} {{ f.name }} {{ f.arguments | tojson }}]
{%- endfor -%}
{{ m.tool_call_id }}{% endfor %}<assistant>"""
SIGNS = {
    "hermes": "<tool_call>",
    "llama3": "<|python_tag|>",
    "lfm2": "<|tool_call_start|> <|tool_call_end|>",
    "mistral": "[TOOL_CALLS]",
}


def special_tokenizer(signs: str) -> Tokenizer:
    """Bytes, and special tokens for these signs, as in many models."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(signs.split())
    return Tokenizer(backend, 256)


def served(tmp_path_factory, form: str, plain: bool = False) -> Live:
    folder = tmp_path_factory.mktemp("tools") / form
    tokenizer = byte_tokenizer() if plain or form == "hermes" else special_tokenizer(SIGNS[form])
    save_model(folder, random_model(vocabulary=tokenizer.vocab_size), tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("SIGN", SIGNS[form]))
    return Live(folder, OPTIONS)


def pytest_generate_tests(metafunc: Any) -> None:
    if "live" in metafunc.fixturenames:
        forms = getattr(metafunc.module, "FORMS", list(SIGNS))
        metafunc.parametrize("live", forms, indirect=True, scope="module")


@pytest.fixture(scope="module")
def live(request, tmp_path_factory):
    server = served(tmp_path_factory, request.param)
    server.form = request.param
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(live: Live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=300) as opened:
        yield opened
