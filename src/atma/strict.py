"""Dataclasses from plain data, from Python and back, strictly: an unknown key or a wrong type says where it is."""

import dataclasses
import difflib
import functools
import itertools
import json
import math
import numbers
import re
import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

MOST_DEPTH = 64
NEAR = 0.6
"""How much of a key must be that of a known one, of 1, for it to be a slip of the pen."""
EXAMPLES: dict[type, str] = {
    int: ": a whole number, such as 1000",
    float: ": a number, such as 0.01",
    bool: ": true or false",
    str: ': a text, such as "polar"',
}
"""What a value of the wrong type should have been."""
LATER = {"later": True}
"""Metadata of a field that came after runs were made: at its default it is no part of a run's identity."""

PLACE = {"later": True, "place": True}
"""Metadata of a field that says where something lies that another field knows by its hash: no part of an identity."""

FOLLOWS = {"follows": "length"}
"""Metadata of an option of a mixer that presets bound by the length of training: a recipe's own length bounds it."""

UNSAID = {"later": True, "unsaid": True}
"""Metadata of a mixer's option that came after tables of mixers had identities: at its default it is no part of one."""
OWN = {"own": True}
"""Metadata of an option of a mixer that is set in its own table alone: one shared with others does not reach it."""


def require(holds: bool, name: str, value: Any, rule: str) -> None:
    """ValueError with the field's name, its rule and the value it has, unless the rule holds."""
    if not holds:
        raise ValueError(f"'{name}' must be {rule}, not {value!r}")


def from_dict(kind: type, values: dict[str, Any], where: str = "") -> Any:
    """Build dataclass `kind` from plain data, strictly: an unknown key or a wrong type is a ValueError saying where.

    A class that reads tables in a way of its own has `from_table(values, where)`.
    """
    if hasattr(kind, "from_table"):
        return kind.from_table(values, where)  # pyright: ignore
    hints = _hints(kind)
    known = set(hints)
    for key in values:
        if key not in known:
            raise UnknownKey(key, known, where)
    return kind(**{key: _coerce(hints[key], value, where + key) for key, value in values.items()})


class UnknownKey(ValueError):
    """A key that is not one of those known; it names what is near, or what there is."""

    def __init__(self, key: str, known: Collection[str], where: str = "") -> None:
        self.key, self.known, self.where = key, list(known), where
        super().__init__(f"unknown key '{where}{key}'; {mend(key, self.known, where)}")


def mend(key: str, known: Collection[str], where: str = "") -> str:
    """The known key that is near, or those that there are."""
    near = difflib.get_close_matches(key, known, 1, NEAR)
    if near:
        return f"did you mean '{where}{near[0]}'?"
    return f"there {'is' if len(known) == 1 else 'are'} {', '.join(sorted(known)) or 'none'}"


def to_dict(config: Any) -> dict[str, Any]:
    """Data of a configuration as JSON has it: every field present, and `plain`."""
    return plain(_data(config))


def _data(config: Any) -> Any:
    """Fields by name, all the way down; a class with tables of its own tells them by `to_table()`."""
    if hasattr(config, "to_table"):
        return config.to_table()
    if not dataclasses.is_dataclass(config):
        return config
    return {one.name: _data(getattr(config, one.name)) for one in dataclasses.fields(config)}


def plain(value: Any) -> Any:
    """Data as JSON has it: tuples as lists, infinity as the text "inf"."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return "inf" if value == math.inf else value


def as_list(value: object) -> list[Any] | None:
    """What a sequence, array or tensor holds, arrays inside it as lists; None for a text, bytes and anything else."""
    value = _listed(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return None
    return [_listed(item) for item in value]


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, memoryview) else value


def whole_numbers(value: object) -> list[int] | None:
    """The whole numbers that a sequence, array or tensor holds, as Python's own; None for anything else."""
    listed = as_list(value)
    if listed is None or not all(isinstance(one, numbers.Integral) and not isinstance(one, bool) for one in listed):
        return None
    return [int(one) for one in listed]


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; ValueError when it is missing or not TOML, saying `what` it should be."""
    try:
        return _shallow(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {what}") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number too long, of nesting
        raise ValueError(f"{path}: not a TOML {what}: {error}") from None


def read_value(text: str) -> Any:
    """What KEY=VALUE on a command line says: a value of TOML, or else the text itself."""
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{text.strip()[:60]}': not a value: {error}") from None
    return _shallow(value)


def _shallow(value: Any) -> Any:
    """The same value. ValueError if it is nested so deeply that working with it would end in an error of its own."""
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level, depth = [item for items in inner for item in items], depth + 1
    return value


def toml_value(value: Any) -> str:
    """A number, text, truth value or list as TOML writes it."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def toml_key(key: str) -> str:
    """A key as TOML writes it."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def check_fields(config: Any, where: str = "") -> None:
    """Hold a dataclass made in Python to its annotations, as `from_dict` holds data: first in its `__post_init__`.

    A whole number becomes the float that is asked for, a list the tuple, a text the path. ValueError names the field,
    behind `where`.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        held = _coerce(hint, value, where + name)
        if held is not value:
            object.__setattr__(config, name, held)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotation of each field."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _table(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        exact = next((kind for kind in arguments if type(value) is kind), arguments[0])
        return None if value is None and types.NoneType in arguments else _coerce(exact, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"'{where}' must be a table, not {value!r}")
        return value
    if origin is Literal:
        return _choice(arguments, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            such = "[1, 2]" if arguments[0] is int else '["a", "b"]' if arguments[0] is str else "[0.1, 0.2]"
            raise ValueError(f"'{where}' must be a list, not {value!r}: such as {such}")
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise ValueError(f"'{where}' must be a list of {len(arguments)}, not {value!r}")
        kinds = itertools.repeat(arguments[0]) if arguments[-1] is Ellipsis else arguments
        return tuple(_coerce(kind, item, where) for kind, item in zip(kinds, value, strict=False))
    return _plain(hint, value, where)


def _table(kind: type, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"'{where}' must be a table, not {value!r}")
    return from_dict(kind, value, where + ".")


def _choice(known: tuple[Any, ...], value: Any, where: str) -> Any:
    if not any(type(one) is type(value) and one == value for one in known):
        near = difflib.get_close_matches(value, [str(one) for one in known], 1) if isinstance(value, str) else []
        mend = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"'{where}' must be one of {', '.join(map(str, known))}, not {value!r}{mend}")
    return value


def _plain(kind: type, value: Any, where: str) -> Any:
    """A number, text, truth value or path; numbers of numpy become Python's."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is float and (value == "inf" or number):
        value = float(value)
    elif kind is int and number and isinstance(value, numbers.Integral):
        value = int(value)
    elif kind is Path and isinstance(value, str | Path):
        value = Path(value)
    if type(value) is not kind and not (kind is Path and isinstance(value, Path)):
        raise ValueError(f"'{where}' must be of type {kind.__name__}, not {value!r}{EXAMPLES.get(kind, '')}")
    return value
