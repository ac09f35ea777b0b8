"""A model is named first or with --model, in every verb that takes one."""

import pytest

from atma.cli import _parse, main
from atma.model_argument import placed, takes_first, takes_option
from tests.test_arguments import EVERY

FIRST = [words for words, run in EVERY.items() if takes_first(run)]
OPTION = [words for words, run in EVERY.items() if takes_option(run)]
REST = {
    "export": ["out"],
    "merge": ["adapters", "out"],
    "compress": ["out", "--texts", "t"],
    "narrow": ["out"],
    "extend": ["out"],
}
NONE = {"import", "prepare", "generate", "eval diff", "eval recall", "demo", "bench", "runs", "completion", "train"}


def test_every_verb_that_takes_a_model_takes_it_both_ways():
    assert {"chat", "serve", "diagnose", "info", "export", "merge", "compress", "extend"} <= set(FIRST)
    assert {f"eval {name}" for name in ("lengths", "likelihood", "tasks", "retrieval", "reasoning")} <= set(OPTION)
    assert not NONE & {*FIRST, *OPTION}


def meant(words, *arguments):
    """What a command line means, in the end."""
    call = _parse(EVERY[words], f"atma {words}", list(arguments))
    return call.args, call.keywords


@pytest.mark.parametrize("words", FIRST)
def test_a_model_that_comes_first_may_come_as_an_option(words):
    rest = REST.get(words, [])
    wanted = meant(words, "nano", *rest)
    assert meant(words, "--model", "nano", *rest) == wanted
    assert meant(words, *rest, "--model=nano") == wanted
    assert meant(words, "nano", *rest, "--model", "nano") == wanted


@pytest.mark.parametrize("words", OPTION)
def test_a_model_that_is_an_option_may_come_first(words):
    wanted = meant(words, "--model", "nano-rope")
    assert meant(words, "nano-rope") == wanted
    assert meant(words, "nano-rope", "--model", "nano-rope") == wanted
    assert meant(words, "nano-rope", "--out", "rows.jsonl") == meant(words, "--out", "rows.jsonl", "nano-rope")


@pytest.mark.parametrize("words", [*FIRST, *OPTION])
def test_two_models_that_differ_are_refused(words):
    with pytest.raises(ValueError, match=r"^two models: 'a', and --model b; keep the one that you mean$"):
        meant(words, "a", *REST.get(words, []), "--model", "b")


def test_mistakes_are_one_line(capsys):
    assert main(["info", "--model", "a", "--model", "b"]) == 2
    assert main(["info", "--model"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("atma: error: --model is given twice")
    assert told[1].startswith("atma: error: --model: name a model")


def test_what_is_no_model_is_left_where_it_is():
    lengths, info = EVERY["eval lengths"], EVERY["info"]
    for line in (["--lengths", "128", "256"], [], ["a", "b"], ["--", "nano"], ["--no-junk"]):
        assert placed(lengths, line) == line
    assert placed(info, ["--", "--model"]) == ["--", "--model"]
    assert placed(EVERY["generate"], ["x", "--model", "nano"]) == ["x", "--model", "nano"]
    assert placed(lengths, ["--no-junk", "nano", "--lengths", "1", "2"]) == [
        "--no-junk", "--lengths", "1", "2", "--model", "nano",
    ]  # fmt: skip
