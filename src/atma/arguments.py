"""Options that a command line repeats: the values of a list are joined, anything else is refused.

The parser underneath keeps the last of several and says nothing of the others. So `--set a=1 --set b=2` is made into
`--set a=1 b=2` before it sees them, for every option of every command that takes a list; an option of one value that is
given twice is an error.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

Kind = Literal["list", "flag", "value"]
_NUMBER = re.compile(r"-\d+|-\d*\.\d+(e[+-]?\d+)?")


def joined(run: Callable[..., None], arguments: Sequence[str]) -> list[str]:
    """The arguments of `run` with every list in one place. ValueError: an option of one value is given twice."""
    kinds = options(run)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    out: list[list[str]] = [[]]
    groups: dict[str, list[str]] = {}
    for argument in arguments[:end]:
        if not is_option(argument):
            out[-1].append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        kind = kinds.get(name)
        if name in groups and kind == "value":
            raise ValueError(f"{name} is given twice; it takes one value: keep the one that you mean")
        if kind == "list" and name in groups:
            groups[name] += [value] if equals else []
            out.append(groups[name])
        elif kind == "list":
            groups[name] = [name, value] if equals else [name]
            out.append(groups[name])
        else:
            groups[name] = [argument]
            out.append(groups[name])
    once = {id(group): group for group in out}
    return [argument for group in once.values() for argument in group] + list(arguments[end:])


def options(run: Callable[..., Any]) -> dict[str, Kind]:
    """Every option of a command, as it is written, and what it takes."""
    kinds = {}
    for name, hint in hints(run).items():
        kinds |= {f"--{name}": _kind(hint), f"--{_negated(name)}": "flag"}
    return kinds


def hints(run: Callable[..., Any]) -> dict[str, Any]:
    """The type of every argument of a command, by the option that it is, without its dashes."""
    return dict(_hints(typing.get_type_hints(run, include_extras=True), ""))


def _hints(given: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for field, hint in given.items():
        marks = getattr(hint, "__metadata__", ())
        hint = typing.get_args(hint)[0] if marks else hint
        name = next((mark.name for mark in marks if getattr(mark, "name", None)), None) or field.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            inner = "" if _omits_prefix(marks) else f"{prefix}{name}."
            found += _hints(typing.get_type_hints(hint, include_extras=True), inner)
        elif field != "return":
            found.append((f"{prefix}{name}", hint))
    return found


def _negated(name: str) -> str:
    """As "tuning.no-seed" of "tuning.seed": what a flag that is on by default is switched off with."""
    table, dot, own = name.rpartition(".")
    return f"{table}{dot}no-{own}"


def _omits_prefix(marks: tuple[Any, ...]) -> bool:
    import tyro

    return tyro.conf.OmitArgPrefixes in marks


def _kind(hint: Any) -> Kind:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = {_kind(part) for part in typing.get_args(hint)}
        return "list" if "list" in kinds else "value" if "value" in kinds else "flag"
    if hint is bool or hint is type(None):
        return "flag"
    return "list" if typing.get_origin(hint) in (tuple, list, set, frozenset, dict) else "value"


def is_option(argument: str) -> bool:
    """Whether an argument names an option: no value, number or text with spaces."""
    return argument.startswith("-") and len(argument) > 1 and " " not in argument and not _NUMBER.fullmatch(argument)
