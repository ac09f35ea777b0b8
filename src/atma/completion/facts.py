"""Everything that can be completed, as one table of texts that all shells look up.

    verbs:eval                   the verbs of a table ("verbs:" alone: those of atma)
    options:eval lengths         the options of a verb
    option:eval lengths --data   what an option takes ("value", "list" or "flag") and what that is
    place:chat 0                 what the first word of a verb is
    models: recipes: keys:       names of packaged models, recipes and settings

What a value is: "model", "recipe", "key", "path", "choice" with its words behind it, or "none".
"""

import importlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from atma.arguments import hints, options
from atma.model_argument import FIRST, OPTION, takes_first, words
from atma.shipped import recipe_names

KINDS = {"model": "model", "from": "model", "base": "model", "recipe": "recipe", "set": "key"}
"""What the value of an argument of a name is, where its type does not say it."""


def table(verbs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """The table of a table of verbs."""
    from atma.loading import packaged
    from atma.recipe_keys import recipe_keys

    found = dict(_of_verbs(verbs, ""))
    found["models:"] = _one_word(packaged())
    found["recipes:"] = _one_word(recipe_names())
    found["keys:"] = " ".join(recipe_keys())
    return found


def _one_word(names: Iterable[str]) -> str:
    """The names that are one word each: a clone's folder of recipes may hold others."""
    return " ".join(name for name in names if len(name.split()) == 1)


def _of_verbs(verbs: Mapping[str, tuple[str, str]], before: str) -> Iterator[tuple[str, str]]:
    yield f"verbs:{before}", " ".join(verbs)
    for verb, (name, _) in verbs.items():
        called = f"{before} {verb}".strip()
        module, _, function = name.partition(".")
        command = importlib.import_module(f"atma.commands.{module}")
        if not function and hasattr(command, "VERBS"):
            yield from _of_verbs(command.VERBS, called)
        else:
            yield from _of_verb(getattr(command, function or "run"), called)


def _of_verb(run: Callable[..., Any], called: str) -> Iterator[tuple[str, str]]:
    types_of, kinds, places = hints(run), options(run), words(run)
    named = [name for name in types_of if name.replace("-", "_") not in places]
    flags = {name: f"--{name}" for name in named}
    listed = [*flags.values(), *([OPTION] if takes_first(run) and "model" not in named else []), "--help"]
    yield f"options:{called}", " ".join(dict.fromkeys(listed))
    for name, flag in flags.items():
        yield f"option:{called} {flag}", f"{kinds[flag]} {_what(name, types_of[name])}"
    if takes_first(run):
        yield f"option:{called} {OPTION}", "value model"
    for place, name in enumerate(places):
        hint = types_of[name.replace("_", "-")]
        many = typing.get_origin(hint) is tuple
        yield f"place:{called} {'*' if many else place}", _what(name, hint)
    if not places and f"{OPTION}" in kinds:
        yield f"place:{called} 0", "model"


def _what(name: str, hint: Any) -> str:
    """What a value is, in a word, or "choice" and the choices."""
    own = name.rpartition(".")[2].replace("_", "-")
    if own in KINDS or own in FIRST:
        return KINDS.get(own, "model")
    if own == "device":
        return "choice cpu cuda"
    if own == "preset" and hint is str:
        from atma.presets import PRESETS

        return f"choice {' '.join(PRESETS)}"
    choices, paths = _choices(hint)
    return f"choice {' '.join(choices)}" if choices else "path" if paths else "none"


def _choices(hint: Any) -> tuple[list[str], bool]:
    """The values that a type allows, if they can be told, and whether it is of paths."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(one) for one in parts], False
    if origin in (types.UnionType, typing.Union, tuple):
        found = [_choices(part) for part in parts if part is not Ellipsis]
        return [one for choices, _ in found for one in choices], any(paths for _, paths in found)
    return [], hint is Path
