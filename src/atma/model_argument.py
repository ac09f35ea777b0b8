"""One way to name a model: first among the words, or with --model, in every verb that takes one model.

A verb has the one or the other in its signature; this puts what the user wrote where the verb looks. Both at
once are an error unless they are the same. The prompt of `atma generate` comes first, so that its model has --model
alone; and a verb that trains models of its own takes none.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from atma.arguments import is_option, options

OPTION = "--model"
FIRST = ("model", "base")
"""What a verb calls its first word where that is the model."""


def placed(run: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """The arguments with the model where `run` looks for it. ValueError: it is named twice, and not alike."""
    arguments, kinds = list(arguments), options(run)
    if takes_first(run):
        return _first(run, arguments, kinds)
    if takes_option(run):
        return _as_option(arguments, kinds)
    return arguments


def said(run: Callable[..., Any]) -> str:
    """What the help of a verb says of it; nothing where it takes no model."""
    if takes_first(run):
        return f"{words(run)[0].upper()} may also be given as {OPTION} MODEL."
    return f"The model may also be given first, without {OPTION}." if takes_option(run) else ""


def takes_first(run: Callable[..., Any]) -> bool:
    """Whether the first word of a verb is its model."""
    return words(run)[:1] in [[name] for name in FIRST]


def takes_option(run: Callable[..., Any]) -> bool:
    """Whether a verb takes its model as an option, and no words at all."""
    return not words(run) and options(run).get(OPTION) == "value"


def words(run: Callable[..., Any]) -> list[str]:
    """What a verb takes without a name."""
    given = inspect.signature(run).parameters.values()
    return [one.name for one in given if one.kind is inspect.Parameter.POSITIONAL_ONLY]


def _first(run: Callable[..., Any], arguments: list[str], kinds: dict[str, Any]) -> list[str]:
    model, rest = _taken(arguments)
    if model is None:
        return rest
    own = _words(rest, kinds)
    if len(own) < len(words(run)):
        return [model, *rest]
    _require_same(own[0][1], model)
    return rest


def _as_option(arguments: list[str], kinds: dict[str, Any]) -> list[str]:
    own = _words(arguments, kinds)
    if len(own) != 1:
        return arguments
    place, word = own[0]
    rest = [*arguments[:place], *arguments[place + 1 :]]
    model, without = _taken(rest)
    if model is not None:
        _require_same(word, model)
    return [*without, OPTION, word]


def _taken(arguments: list[str]) -> tuple[str | None, list[str]]:
    """What the only --model says, and the other arguments; None where there is none, or more than one."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    places = [i for i in range(end) if arguments[i].partition("=")[0] == OPTION]
    if len(places) > 1:
        raise ValueError(f"{OPTION} is given twice; it takes one value: keep the one that you mean")
    if not places:
        return None, arguments
    place = places[0]
    _, equals, value = arguments[place].partition("=")
    if equals:
        return value, [*arguments[:place], *arguments[place + 1 :]]
    if place + 1 >= end:
        raise ValueError(f"{OPTION}: name a model: a packaged one (see `atma info`), a model folder or a run folder")
    return arguments[place + 1], [*arguments[:place], *arguments[place + 2 :]]


def _words(arguments: list[str], kinds: dict[str, Any]) -> list[tuple[int, str]]:
    """Place and text of what belongs to no option."""
    found: list[tuple[int, str]] = []
    taking = "flag"
    for place, argument in enumerate(arguments):
        if argument == "--":
            return found
        if is_option(argument):
            name, equals, _ = argument.partition("=")
            taking = kinds.get(name.replace("_", "-"), "flag")
            taking = "flag" if equals and taking == "value" else taking
        elif taking == "flag":
            found.append((place, argument))
        elif taking == "value":
            taking = "flag"
    return found


def _require_same(word: str, option: str) -> None:
    if word != option:
        raise ValueError(f"two models: '{word}', and {OPTION} {option}; keep the one that you mean")
