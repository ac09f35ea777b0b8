"""Settings of generation, and their keyword arguments."""

import dataclasses
import typing

import pytest

from atma.settings import Settings, SettingsOptions, merged


def test_keyword_arguments_are_the_fields_of_settings() -> None:
    fields = {one.name: one.type for one in dataclasses.fields(Settings)}
    options = typing.get_type_hints(SettingsOptions)
    assert list(options) == list(fields)
    looser = ("stop", "stop_tokens")
    assert {name: kind for name, kind in options.items() if name not in looser} == {
        name: kind for name, kind in typing.get_type_hints(Settings).items() if name not in looser
    }


def test_the_defaults_that_the_options_tell_are_those_of_settings() -> None:
    for one in dataclasses.fields(Settings):
        value = () if one.default == () else one.default
        told = f"{value:g}" if type(value) in (int, float) else str(value)
        assert f"{one.name} {told}" in " ".join((SettingsOptions.__doc__ or "").split())


def test_options_stand_in_the_place_of_fields() -> None:
    assert merged(Settings(top_k=3), {"seed": 5}) == Settings(top_k=3, seed=5)
    assert merged(None, {"stop": "end", "stop_tokens": [1]}) == Settings(stop=("end",), stop_tokens=(1,))


def test_settings_show_what_differs_and_are_read_back() -> None:
    settings = Settings(max_tokens=3, stop=("a",))
    assert repr(settings) == "Settings(max_tokens=3, stop=('a',))"
    assert eval(repr(settings)) == settings
    assert repr(Settings()) == "Settings()"


def test_an_unknown_option_is_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'top_k'"):
        merged(None, {"topk": 1})  # pyright: ignore
