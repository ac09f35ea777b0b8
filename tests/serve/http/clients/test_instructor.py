"""instructor: objects by tools, by strict tools, by a schema and by Responses, in parts, and asked for again."""

import openai
import pytest
from pydantic import field_validator

pytest.importorskip("llguidance", reason="the extra [guided] is not installed")
pytest.importorskip("instructor", reason="pip install instructor: the client that is tried here")
import instructor

from tests.serve.http.clients.conftest import Person

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 400}


@pytest.fixture
def patched(api):
    with openai.OpenAI(base_url=api, api_key="none", max_retries=0) as client:
        yield lambda mode: instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_an_answer_is_an_object(patched, mode):
    assert isinstance(patched(mode).create(**ASKED, response_model=Person, max_retries=0), Person)


def test_an_object_comes_in_parts(patched):
    *_, last = patched("JSON_SCHEMA").create_partial(**ASKED, response_model=Person)
    assert Person.model_validate(last.model_dump())


@pytest.mark.parametrize("mode", ["TOOLS_STRICT", "JSON_SCHEMA"])
def test_an_object_that_is_wrong_is_asked_for_again(patched, mode):
    asked = []

    class Picky(Person):
        @field_validator("age")
        @classmethod
        def _second(cls, age):
            asked.append(age)
            if len(asked) < 2:
                raise ValueError("say another age")
            return age

    assert isinstance(patched(mode).create(**ASKED, response_model=Picky, max_retries=3), Picky)
    assert len(asked) >= 2
