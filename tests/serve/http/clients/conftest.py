"""A server with tools for programs of others, which know nothing of it, and what they ask of it.

The model is random: what it is held to is valid, and what it says freely means nothing. Each program is tried where it
is installed, by `pip install` of the package that its test names, and skipped elsewhere.
"""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from tests.serve.http.tools.conftest import served


class Person(BaseModel):
    """Somebody, with nothing in it that a random model could write on and on."""

    model_config = ConfigDict(extra="forbid")
    name: Literal["Ann", "Bob"]
    age: Literal[30, 40]
    kind: Literal["a", "b"]


def weather(city: Literal["Oslo", "Rome"], unit: Literal["C", "F"]) -> str:
    """What it is like in a city."""
    return f"12 {unit} in {city}"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = served(tmp_path_factory, "hermes")
    yield server
    server.stop()


@pytest.fixture
def api(live) -> str:
    """Where OpenAI's API is."""
    return f"{live.url}/v1"
