"""What a command line repeats is joined or refused, never dropped."""

import functools
import importlib

import pytest
import tyro

from atma.arguments import joined, options
from atma.cli import VERBS, _parse, main
from atma.commands import prepare, train


def commands(verbs, *before):
    """Every verb that is a function, with the words that call it."""
    for verb, (name, _) in verbs.items():
        module, _, function = name.partition(".")
        command = importlib.import_module(f"atma.commands.{module}")
        if not function and hasattr(command, "VERBS"):
            yield from commands(command.VERBS, *before, verb)
        else:
            yield " ".join((*before, verb)), getattr(command, function or "run")


EVERY = dict(commands(VERBS))
LISTS = [(words, name) for words, run in EVERY.items() for name, kind in options(run).items() if kind == "list"]
VALUES = [(words, name) for words, run in EVERY.items() for name, kind in options(run).items() if kind == "value"]


@pytest.mark.filterwarnings("ignore:get_parser")
@pytest.mark.parametrize("words", EVERY)
def test_every_option_that_a_command_has_is_known_with_what_it_takes(words):
    style = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
    call = functools.wraps(EVERY[words])(lambda *positional, **named: None)
    parser = tyro.extras.get_parser(call, config=style)
    found = {name: action.nargs for action in parser._actions for name in action.option_strings}
    takes = {"*": "list", "+": "list", 0: "flag", 1: "value", None: "value"}
    known = options(EVERY[words])
    assert {n: takes[nargs] for n, nargs in found.items() if n not in ("-h", "--help")} == {
        name: kind for name, kind in known.items() if name in found
    }
    assert set(found) - {"-h", "--help"} <= set(known)


@pytest.mark.parametrize(("words", "name"), LISTS, ids=" ".join)
def test_a_list_that_is_given_twice_keeps_all_its_values(words, name):
    run = EVERY[words]
    once = [name, "1", "2", "3"]
    assert joined(run, [name, "1", name, "2", "3"]) == once
    assert joined(run, [f"{name}=1", name, "2", f"{name}=3"]) == once
    assert joined(run, [name, "1", "2", "--seed", "5", name, "3"]) == [*once, "--seed", "5"]
    assert joined(run, [name.replace("-", "_").replace("__", "--"), "1", name, "2", "3"]) == once


@pytest.mark.parametrize(("words", "name"), VALUES, ids=" ".join)
def test_a_single_value_that_is_given_twice_is_refused(words, name):
    for given in ([name, "a", name, "b"], [f"{name}=a", name, "b"], [name, "a", f"{name}=b"]):
        with pytest.raises(ValueError, match=f"^{name} is given twice"):
            joined(EVERY[words], given)


def test_what_is_not_repeated_is_left_as_it_is():
    for line in (
        ["r.toml", "--set", "a=1", "b=2", "--out", "x"],
        ["--resume", "--resume", "r.toml"],
        ["r.toml", "--set", "a=-1", "-2", "--", "--set", "--set"],
        [],
    ):
        assert joined(train.run, line) == line
    assert joined(prepare.run, ["x", "--seed=-1"]) == ["x", "--seed=-1"]


def test_the_values_arrive_where_the_command_is_called():
    call = _parse(train.run, "atma train", ["r.toml", "--set", "a=1", "b=2", "--out", "x", "--set", "c=3"])
    assert call.keywords["assignments"] == ("a=1", "b=2", "c=3")


def test_a_value_given_twice_is_one_line_and_status_2(capsys):
    assert main(["prepare", "x", "--out", "a", "--out", "b"]) == 2
    assert (
        capsys.readouterr().err == "atma: error: --out is given twice; it takes one value: keep the one that you mean\n"
    )


def test_one_setting_of_a_recipe_cannot_be_set_twice():
    with pytest.raises(ValueError, match=r"'train\.tokens' is set twice"):
        train.override(train.Recipe(), ("train.tokens=1", "train.seed=2", "train.tokens=3"))
